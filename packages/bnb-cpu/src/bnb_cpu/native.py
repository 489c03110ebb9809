"""Loads the native module ``_C`` on top of the OpenMP runtime that torch uses.

Two OpenMP runtimes in one process keep two sets of threads, each spinning while the other works. The
module is therefore linked against none on Linux: its few OpenMP symbols are bound here, before it is
loaded, to the copy that came with torch. Where torch brought none, the system's serves.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from pathlib import Path

import torch

#: A symbol that the module needs and that any OpenMP runtime fit for GCC's code exports.
_PROBE = "GOMP_parallel"


def _is_bound() -> bool:
    """Whether the symbols are visible to libraries loaded from now on."""
    return hasattr(ctypes.CDLL(None), _PROBE)


def _candidates() -> list[str]:
    """Runtimes to try, torch's own first; a path that is loaded already is not loaded twice."""
    root = Path(torch.__file__).parent
    folders = (root / "lib", root.parent / "torch.libs")
    bundled = [str(path) for folder in folders for pattern in ("libgomp*", "libomp*") for path in folder.glob(pattern)]
    installed = (ctypes.util.find_library(name) for name in ("gomp", "omp", "iomp5"))
    return bundled + ["libgomp.so.1"] + [name for name in installed if name]


def bind_openmp() -> None:
    """Make an OpenMP runtime visible to the native module.

    Raises:
        ImportError: there is none on this machine.
    """
    if not sys.platform.startswith("linux") or _is_bound():
        return
    for candidate in _candidates():
        try:
            ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if _is_bound():
            return
    raise ImportError(
        "bnb-cpu needs an OpenMP runtime (libgomp), but neither torch nor the system has one; "
        "install the system package libgomp1 (Debian, Ubuntu) or libgomp (Fedora)"
    )


bind_openmp()

from bnb_cpu import _C  # noqa: E402

__all__ = ["_C", "bind_openmp"]
