"""Optimizers in float64: torch's where it has the algorithm, else written from the paper's equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of arXiv:2302.06675."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                c = beta1 * m + (1 - beta1) * p.grad
                p.sub_(group["lr"] * (torch.sign(c) + group["weight_decay"] * p))
                m.copy_(beta2 * m + (1 - beta2) * p.grad)


class AdEMAMix(torch.optim.Optimizer):
    """Algorithm 1 of arXiv:2409.03137, with the schedules of its section 3."""

    def __init__(
        self, params: Any, lr: float, betas: Any, alpha: float, weight_decay: float, t: int | None, eps: float
    ):
        super().__init__(
            params, {"lr": lr, "betas": betas, "alpha": alpha, "weight_decay": weight_decay, "t": t, "eps": eps}
        )

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            b1, b2, final3 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(t=0, m1=torch.zeros_like(p), m2=torch.zeros_like(p), v=torch.zeros_like(p))
                state["t"] += 1
                t, alpha, b3 = state["t"], group["alpha"], final3
                if group["t"] is not None:
                    alpha = min(t * alpha / group["t"], alpha)
                    part = t / group["t"]
                    ln1, ln3 = math.log(b1), math.log(final3)
                    b3 = min(math.exp(ln1 * ln3 / ((1 - part) * ln3 + part * ln1)), final3) if part < 1 else final3
                state["m1"].copy_(b1 * state["m1"] + (1 - b1) * p.grad)
                state["m2"].copy_(b3 * state["m2"] + (1 - b3) * p.grad)
                state["v"].copy_(b2 * state["v"] + (1 - b2) * p.grad**2)
                m_hat, v_hat = state["m1"] / (1 - b1**t), state["v"] / (1 - b2**t)
                update = (m_hat + alpha * state["m2"]) / (v_hat.sqrt() + group["eps"])
                p.sub_(group["lr"] * (update + group["weight_decay"] * p))


class ScheduleFree(torch.optim.Optimizer):
    """Algorithm 1 of arXiv:2405.15682, all three sequences kept: parameters are ``y``, or ``x`` after ``average``."""

    def __init__(
        self, params: Any, lr: float, betas: Any, eps: float, decay: float, warmup: int, r: float, power: float
    ):
        settings = {"lr": lr, "betas": betas, "eps": eps, "decay": decay, "warmup": warmup, "r": r, "power": power}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            b1, b2 = group["betas"]
            t = group["t"] = group.get("t", 0) + 1
            lr = group["lr"] * (t / group["warmup"] if t < group["warmup"] else 1.0)
            group["largest"] = max(group.get("largest", 0.0), lr)
            weight = t ** group["r"] * group["largest"] ** group["power"]
            group["total"] = group.get("total", 0.0) + weight
            c = weight / group["total"] if group["total"] else 0.0
            for y in group["params"]:
                state = self.state[y]
                if not state:
                    state.update(z=y.clone(), x=y.clone(), v=torch.zeros_like(y))
                state["v"] = b2 * state["v"] + (1 - b2) * y.grad * y.grad
                u = y.grad / ((state["v"] / (1 - b2**t)).sqrt() + group["eps"]) + group["decay"] * y
                state["z"] = state["z"] - lr * u
                state["x"] = (1 - c) * state["x"] + c * state["z"]
                y.copy_((1 - b1) * state["z"] + b1 * state["x"])

    @torch.no_grad()
    def average(self) -> None:
        """Put ``x`` into the parameters."""
        for p, state in self.state.items():
            p.copy_(state["x"])


class Clipped(torch.optim.Optimizer):
    """Any update whose norm is limited relative to the parameter's: LAMB from Adam, LARS from momentum."""

    def __init__(self, params: Any, kind: str, **settings: Any):
        self.kind = kind
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                direction: Callable[..., torch.Tensor] = getattr(self, self.kind)
                decoupled = self.kind == "lamb"
                g = p.grad if decoupled else p.grad + group["weight_decay"] * p
                u = direction(g, self.state[p], group)
                ratio = group["max_unorm"] * p.norm() / u.norm()
                decay = group["weight_decay"] * p if decoupled else 0.0
                p.sub_(group["lr"] * (min(1.0, float(ratio)) * u + decay))

    def lamb(self, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
        b1, b2 = group["betas"]
        state["t"] = state.get("t", 0) + 1
        state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * g
        state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * g * g
        return (state["m"] / (1 - b1 ** state["t"])) / ((state["v"] / (1 - b2 ** state["t"])).sqrt() + group["eps"])

    def lars(self, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
        state["m"] = group["momentum"] * state["m"] + g if "m" in state else g.clone()
        return state["m"]
