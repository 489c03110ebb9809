"""Adagrad."""

from __future__ import annotations

from typing import Any

from bitsandbytes.optim.optimizer import Optimizer1State
from bitsandbytes.optim.variants import Storage, reduced


class AdagradFamily(Storage, Optimizer1State):
    """Adagrad (Duchi et al. 2011), the same as torch's without a decay of the learning rate.

    ``g = gradient + wd p``, ``v = v + g^2``, ``p = p - lr g / (sqrt(v) + eps)``.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, a number or a tensor of one element.
        lr_decay, initial_accumulator_value: not supported, must be 0.
        weight_decay: added to the gradient, times the parameter.
        eps: added to the root.
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
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ):
        self.refuse(lr_decay=lr_decay != 0, initial_accumulator_value=initial_accumulator_value != 0)
        bits = self.stored_bits(optim_bits)
        super().__init__("adagrad", params, lr, (0.0, 0.0), eps, weight_decay, bits, args, min_8bit_size)


class Adagrad(AdagradFamily):
    """Adagrad; ``optim_bits`` says how states are stored."""


class Adagrad8bit(AdagradFamily):
    """Adagrad with 8-bit states."""

    bits = 8
    __init__ = reduced(AdagradFamily.__init__, optim_bits=8)


class Adagrad32bit(AdagradFamily):
    """Adagrad with 32-bit states."""

    bits = 32
