"""Right values of the quantization ops, computed in float64 and independent of both sides.

The tables are the published ones: NF4 from QLoRA (Dettmers et al. 2023, arXiv:2305.14314, appendix E),
FP4 as sign, two exponent bits and one mantissa bit with the values 0, 1/16, 2, 3, 4, 6, 8, 12 over 12.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from tests.compare.inputs import dtype_of

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
#: float32 values by code; code 8 of FP4 is zero without a sign.
TABLES = {
    "nf4": torch.tensor(NF4),
    "fp4": torch.tensor([x / 12 for x in FP4_TWELFTHS] + [0.0] + [-x / 12 for x in FP4_TWELFTHS[1:]]),
}
NESTED_BLOCKSIZE = 256
#: Largest relative error of rounding to a dtype.
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
#: Smallest step of a dtype near zero.
STEP = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def per_element(absmax: torch.Tensor, count: int, blocksize: int) -> torch.Tensor:
    """The statistic of each element's block."""
    return absmax.repeat_interleave(blocksize)[:count]


def decode_4bit(
    packed: torch.Tensor, absmax: torch.Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: str
) -> torch.Tensor:
    """Table value times absmax. The float64 product of two float32 values is exact, so this rounds once."""
    data = packed.contiguous().view(torch.uint8).reshape(-1).long()
    count = math.prod(shape)
    codes = torch.stack((data >> 4, data & 15), dim=1).reshape(-1)[:count]
    values = TABLES[quant_type].double()[codes] * per_element(absmax.double(), count, blocksize)
    return values.float().to(dtype_of(dtype)).reshape(list(shape))


def nested_absmax(stats: dict[str, Any], offset: float) -> torch.Tensor:
    """Float32 statistics from nested ones: the product is rounded, then the sum."""
    codes = stats["absmax"].long()
    products = stats["nested_quant_map"].double()[codes] * per_element(
        stats["nested_absmax"].double(), len(codes), NESTED_BLOCKSIZE
    )
    return (products.float().double() + torch.tensor(offset).double()).float()


def not_nearest_4bit(actual: torch.Tensor, A: torch.Tensor, blocksize: int, quant_type: str) -> int:
    """How many values of ``actual`` are not the nearest of the table for their block of ``A``.

    Values within 1e-6 of the middle between two table values may go either way.
    """
    flat = A.double().reshape(-1)
    if not len(flat):
        return 0
    scale = per_element(block_absmax(flat, blocksize), len(flat), blocksize)[:, None]
    table = TABLES[quant_type].double()
    distance = (flat[:, None] / scale - table).abs()
    near = distance <= distance.amin(dim=1, keepdim=True) + 2e-6
    candidates = (table * scale).float().to(A.dtype)
    return int((~((candidates == actual.reshape(-1, 1)) & near).any(dim=1)).sum())


def block_absmax(flat: torch.Tensor, blocksize: int) -> torch.Tensor:
    """Largest magnitude of each block of a vector; the last block may be partial."""
    blocks = -(-flat.shape[-1] // blocksize)
    padded = torch.nn.functional.pad(flat.abs(), (0, blocks * blocksize - flat.shape[-1]))
    return padded.reshape(*flat.shape[:-1], blocks, blocksize).amax(dim=-1)


def dot_scale(row_stats: torch.Tensor, col_stats: torch.Tensor) -> torch.Tensor:
    """What an int32 product is multiplied by."""
    return torch.outer(row_stats.double(), col_stats.double()) / 127.0**2


def rounding_bound(truth: torch.Tensor, terms: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far a value may be that sums ``terms`` in float32 and rounds once to ``dtype``."""
    return truth.abs() * UNIT[dtype] * 1.001 + terms * 4e-7 + STEP[dtype]


def outside(actual: torch.Tensor, truth: torch.Tensor, bound: torch.Tensor | float) -> int:
    """How many values are farther from the truth than the bound; NaN and infinity must match."""
    finite = truth.isfinite()
    off = (actual.double() - truth).abs() > bound
    mismatch = torch.where(finite, off | ~actual.isfinite(), ~((actual == truth) | (actual.isnan() & truth.isnan())))
    return int(mismatch.sum())


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Error of a tensor in the Frobenius norm."""
    scale = torch.linalg.vector_norm(truth)
    return float(torch.linalg.vector_norm(actual.double() - truth) / scale) if scale > 0 else 0.0
