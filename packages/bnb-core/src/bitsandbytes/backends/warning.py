"""Warnings about backends, shown at the line of the user's program that led to them."""

from __future__ import annotations

import sys
import warnings

from bitsandbytes.errors import BackendWarning

#: Packages between that line and the warning.
_BETWEEN = {"bitsandbytes", "importlib", "torch"}


def warn_user(message: str) -> None:
    """Issue a :class:`BackendWarning` for the innermost caller outside of this package, torch and the import system."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        BackendWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )
