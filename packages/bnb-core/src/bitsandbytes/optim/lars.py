"""LARS: momentum with the norm of each update limited relative to that of its parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bitsandbytes.errors import ArgumentError
from bitsandbytes.optim.settings import check_settings
from bitsandbytes.optim.sgd import MomentumFamily
from bitsandbytes.optim.variants import reduced


class LARSFamily(MomentumFamily):
    """LARS (arXiv:1708.03888), with the ratio of norms limiting the update rather than scaling it.

    With ``m`` the momentum of :class:`~bitsandbytes.optim.sgd.SGDFamily`,
    ``p = p - lr min(1, max_unorm |p| / |m|) m``.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, optim_bits, args, min_8bit_size: as for
            :class:`~bitsandbytes.optim.sgd.SGDFamily`.
        max_unorm: limit of the update's norm relative to the parameter's; 0 for none.

    Raises:
        ArgumentError: an argument has a value without meaning, or is not supported; the text names it.
    """

    plain_rule = "lars"

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
        max_unorm: float = 0.02,
    ):
        self.start(params, lr, momentum, dampening, weight_decay, nesterov, optim_bits, args, min_8bit_size, max_unorm)


class LARS(LARSFamily):
    """LARS; ``optim_bits`` says how states are stored."""


class LARS8bit(LARSFamily):
    """LARS with 8-bit states."""

    bits = 8
    __init__ = reduced(LARSFamily.__init__, "optim_bits")


class LARS32bit(LARSFamily):
    """LARS with 32-bit states."""

    bits = 32
    __init__ = reduced(LARSFamily.__init__, "optim_bits")


class PytorchLARS(torch.optim.Optimizer):
    """LARS in plain PyTorch, states in the dtype of the parameters; also without momentum.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, max_unorm: as for :class:`LARSFamily`,
            and ``momentum=0`` for none.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        max_unorm: float = 0.02,
    ):
        check_settings("PytorchLARS", lr, (momentum,), 0.0, weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ArgumentError("PytorchLARS: Nesterov momentum requires a momentum and zero dampening")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "max_unorm": max_unorm,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; returns what ``closure`` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        gradient = p.grad + group["weight_decay"] * p
        u = gradient
        if group["momentum"]:
            state = self.state[p]
            if "momentum_buffer" in state:
                buffer = state["momentum_buffer"]
                buffer.mul_(group["momentum"]).add_(gradient, alpha=1 - group["dampening"])
            else:
                buffer = state["momentum_buffer"] = gradient.clone()
            u = gradient + group["momentum"] * buffer if group["nesterov"] else buffer
        if group["max_unorm"] > 0.0:
            unorm, limit = torch.linalg.vector_norm(u), group["max_unorm"] * torch.linalg.vector_norm(p)
            u = u * torch.where((unorm > limit) & (limit > 0.0), limit / unorm, 1.0)
        p.sub_(group["lr"] * u)
