"""Moving quantized weights to devices that an extension has added to torch.

torch moves a parameter by exchanging its data. Tensors on a device of an extension are of another kind
than those on the CPU, and it cannot: it makes a new parameter, and what the old one carried is lost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def can_exchange_data(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether ``tensor.data = other`` works."""
    return bool(torch._has_compatible_shallow_copy_type(tensor, other))


@contextlib.contextmanager
def moving_weight(module: torch.nn.Module, fn: Any) -> Iterator[None]:
    """Keep the weight of a layer out of what torch's ``_apply(fn)`` does inside, where it would lose its state.

    The weight, a parameter with a method ``_with_data``, is then moved here.
    """
    weight: Any = module._parameters.get("weight")
    if not hasattr(weight, "_with_data") or not _is_foreign_move(weight, fn):
        yield
        return
    # Not removed: the order of parameters is that of the state dict.
    module._parameters["weight"] = None
    try:
        yield
    finally:
        module._parameters["weight"] = weight
    with torch.no_grad():
        moved = fn(weight)
    if moved is not weight:
        module._parameters["weight"] = moved if moved.__dict__ else weight._with_data(moved)


def _is_foreign_move(weight: torch.Tensor, fn: Any) -> bool:
    """Whether ``fn`` moves tensors to or from a device of an extension; it is tried on one without elements."""
    with torch.no_grad():
        probe = torch.empty(0, dtype=weight.dtype, device=weight.device)
        moved = fn(probe)
    kinds = {weight.device.type, moved.device.type}
    return len(kinds) == 2 and "meta" not in kinds and not can_exchange_data(probe, moved)
