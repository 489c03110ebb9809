"""Which checks to run."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bitsandbytes.testing.checks import CHECKS, Check, Item


@dataclass(frozen=True)
class Selection:
    """Checks by op and by name; an empty tuple selects all."""

    ops: tuple[str, ...] = ()
    #: Patterns as in ``gaps.txt``, or parts of a name.
    patterns: tuple[str, ...] = ()

    def checks(self) -> Iterator[tuple[Check, Item]]:
        """The selected checks with their items, always in the same order."""
        for check in CHECKS.values():
            for item in check.items:
                if self.takes(item.op, check.id_of(item)):
                    yield check, item

    def takes(self, op: str, name: str) -> bool:
        """Whether a check is selected."""
        named = not self.patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in self._wide())
        return named and (not self.ops or op in self.ops)

    def _wide(self) -> Sequence[str]:
        """A pattern without a wildcard stands for every name that it is a part of."""
        return [p if any(sign in p for sign in "*?[") else f"*{p}*" for p in self.patterns]


def checked_ops() -> list[str]:
    """Every op that is checked."""
    return sorted({item.op for check in CHECKS.values() for item in check.items})
