"""Optimizer steps in float64, from the papers' formulas, independent of both sides."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.compare.truth import block_absmax, per_element

BLOCKSIZE = 256
MIN_8BIT_SIZE = 4096
#: Rules whose weight decay shrinks the parameter instead of being added to the gradient.
DECOUPLED = ("adam", "lamb", "ademamix", "lion")

Tensors = dict[str, torch.Tensor]
Numbers = dict[str, Any]


@dataclass
class Step:
    """Where one step leads."""

    p: torch.Tensor
    state1: torch.Tensor
    state2: torch.Tensor | None
    #: Length of the update; ``None`` where nothing asks for it.
    unorm: float | None


def adam(g: torch.Tensor, s: Tensors, n: Numbers) -> torch.Tensor:
    """Adam (arXiv:1412.6980)."""
    s["state1"] = n["beta1"] * s["state1"] + (1 - n["beta1"]) * g
    s["state2"] = n["beta2"] * s["state2"] + (1 - n["beta2"]) * g * g
    return s["state1"] / (1 - n["beta1"] ** n["step"]) / second_root(s, n)


def ademamix(g: torch.Tensor, s: Tensors, n: Numbers) -> torch.Tensor:
    """AdEMAMix (arXiv:2409.03137)."""
    fast = n["beta1"] * s["state1"][0] + (1 - n["beta1"]) * g
    slow = n["beta3"] * s["state1"][1] + (1 - n["beta3"]) * g
    s["state1"] = torch.stack((fast, slow))
    s["state2"] = n["beta2"] * s["state2"] + (1 - n["beta2"]) * g * g
    return (fast / (1 - n["beta1"] ** n["step"]) + n["alpha"] * slow) / second_root(s, n)


def second_root(s: Tensors, n: Numbers) -> torch.Tensor:
    """Root of the second moment, corrected for bias, and eps."""
    return (s["state2"] / (1 - n["beta2"] ** n["step"])).sqrt() + n["eps"]


def momentum(g: torch.Tensor, s: Tensors, n: Numbers) -> torch.Tensor:
    """Heavy ball, whose buffer starts with the first gradient."""
    s["state1"] = g if n["step"] == 1 else n["beta1"] * s["state1"] + g
    return s["state1"]


def rmsprop(g: torch.Tensor, s: Tensors, n: Numbers) -> torch.Tensor:
    """RMSprop."""
    s["state1"] = n["beta1"] * s["state1"] + (1 - n["beta1"]) * g * g
    return g / (s["state1"].sqrt() + n["eps"])


def adagrad(g: torch.Tensor, s: Tensors, n: Numbers) -> torch.Tensor:
    """Adagrad."""
    s["state1"] = s["state1"] + g * g
    return g / (s["state1"].sqrt() + n["eps"])


def lion(g: torch.Tensor, s: Tensors, n: Numbers) -> torch.Tensor:
    """Lion (arXiv:2302.06675)."""
    direction = torch.sign(n["beta1"] * s["state1"] + (1 - n["beta1"]) * g)
    s["state1"] = n["beta2"] * s["state1"] + (1 - n["beta2"]) * g
    return direction


RULES: dict[str, Callable[[torch.Tensor, Tensors, Numbers], torch.Tensor]] = {
    "adam": adam,
    "lamb": adam,
    "ademamix": ademamix,
    "momentum": momentum,
    "lars": momentum,
    "rmsprop": rmsprop,
    "adagrad": adagrad,
    "lion": lion,
}


def step(rule: str, p: torch.Tensor, g: torch.Tensor, states: Tensors, n: Numbers) -> Step:
    """One step; ``p`` and the states are float64 and not modified."""
    gradient = g.double() * n["gnorm_scale"]
    decay = n["weight_decay"]
    if rule not in DECOUPLED:
        gradient = gradient + decay * p
    s = dict(states)
    update = RULES[rule](gradient, s, n)
    unorm, scale = None, 1.0
    if n["max_unorm"] > 0:
        unorm = float(torch.linalg.vector_norm(update))
        limit = n["max_unorm"] * n["param_norm"]
        scale = limit / unorm if unorm > limit > 0 else 1.0
    shrink = 1 - n["lr"] * decay if rule in DECOUPLED else 1.0
    after = p * shrink - n["lr"] * scale * update
    if n["skip_zeros"]:
        stays = g == 0
        after = torch.where(stays, p, after)
        s = {key: torch.where(stays, states[key], value) for key, value in s.items()}
    return Step(after, s["state1"], s.get("state2"), unorm)


def decode(codes: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """State values of 8-bit codes; the two averages of AdEMAMix have blocks of their own."""
    rows = codes.reshape(absmax.shape[0] if absmax.dim() == 2 else 1, -1)
    count = rows.shape[1]
    scales = torch.stack([per_element(row, count, BLOCKSIZE) for row in absmax.double().reshape(len(rows), -1)])
    return (code.double()[rows.long()] * scales).reshape(codes.shape)


def encode(values: torch.Tensor, code: torch.Tensor, halves: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest codes and block statistics."""
    rows = values.reshape(2 if halves else 1, -1)
    absmax = block_absmax(rows, BLOCKSIZE)
    scales = torch.stack([per_element(row, rows.shape[1], BLOCKSIZE) for row in absmax])
    scaled = torch.where(scales > 0, rows / scales, 0.0)
    sorted_code = code.double()
    upper = torch.searchsorted(sorted_code, scaled).clamp(1, len(code) - 1)
    nearer = (sorted_code[upper] - scaled) < (scaled - sorted_code[upper - 1])
    codes = torch.where(nearer, upper, upper - 1).to(torch.uint8).reshape(values.shape)
    return codes, absmax if halves else absmax.reshape(-1)


def schedule(step_number: int, final: float, steps: int | None) -> float:
    """AdEMAMix's alpha, which rises linearly."""
    return final if steps is None else min(step_number / steps, 1.0) * final


def schedule_beta3(step_number: int, beta1: float, final: float, steps: int | None) -> float:
    """AdEMAMix's beta3, whose half-life rises linearly."""
    if steps is None:
        return final
    f = step_number / steps
    start, end = math.log(beta1), math.log(final)
    return min(math.exp(start * end / ((1 - f) * end + f * start)), final) if f < 1 else final
