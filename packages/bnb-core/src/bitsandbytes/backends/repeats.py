"""Calls of an op that are like one before, without its checks and without Python on the way to the kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bitsandbytes.backends.bound import EXCHANGE


@dataclass(frozen=True)
class Repeats:
    """What takes calls whose arguments are alike in kind to those of a call that kept the contract."""

    #: Called with the op's arguments, positional, before anything has been checked. Returns the result; ``None`` where
    #: no call with such arguments has been noted. Alike means the same dtypes, devices, sizes and contiguity of
    #: tensors and the same values of all else: all that the checks of a contract look at.
    call: Callable[..., Any]
    #: Told the result and the arguments of a call that passed the checks and that the kernel served.
    note: Callable[..., None]


def native_repeats(module: Any, op: str, context: Callable[[], int], largest: int) -> Repeats | None:
    """Repeated calls of a kernel of a native module, for an op with one new tensor as its result.

    Args:
        module: the module, with the functions of ``bnb/python/bind_repeats.h``.
        op: name under which the module has the kernel.
        context: gives the integer that the kernel is called with.
        largest: calls with results of more bytes go the usual way.

    Returns:
        ``None`` where torch does not offer what is needed (before 2.10).
    """
    if EXCHANGE is None:
        return None
    handle = module.new_repeats(op, EXCHANGE, torch.Tensor, torch.empty_strided, context)

    def note(result: torch.Tensor, *args: Any) -> None:
        if result.nbytes <= largest:
            layout = (result.shape, result.stride())
            module.note_call(handle, layout, {"dtype": result.dtype, "device": result.device}, *args)

    return Repeats(functools.partial(module.call_again, handle), note)
