"""References that the tests compare with, built from stored codes in float64."""

from __future__ import annotations

import torch

from bitsandbytes.codebooks import code_4bit


def decode_weight_4bit(packed: torch.Tensor, state: object) -> torch.Tensor:
    """The weight that packed codes stand for, float64: table entry times absmax of its block."""
    data = packed.detach().contiguous().view(torch.uint8).reshape(-1)
    codes = torch.stack((data >> 4, data & 15), dim=1).reshape(-1).long()
    count = state.shape.numel()
    absmax = state.plain_absmax().double().repeat_interleave(state.blocksize)[:count]
    values = code_4bit(state.quant_type, torch.device("cpu")).double()[codes[:count]] * absmax
    return values.reshape(state.shape)


def decode_weight_8bit(codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """The weight that int8 codes stand for, float64."""
    return codes.double() * absmax.double().unsqueeze(1) / 127


def assert_product_close(
    actual: torch.Tensor, A: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> None:
    """Compare with ``A @ W.T + bias``, with the rounding of a product in ``dtype``.

    The weight and the result may each be rounded to ``dtype``: two roundings relative to the sum of
    magnitudes, and float32 accumulation.
    """
    A, W = A.detach().double(), W.double()
    expected, magnitude = A @ W.T, A.abs() @ W.abs().T
    if bias is not None:
        expected, magnitude = expected + bias.detach().double(), magnitude + bias.detach().double().abs()
    epsilon = torch.finfo(dtype).eps
    allowed = magnitude * (2 * epsilon + 2e-6) + 1e-30
    assert actual.shape == expected.shape
    excess = (actual.detach().double() - expected).abs() - allowed
    assert excess.max() <= 0, f"exceeds the bound by {excess.max()} (dtype {dtype})"
