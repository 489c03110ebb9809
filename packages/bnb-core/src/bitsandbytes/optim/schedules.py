"""Schedules of AdEMAMix's ``alpha`` and ``beta3`` (arXiv:2409.03137, section 3 and appendix A.1)."""

from __future__ import annotations

import math

import torch


def alpha_at(step: float, alpha: float, t_alpha: int | None) -> float:
    """``alpha``, growing linearly from 0 over the first ``t_alpha`` steps."""
    return alpha if t_alpha is None else min(step / t_alpha, 1.0) * alpha


def beta3_at(step: float, beta1: float, beta3: float, t_beta3: int | None) -> float:
    """``beta3``, growing from ``beta1`` over the first ``t_beta3`` steps so that its half-life grows linearly."""
    if t_beta3 is None or step >= t_beta3 or beta1 <= 0.0 or beta3 <= beta1:
        return beta3
    log1, log3, part = math.log(beta1), math.log(beta3), step / t_beta3
    return math.exp(log1 * log3 / ((1.0 - part) * log3 + part * log1))


def alpha_on_device(step: torch.Tensor, alpha: float | torch.Tensor, t_alpha: int | None) -> torch.Tensor:
    """:func:`alpha_at` for a tensor of step numbers, without a look at their values or that of ``alpha``."""
    return (torch.ones_like(step) if t_alpha is None else (step / t_alpha).clamp(max=1.0)) * alpha


def beta3_on_device(step: torch.Tensor, beta1: float, beta3: float, t_beta3: int | None) -> torch.Tensor:
    """:func:`beta3_at` for a tensor of step numbers, without a look at their values."""
    if t_beta3 is None or beta1 <= 0.0 or beta3 <= beta1:
        return torch.full_like(step, beta3)
    log1, log3 = math.log(beta1), math.log(beta3)
    part = (step / t_beta3).clamp(max=1.0)
    return torch.exp(log1 * log3 / ((1.0 - part) * log3 + part * log1))
