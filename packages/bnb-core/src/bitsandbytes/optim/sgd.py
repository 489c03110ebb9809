"""SGD with momentum."""

from __future__ import annotations

from typing import Any

from bitsandbytes.optim.optimizer import Optimizer1State
from bitsandbytes.optim.variants import Storage, reduced


class MomentumFamily(Storage, Optimizer1State):
    """What SGD and LARS share: the momentum buffer, dampening and Nesterov's look-ahead."""

    #: Rule without dampening and look-ahead.
    plain_rule = "momentum"

    def start(
        self,
        params: Any,
        lr: Any,
        momentum: float,
        dampening: float,
        weight_decay: float,
        nesterov: bool,
        optim_bits: int,
        args: Any,
        min_8bit_size: int,
        max_unorm: float,
    ) -> None:
        """Check the arguments and set the optimizer up."""
        self.refuse(**{"momentum=0": momentum == 0, "dampening together with nesterov": nesterov and dampening != 0})
        rule = "sgd" if nesterov or dampening else self.plain_rule
        super().__init__(
            rule,
            params,
            lr,
            (momentum, dampening),
            0.0,
            weight_decay,
            self.stored_bits(optim_bits),
            args,
            min_8bit_size,
            max_unorm,
        )
        if nesterov:
            for settings in (self.defaults, *self.param_groups):
                settings.setdefault("alpha", 1.0)


class SGDFamily(MomentumFamily):
    """SGD with momentum, the same as torch's.

    ``m = momentum m + (1 - dampening) (g + wd p)``, the first time ``m = g + wd p``; ``p = p - lr m``, or
    with Nesterov's look-ahead ``p = p - lr (g + wd p + momentum m)``.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, a number or a tensor of one element.
        momentum: decay rate of the sum of gradients; 0 is not supported: there would be no state.
        dampening: part of the gradient that does not enter the sum.
        weight_decay: added to the gradient, times the parameter.
        nesterov: look ahead by one step of momentum.
        optim_bits: bits per element of state, 32 or 8.
        args: object or dict of settings, see :class:`~bitsandbytes.optim.optimizer.Optimizer1State`.
        min_8bit_size: parameters with fewer elements have 32-bit state always.

    Raises:
        ArgumentError: an argument has a value without meaning, or is not supported; the text names it.
    """

    def __init__(
        self,
        params: Any,
        lr: Any,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ):
        self.start(params, lr, momentum, dampening, weight_decay, nesterov, optim_bits, args, min_8bit_size, 0.0)


class SGD(SGDFamily):
    """SGD; ``optim_bits`` says how states are stored."""


class SGD8bit(SGDFamily):
    """SGD with 8-bit states."""

    bits = 8
    __init__ = reduced(SGDFamily.__init__, "optim_bits")


class SGD32bit(SGDFamily):
    """SGD with 32-bit states."""

    bits = 32
    __init__ = reduced(SGDFamily.__init__, "optim_bits")
