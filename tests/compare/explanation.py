"""What an explanation of a difference is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.compare.case import Case
from tests.compare.verdict import error_of, same_bits


class WrongValueError(Exception):
    """Our value is not the right one."""


@dataclass(frozen=True)
class Difference:
    """One case on which the sides differ."""

    case: Case
    ours: Any
    theirs: Any
    #: Where they differ.
    paths: list[str]

    @property
    def inputs(self) -> dict[str, Any]:
        """What both sides were given."""
        return self.case.inputs

    @property
    def they_failed(self) -> bool:
        """Whether only the release raised an exception, or died."""
        return error_of(self.theirs) is not None and error_of(self.ours) is None

    def only_under(self, *prefixes: str) -> bool:
        """Whether every difference lies at or below one of the paths."""
        return all(any(path == p or path.startswith(f"{p}.") for p in prefixes) for path in self.paths)


@dataclass(frozen=True)
class Explanation:
    """A reason for two sides to differ."""

    ops: tuple[str, ...]
    reason: str
    #: Whether the difference has just the features that the reason predicts.
    applies: Callable[[Difference], bool]
    #: Raises :class:`WrongValueError` unless our result is the right one.
    prove: Callable[[Difference], None]


def need(condition: bool, text: str) -> None:
    """Raise :class:`WrongValueError` with ``text`` unless the condition holds."""
    if not condition:
        raise WrongValueError(text)


def need_bits(actual: Any, expected: torch.Tensor, what: str) -> None:
    """Raise :class:`WrongValueError` unless a tensor has exactly the expected bits."""
    need(isinstance(actual, torch.Tensor), f"{what} is {actual!r}")
    need(
        actual.shape == expected.shape and actual.dtype == expected.dtype,
        f"{what} is {actual.dtype} {tuple(actual.shape)}, expected {expected.dtype} {tuple(expected.shape)}",
    )
    need(same_bits(actual, expected), f"{what} has other bits than the truth")
