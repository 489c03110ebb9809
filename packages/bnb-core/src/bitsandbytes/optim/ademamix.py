"""AdEMAMix: AdamW with a second, slow average of the gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch

from bitsandbytes.optim.optimizer import Optimizer2State
from bitsandbytes.optim.variants import Storage, reduced


class AdEMAMixFamily(Storage, Optimizer2State):
    """AdEMAMix (arXiv:2409.03137, algorithm 1).

    ``m1 = b1 m1 + (1-b1) g``, ``m2 = b3 m2 + (1-b3) g``, ``v = b2 v + (1-b2) g^2``,
    ``p = p (1 - lr wd) - lr (m1 / (1-b1^t) + alpha m2) / (sqrt(v / (1-b2^t)) + eps)``.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, a number or a tensor of one element.
        betas: decay rates of the fast average, of the squares and of the slow average.
        alpha: weight of the slow average.
        t_alpha: number of steps over which ``alpha`` grows linearly from 0; ``None`` for no growth.
        t_beta3: number of steps over which the third beta grows from the first, its half-life
            linearly; ``None`` for no growth. The paper advises the number of all steps for both.
        eps: added to the root of the second state.
        weight_decay: decoupled weight decay.
        optim_bits: bits per element of state, 32 or 8.
        min_8bit_size: parameters with fewer elements have 32-bit state always.
        is_paged: keep large states in memory that can move to the host.

    Raises:
        ArgumentError: an argument has a value without meaning; the text names it.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: Literal[8, 32] = 32,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ):
        super().__init__(
            "ademamix",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            self.stored_bits(optim_bits),
            None,
            min_8bit_size,
            is_paged=self.stored_paged(is_paged),
            alpha=alpha,
            t_alpha=t_alpha,
            t_beta3=t_beta3,
        )


class AdEMAMix(AdEMAMixFamily):
    """AdEMAMix; ``optim_bits`` says how states are stored."""


class AdEMAMix8bit(AdEMAMix):
    """AdEMAMix with 8-bit states."""

    bits = 8
    __init__ = reduced(AdEMAMixFamily.__init__, "optim_bits")


class AdEMAMix32bit(AdEMAMixFamily):
    """AdEMAMix with 32-bit states."""

    bits = 32
    __init__ = reduced(AdEMAMixFamily.__init__, "optim_bits")


class PagedAdEMAMix(AdEMAMix):
    """AdEMAMix with paged states; ``optim_bits`` says how they are stored."""

    paged = True
    __init__ = reduced(AdEMAMixFamily.__init__, "is_paged")


class PagedAdEMAMix8bit(AdEMAMix8bit):
    """AdEMAMix with paged 8-bit states."""

    paged = True
    __init__ = reduced(AdEMAMixFamily.__init__, "optim_bits", "is_paged")


class PagedAdEMAMix32bit(AdEMAMix32bit):
    """AdEMAMix with paged 32-bit states."""

    paged = True
    __init__ = reduced(AdEMAMixFamily.__init__, "optim_bits", "is_paged")
