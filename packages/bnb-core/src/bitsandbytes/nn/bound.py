"""Repeated calls of a layer without torch's dispatcher.

A layer whose weight does not change calls the same kernel with the same operands again and again, for
other activations. Dispatch, checks and the look-up of addresses then cost more than a small product. A
:class:`BoundLinear` has them done once, and knows when they have to be done again.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from bitsandbytes.backends.bound import is_intercepted
from bitsandbytes.backends.registry import REGISTRY

_without_subclass = torch._C.DisableTorchFunctionSubclass

#: A layer that has been bound this often without use of it changes too much to be worth it.
MOST_ATTEMPTS = 16


def pointer(tensor: torch.Tensor) -> int:
    """Address of a tensor's data, whatever class it has."""
    with _without_subclass():
        return tensor.data_ptr()


class BoundLinear:
    """A product bound to a weight, its statistics and a bias.

    It keeps no tensor alive: offloading takes weights away behind a layer's back.
    """

    __slots__ = (
        "attempts",
        "bias",
        "device",
        "dtype",
        "generation",
        "pointers",
        "run",
        "threshold",
        "weight",
        "width",
    )

    def __init__(self) -> None:
        #: The bound function; it returns ``None`` for activations that it leaves to the op.
        self.run: Any = None
        #: Outlier threshold that an int8 product is bound to.
        self.threshold = 0.0
        self.attempts = 0
        self.generation = -1

    def takes(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *statistics: torch.Tensor
    ) -> bool:
        """Whether :attr:`run` may be called with ``x`` for these operands."""
        if (
            self.run is None
            or type(x) is not torch.Tensor
            or x.dtype is not self.dtype
            or x.device != self.device
            or x.shape[-1] != self.width
            or self.weight() is not weight
            or self.generation != REGISTRY.generation
            or self.pointers != self.addresses(weight, bias, statistics)
            or (bias is not None and bias.dtype is not self.bias)
        ):
            return False
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return False
        return not is_intercepted()

    @staticmethod
    def addresses(
        weight: torch.Tensor, bias: torch.Tensor | None, statistics: tuple[torch.Tensor, ...]
    ) -> tuple[int, int, int, int]:
        """Where the operands lie; there are one or two tensors of statistics."""
        last = statistics[-1]
        return (
            pointer(weight),
            0 if bias is None else bias.data_ptr(),
            statistics[0].data_ptr(),
            0 if last is statistics[0] else last.data_ptr(),
        )

    def bind(
        self,
        op: str,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        statistics: tuple[torch.Tensor, ...],
        frozen: tuple[Any, ...],
    ) -> None:
        """Bind anew, after a call with these operands has gone the long way."""
        if type(x) is not torch.Tensor or (self.run is None and self.generation == REGISTRY.generation):
            # An input that is never bound, or no kernel that offers it.
            return
        self.attempts += 1
        if self.attempts > MOST_ATTEMPTS:
            self.run = None
            return
        self.run = REGISTRY.bind(op, x, *frozen)
        self.generation = REGISTRY.generation
        self.dtype, self.device, self.width = x.dtype, x.device, x.shape[-1]
        self.weight = weakref.ref(weight)
        self.bias = None if bias is None else bias.dtype
        self.pointers = self.addresses(weight, bias, statistics)

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundLinear:
        return BoundLinear()

    def __reduce__(self) -> tuple[Any, ...]:
        return BoundLinear, ()


def bound_of(module: torch.nn.Module) -> BoundLinear:
    """The binding of a layer, which lies beside its attributes and is not copied along."""
    found = module.__dict__.get("_bound")
    if found is None:
        found = module.__dict__["_bound"] = BoundLinear()
    return found
