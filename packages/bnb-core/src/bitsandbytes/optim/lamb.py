"""LAMB: Adam with the norm of each update limited relative to that of its parameter."""

from __future__ import annotations

from typing import Any

from bitsandbytes.optim.optimizer import Optimizer2State
from bitsandbytes.optim.variants import Storage, reduced


class LAMBFamily(Storage, Optimizer2State):
    """LAMB (arXiv:1904.00962), with the ratio of norms limiting the update rather than scaling it.

    With ``u`` Adam's update, ``p = p (1 - lr wd) - lr min(1, max_unorm |p| / |u|) u``.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, a number or a tensor of one element.
        bias_correction: not supported when false.
        betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size: as for
            :class:`~bitsandbytes.optim.adam.AdamFamily`.
        adam_w_mode: decoupled weight decay; when false the decay is added to the gradient.
        max_unorm: limit of the update's norm relative to the parameter's; 0 for none.

    Raises:
        ArgumentError: an argument has a value without meaning, or is not supported; the text names it.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        bias_correction: bool = True,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
    ):
        self.refuse(**{"amsgrad=True": amsgrad, "bias_correction=False": not bias_correction})
        super().__init__(
            "lamb" if adam_w_mode else "lamb_l2",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            self.stored_bits(optim_bits),
            args,
            min_8bit_size,
            max_unorm,
        )


class LAMB(LAMBFamily):
    """LAMB; ``optim_bits`` says how states are stored."""


class LAMB8bit(LAMBFamily):
    """LAMB with 8-bit states."""

    bits = 8
    __init__ = reduced(LAMBFamily.__init__, "optim_bits")


class LAMB32bit(LAMBFamily):
    """LAMB with 32-bit states."""

    bits = 32
    __init__ = reduced(LAMBFamily.__init__, "optim_bits")
