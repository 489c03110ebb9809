"""Base classes under their historical names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitsandbytes.errors import ArgumentError
from bitsandbytes.ops.optim_rules import RULES
from bitsandbytes.optim.base import Optimizer8bit
from bitsandbytes.optim.overrides import GlobalOptimManager
from bitsandbytes.optim.settings import MockArgs, check_settings
from bitsandbytes.utils import sync_gpu

__all__ = ["GlobalOptimManager", "MockArgs", "Optimizer1State", "Optimizer2State", "Optimizer8bit", "sync_gpu"]


class Optimizer2State(Optimizer8bit):
    """Base of optimizers with two states.

    Args:
        optimizer_name: rule: adam, lamb, lamb_l2, ademamix or schedule_free.
        params: parameters or parameter groups.
        lr: learning rate, a number or a tensor of one element.
        betas: decay rates of the averages; three for ademamix.
        eps: added to the root of the second state.
        weight_decay: decoupled weight decay; for lamb_l2 added to the gradient.
        optim_bits: bits per element of state, 32 or 8.
        args: object or dict with optim_bits, min_8bit_size, max_unorm and skip_zeros, which then replaces
            these arguments.
        min_8bit_size: parameters with fewer elements have 32-bit state always.
        max_unorm: limit of the update's norm relative to the parameter's; 0 for none.
        skip_zeros: leave elements whose gradient is exactly zero as they are.
        is_paged: keep large states in memory that can move to the host.
        alpha, t_alpha, t_beta3: ademamix: weight of the slow average, and over how many steps this weight
            and the third beta grow to their value; ``None`` for no growth.

    Raises:
        ArgumentError: an argument has a value without meaning; the text names it.
    """

    def __init__(
        self,
        optimizer_name: str,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        alpha: float = 0.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
    ):
        owner = type(self).__name__
        _check_name(owner, optimizer_name, 2)
        lr, betas = check_settings(owner, lr, betas, eps, weight_decay)
        expected = 3 if optimizer_name == "ademamix" else 2
        if len(betas) != expected:
            raise ArgumentError(f"{owner}: betas is {betas}, expected {expected} numbers")
        for name, count in (("t_alpha", t_alpha), ("t_beta3", t_beta3)):
            if count is not None and count < 1:
                raise ArgumentError(f"{owner}: {name} is {count}, expected None or a number of steps from 1")
        self.optimizer_name = optimizer_name
        self.args = _settings(args, optim_bits, min_8bit_size, max_unorm, skip_zeros)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha": alpha,
            "t_alpha": t_alpha,
            "t_beta3": t_beta3,
        }
        super().__init__(params, defaults, self.args.optim_bits, is_paged)


class Optimizer1State(Optimizer8bit):
    """Base of optimizers with one state.

    Args:
        optimizer_name: rule: momentum, sgd, lars, lion, rmsprop or adagrad.
        params, lr, eps, optim_bits, args, min_8bit_size, max_unorm, skip_zeros, is_paged: as for
            :class:`Optimizer2State`.
        betas: parameters of the rule: decay rates of lion; momentum and dampening of sgd; the first is
            the decay rate of rmsprop.
        weight_decay: decoupled for lion, else added to the gradient.

    Raises:
        ArgumentError: an argument has a value without meaning; the text names it.
    """

    def __init__(
        self,
        optimizer_name: str,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.0),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
    ):
        owner = type(self).__name__
        _check_name(owner, optimizer_name, 1)
        lr, betas = check_settings(owner, lr, betas, eps, weight_decay)
        self.optimizer_name = optimizer_name
        self.args = _settings(args, optim_bits, min_8bit_size, max_unorm, skip_zeros)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, self.args.optim_bits, is_paged)


def _check_name(owner: str, name: str, states: int) -> None:
    known = [rule for rule in RULES if RULES[rule].states == states]
    if name not in known:
        raise ArgumentError(f"{owner}: optimizer_name is {name!r}, allowed: {', '.join(known)}")


def _settings(args: Any, optim_bits: int, min_8bit_size: int, max_unorm: float, skip_zeros: bool) -> Any:
    given = {
        "optim_bits": optim_bits,
        "min_8bit_size": min_8bit_size,
        "max_unorm": max_unorm,
        "skip_zeros": skip_zeros,
    }
    if args is None:
        return MockArgs(given)
    # An object that lacks a setting gets the argument of that name.
    return MockArgs({**given, **(args if isinstance(args, Mapping) else vars(args))})
