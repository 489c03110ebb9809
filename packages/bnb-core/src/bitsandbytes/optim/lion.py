"""Lion."""

from __future__ import annotations

from typing import Any

from bitsandbytes.optim.optimizer import Optimizer1State
from bitsandbytes.optim.variants import Storage, reduced


class LionFamily(Storage, Optimizer1State):
    """Lion (arXiv:2302.06675, algorithm 2).

    ``p = p (1 - lr wd) - lr sign(b1 m + (1-b1) g)``, ``m = b2 m + (1-b2) g``.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, a number or a tensor of one element; the paper advises 3 to 10 times less
            than for AdamW.
        betas: weight of the average in the update, and its decay rate.
        weight_decay: decoupled weight decay.
        optim_bits: bits per element of state, 32 or 8.
        args: object or dict of settings, see :class:`~bitsandbytes.optim.optimizer.Optimizer1State`.
        min_8bit_size: parameters with fewer elements have 32-bit state always.
        is_paged: keep large states in memory that can move to the host.

    Raises:
        ArgumentError: an argument has a value without meaning; the text names it.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ):
        super().__init__(
            "lion",
            params,
            lr,
            betas,
            0.0,
            weight_decay,
            self.stored_bits(optim_bits),
            args,
            min_8bit_size,
            is_paged=self.stored_paged(is_paged),
        )


class Lion(LionFamily):
    """Lion; ``optim_bits`` says how states are stored."""


class Lion8bit(LionFamily):
    """Lion with 8-bit states."""

    bits = 8
    __init__ = reduced(LionFamily.__init__, "optim_bits")


class Lion32bit(LionFamily):
    """Lion with 32-bit states."""

    bits = 32
    __init__ = reduced(LionFamily.__init__, "optim_bits")


class PagedLion(LionFamily):
    """Lion with paged states; ``optim_bits`` says how they are stored."""

    paged = True
    __init__ = reduced(LionFamily.__init__, "is_paged")


class PagedLion8bit(LionFamily):
    """Lion with paged 8-bit states."""

    bits, paged = 8, True
    __init__ = reduced(LionFamily.__init__, "optim_bits", "is_paged")


class PagedLion32bit(LionFamily):
    """Lion with paged 32-bit states."""

    bits, paged = 32, True
    __init__ = reduced(LionFamily.__init__, "optim_bits", "is_paged")
