"""Declared gaps of a backend: what it is known not to do, with a reason for each.

A line of ``gaps.txt`` reads ``<pattern>: <reason>``; the pattern is matched, as in a shell, with the
id of a check, ``<check>-<op>-<case>``. Empty lines and lines that begin with ``#`` are comments. A
failure that is not listed fails the run, and so does a listed check that passes.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitsandbytes.testing.checks import Check
    from bitsandbytes.testing.device import DeviceUnderTest


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


class Outcome(Enum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    #: It failed, and the file of gaps says why.
    GAP = "gap"
    #: It passed although the file of gaps lists it.
    STALE_GAP = "stale gap"


@dataclass(frozen=True)
class Result:
    """Outcome of one check of one item."""

    outcome: Outcome
    text: str = ""
    #: What a failed check raised.
    error: Exception | None = None


def run_check(check: Check, under_test: DeviceUnderTest, item: Any, gaps: Gaps) -> Result:
    """Run a check of one item and weigh the result against the declared gaps."""
    reason = gaps.reason(check.id_of(item))
    try:
        check.run(under_test, item)
    except Exception as error:
        if reason is None:
            return Result(Outcome.FAILED, describe(error), error)
        return Result(Outcome.GAP, f"{reason} ({type(error).__name__})")
    if reason is not None:
        return Result(Outcome.STALE_GAP, f"{check.id_of(item)} passes, but is listed as a gap: {reason}")
    return Result(Outcome.PASSED)


def describe(error: BaseException) -> str:
    """Type and first line of an exception; of a failed check, what it found."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, AssertionError) and lines[0] else f"{type(error).__name__}: {lines[0]}"
