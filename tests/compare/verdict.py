"""Bit by bit comparison of two results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

#: Integer dtypes to view the bits of floating point values as.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def leaves(result: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Paths and values of everything in nested dictionaries and lists."""
    if isinstance(result, dict):
        for key, value in result.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(result, (list, tuple)):
        yield f"{path}.length", len(result)
        for place, value in enumerate(result):
            yield from leaves(value, f"{path}.{place}")
    else:
        yield path, result


def error_of(result: Any) -> str | None:
    """The text of the exception, where the call raised one."""
    return result["error"] if isinstance(result, dict) and set(result) == {"error"} else None


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal shape, dtype and bytes; any NaN equals any NaN."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if not first.dtype.is_floating_point:
        return torch.equal(first, second)
    view = BITS[first.dtype.itemsize]
    equal = first.contiguous().view(view) == second.contiguous().view(view)
    return bool((equal | (first.isnan() & second.isnan())).all())


def same(first: Any, second: Any) -> bool:
    """Equal leaves."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return same_bits(first, second)
    return type(first) is type(second) and first == second


def differences(ours: Any, theirs: Any) -> list[str]:
    """Paths at which two results differ; two refusals are equal, whatever their words."""
    if error_of(ours) is not None or error_of(theirs) is not None:
        return [] if error_of(ours) is not None and error_of(theirs) is not None else ["error"]
    first, second = dict(leaves(ours)), dict(leaves(theirs))
    paths = [*first, *(path for path in second if path not in first)]
    return [path for path in paths if path not in first or path not in second or not same(first[path], second[path])]


def summarize(ours: Any, theirs: Any, path: str) -> str:
    """One line about the difference at a path."""
    if path == "error":
        return f"ours: {shorten(error_of(ours))}; theirs: {shorten(error_of(theirs))}"
    first, second = dict(leaves(ours)).get(path, "missing"), dict(leaves(theirs)).get(path, "missing")
    if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)):
        return f"ours: {describe(first)}; theirs: {describe(second)}"
    if first.shape != second.shape or first.dtype != second.dtype:
        return f"ours: {describe(first)}; theirs: {describe(second)}"
    differ = (first != second) & ~(first.double().isnan() & second.double().isnan())
    places = differ.reshape(-1).nonzero().reshape(-1)
    if not len(places):
        return "signs of zeros differ"
    place = int(places[0])
    return (
        f"{len(places)} of {first.numel()} differ, first at {place}: "
        f"ours {first.reshape(-1)[place].item()!r}, theirs {second.reshape(-1)[place].item()!r}"
    )


def shorten(error: str | None) -> str:
    """The first line of an error, which may go on for pages."""
    return "a result" if error is None else error.splitlines()[0][:200]


def describe(value: Any) -> str:
    """A tensor by dtype and shape, anything else by its text."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
