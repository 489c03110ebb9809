"""Declared gaps of a backend: what it is known not to do, with a reason for each.

A line of ``gaps.txt`` reads ``<pattern>: <reason>``; the pattern is matched, as in a shell, with the
id of a check, ``<check>-<op>-<case>``. Empty lines and lines that begin with ``#`` are comments. A
failure that is not listed fails the run, and so does a listed check that passes.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Gaps:
    """Patterns and their reasons."""

    entries: tuple[tuple[str, str], ...] = ()

    @classmethod
    def read(cls, path: Path | None) -> Gaps:
        """Read a file of gaps; no path means no gaps.

        Raises:
            ValueError: a line has no reason.
        """
        if path is None:
            return cls()
        entries = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            pattern, colon, reason = text.partition(": ")
            if not colon or not reason.strip():
                raise ValueError(f"{path}:{number}: expected '<pattern>: <reason>', got {text!r}")
            entries.append((pattern.strip(), reason.strip()))
        return cls(tuple(entries))

    def reason(self, check: str) -> str | None:
        """Why the check is known to fail, or ``None``."""
        for pattern, reason in self.entries:
            if fnmatch.fnmatchcase(check, pattern):
                return reason
        return None
