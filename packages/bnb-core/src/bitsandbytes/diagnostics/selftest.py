"""A short test of the ops on one device: does what is installed compute the right numbers?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bitsandbytes.codebooks import dynamic_map, named_4bit_type
from bitsandbytes.ops.search import GRID_POINTS

ops = torch.ops.bitsandbytes

ROWS, COLUMNS, BLOCKSIZE = 48, 128, 64


@dataclass(frozen=True)
class Step:
    """Result of one step."""

    name: str
    passed: bool
    #: Largest error relative to what is allowed, or what went wrong.
    detail: str


def run_selftest(device: str) -> list[Step]:
    """Run every step on a device; a step that raises has failed with that message."""
    return [_run(name, step, device) for name, step in STEPS.items()]


def _run(
    name: str, step: Callable[[str], tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]], device: str
) -> Step:
    try:
        actual, expected, allowed = step(device)
        error = (actual.double().cpu() - expected.double().cpu()).abs()
        ratio = (error / torch.as_tensor(allowed, dtype=torch.float64)).max().item()
    except Exception as failure:
        return Step(name, False, f"{type(failure).__name__}: {failure}")
    # `not >` would let a NaN pass.
    passed = ratio <= 1.0
    return Step(name, passed, f"largest error is {ratio:.2f} of the allowed one")


def _values(device: str, rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator).to(device)


def _four_bit(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A value moves to the nearest code: at most half the widest gap of the codebook, in units of its block."""
    weight = _values(device)
    packed, absmax = ops.quantize_4bit(weight, BLOCKSIZE, "nf4", torch.uint8)
    restored = ops.dequantize_4bit(packed, absmax, BLOCKSIZE, "nf4", weight.shape, weight.dtype)
    largest = weight.cpu().double().reshape(-1, BLOCKSIZE).abs().amax(1, keepdim=True)
    return (
        restored,
        weight,
        (largest.expand(-1, BLOCKSIZE) * _half_gap(named_4bit_type("nf4", torch.device("cpu")))).reshape(weight.shape),
    )


def _blockwise(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight = _values(device)
    code = dynamic_map(True, torch.device(device)).to(device)
    codes, absmax = ops.quantize_blockwise(weight, code, BLOCKSIZE)
    restored = ops.dequantize_blockwise(codes, absmax, code, BLOCKSIZE, weight.dtype)
    largest = weight.cpu().double().reshape(-1, BLOCKSIZE).abs().amax(1, keepdim=True)
    # The search rounds the scaled value to a grid first.
    step = _half_gap(code) + 1 / (GRID_POINTS - 1)
    return restored, weight, (largest.expand(-1, BLOCKSIZE) * step).reshape(weight.shape)


def _four_bit_matmul(device: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    weight, activations = _values(device), _values(device, rows=3)
    packed, absmax = ops.quantize_4bit(weight, BLOCKSIZE, "nf4", torch.uint8)
    product = ops.gemm_4bit(activations, packed, list(weight.shape), absmax, BLOCKSIZE, "nf4")
    restored = ops.dequantize_4bit(packed, absmax, BLOCKSIZE, "nf4", weight.shape, weight.dtype)
    expected = activations.cpu().double() @ restored.cpu().double().T
    # Reduced-precision tensor cores keep 10 bits of each factor.
    return product, expected, 2e-3 * expected.abs().max().item()


def _int8_matmul(device: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    rows, _stats, _outliers = ops.int8_vectorwise_quant(_values(device, rows=3).half())
    weight, _stats, _outliers = ops.int8_vectorwise_quant(_values(device).half())
    product = ops.int8_linear_matmul(rows, weight)
    expected = rows.cpu().double() @ weight.cpu().double().T
    # Sums of products of integers are exact.
    return product, expected, 0.5


def _half_gap(code: torch.Tensor) -> float:
    # Code, statistics and restored value are rounded to float32.
    return code.cpu().double().sort().values.diff().max().item() / 2 + 2**-22


STEPS: dict[str, Callable[[str], tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]]] = {
    "4-bit quantize and dequantize": _four_bit,
    "8-bit quantize and dequantize": _blockwise,
    "4-bit matmul": _four_bit_matmul,
    "int8 matmul": _int8_matmul,
}
