"""Settings of optimizers and what they may be."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

import torch

from bitsandbytes.errors import ArgumentError


class MockArgs:
    """Settings of an optimizer as attributes."""

    def __init__(self, initial_data: Mapping[str, Any]):
        for key, value in initial_data.items():
            setattr(self, key, value)


def check_bits(owner: str, bits: Any) -> int:
    """The number of bits of a state; raises unless it is 8 or 32."""
    if bits not in (8, 32):
        raise ArgumentError(f"{owner}: optim_bits is {bits!r}, allowed: 8 and 32")
    return int(bits)


def check_settings(
    owner: str, lr: Any, betas: Any, eps: float, weight_decay: float
) -> tuple[float | torch.Tensor, tuple[float, ...]]:
    """Learning rate and betas; raises for numbers that no optimizer has a meaning for.

    Betas may come as text, ``"0.9, 0.999"`` or ``"(0.9, 0.999)"``, as configuration files have them.
    """
    if isinstance(betas, str):
        try:
            betas = ast.literal_eval(betas if betas.strip()[:1] in ("(", "[") else f"({betas},)")
        except (SyntaxError, ValueError) as error:
            raise ArgumentError(f"{owner}: betas is {betas!r}, expected numbers separated by commas") from error
    # Written so that NaN is refused too.
    if not lr >= 0.0:
        raise ArgumentError(f"{owner}: Invalid learning rate: lr is {lr}, expected 0 or more")
    if not eps >= 0.0:
        raise ArgumentError(f"{owner}: Invalid epsilon value: eps is {eps}, expected 0 or more")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ArgumentError(f"{owner}: Invalid beta parameter at index {index}: betas is {betas}, each in [0, 1)")
    if not weight_decay >= 0.0:
        raise ArgumentError(f"{owner}: Invalid weight_decay value: weight_decay is {weight_decay}, expected 0 or more")
    return lr, tuple(betas)
