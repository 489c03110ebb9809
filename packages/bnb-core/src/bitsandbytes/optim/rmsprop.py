"""RMSprop."""

from __future__ import annotations

from typing import Any

from bitsandbytes.optim.optimizer import Optimizer1State
from bitsandbytes.optim.variants import Storage, reduced


class RMSpropFamily(Storage, Optimizer1State):
    """RMSprop (Tieleman and Hinton 2012), the same as torch's.

    ``g = gradient + wd p``, ``v = alpha v + (1-alpha) g^2``, ``p = p - lr g / (sqrt(v) + eps)``.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, a number or a tensor of one element.
        alpha: decay rate of the average of squares; 0 is not supported: there would be no state.
        eps: added to the root.
        weight_decay: added to the gradient, times the parameter.
        momentum, centered: not supported, they would need a second state.
        optim_bits: bits per element of state, 32 or 8.
        args: object or dict of settings, see :class:`~bitsandbytes.optim.optimizer.Optimizer1State`.
        min_8bit_size: parameters with fewer elements have 32-bit state always.

    Raises:
        ArgumentError: an argument has a value without meaning, or is not supported; the text names it.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ):
        self.refuse(**{"alpha=0": alpha == 0, "momentum": momentum != 0, "centered=True": centered})
        bits = self.stored_bits(optim_bits)
        super().__init__("rmsprop", params, lr, (alpha, momentum), eps, weight_decay, bits, args, min_8bit_size)


class RMSprop(RMSpropFamily):
    """RMSprop; ``optim_bits`` says how states are stored."""


class RMSprop8bit(RMSpropFamily):
    """RMSprop with 8-bit states."""

    bits = 8
    __init__ = reduced(RMSpropFamily.__init__, "optim_bits")


class RMSprop32bit(RMSpropFamily):
    """RMSprop with 32-bit states."""

    bits = 32
    __init__ = reduced(RMSpropFamily.__init__, "optim_bits")
