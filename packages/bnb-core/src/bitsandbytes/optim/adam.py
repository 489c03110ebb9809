"""Adam, with decoupled weight decay as it has always been here: AdamW with a decay of zero."""

from __future__ import annotations

from typing import Any

from bitsandbytes.optim.optimizer import Optimizer2State
from bitsandbytes.optim.variants import Storage


class AdamFamily(Storage, Optimizer2State):
    """Adam (arXiv:1412.6980) with decoupled weight decay (arXiv:1711.05101).

    ``m = b1 m + (1-b1) g``, ``v = b2 v + (1-b2) g^2``,
    ``p = p (1 - lr wd) - lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)``.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, a number or a tensor of one element.
        betas: decay rates of the averages of the gradient and of its square.
        eps: added to the root of the second average.
        weight_decay: decoupled weight decay.
        amsgrad: not supported.
        optim_bits: bits per element of state, 32 or 8.
        args: object or dict of settings, see :class:`~bitsandbytes.optim.optimizer.Optimizer2State`.
        min_8bit_size: parameters with fewer elements have 32-bit state always.
        is_paged: keep large states in memory that can move to the host.

    Raises:
        ArgumentError: an argument has a value without meaning, or is not supported; the text names it.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ):
        self.refuse(**{"amsgrad=True": amsgrad})
        super().__init__(
            "adam",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            self.stored_bits(optim_bits),
            args,
            min_8bit_size,
            is_paged=self.stored_paged(is_paged),
        )


class Adam(AdamFamily):
    """Adam; ``optim_bits`` says how states are stored."""


class Adam8bit(AdamFamily):
    """Adam with 8-bit states."""

    bits = 8


class Adam32bit(AdamFamily):
    """Adam with 32-bit states."""

    bits = 32


class PagedAdam(AdamFamily):
    """Adam with paged states; ``optim_bits`` says how they are stored."""

    paged = True


class PagedAdam8bit(AdamFamily):
    """Adam with paged 8-bit states."""

    bits, paged = 8, True


class PagedAdam32bit(AdamFamily):
    """Adam with paged 32-bit states."""

    bits, paged = 32, True
