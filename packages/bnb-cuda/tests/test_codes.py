"""The searches for codes against a bisection, for every float32 in [-1, 1]."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import bitsandbytes.functional as F
from bitsandbytes.ops.search import nearest_code_4bit, nearest_code_8bit

pytestmark = pytest.mark.gpu

#: Patterns of the float32 numbers from 0 to 1.
PATTERNS = 0x3F800001
CHUNK = 1 << 26


def blocks_of_all_numbers(blocksize: int) -> Iterator[torch.Tensor]:
    """Every number, in blocks that begin with 1, so that their values are not scaled."""
    for sign in (1.0, -1.0):
        for first in range(0, PATTERNS, CHUNK):
            last = min(first + CHUNK, PATTERNS)
            numbers = sign * torch.arange(first, last, dtype=torch.int32, device="cuda").view(torch.float32)
            numbers = torch.nn.functional.pad(numbers, (0, -numbers.numel() % (blocksize - 1)))
            yield torch.nn.functional.pad(numbers.view(-1, blocksize - 1), (1, 0), value=1.0)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_codes_of_all_numbers(quant_type):
    for values in blocks_of_all_numbers(64):
        packed, _ = F.quantize_4bit(values, quant_type=quant_type, blocksize=64)
        codes = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), dim=1).flatten()
        assert torch.equal(codes, nearest_code_4bit(values.flatten(), quant_type))


@pytest.mark.parametrize("signed", [True, False])
def test_8bit_codes_of_all_numbers(signed):
    code = F.create_dynamic_map(signed=signed).cuda()
    for values in blocks_of_all_numbers(256):
        codes, _ = F.quantize_blockwise(values, code=code, blocksize=256)
        assert torch.equal(codes.flatten(), nearest_code_8bit(values.flatten(), code))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 256, 512, 4096])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_4bit_codes_of_special_blocks(quant_type, blocksize, dtype):
    """Blocks of zeros, with NaN, with infinity, with an absmax of no finite or no normal reciprocal."""
    torch.manual_seed(0)
    blocks = torch.randn(12, blocksize, device="cuda", dtype=dtype)
    blocks[0] = 0.0
    blocks[1, 3:9] = float("nan")
    blocks[2] = float("nan")
    blocks[3, 5], blocks[3, 6] = float("inf"), -float("inf")
    blocks[4] = torch.finfo(dtype).tiny / 8 * blocks[4].sign()
    blocks[5] = torch.finfo(dtype).max * blocks[5].sign()
    blocks[6] = 0.0
    blocks[6, blocksize - 1] = -1.0
    flat = blocks.flatten()[:-7]
    packed, state = F.quantize_4bit(flat, quant_type=quant_type, blocksize=blocksize)
    exact = torch.nn.functional.pad(flat.float(), (0, 7)).view(12, blocksize)
    absmax = exact.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(1)
    assert torch.equal(state.absmax, absmax)
    scaled = torch.where(absmax[:, None] == 0, torch.nan, exact * absmax.reciprocal()[:, None]).flatten()
    codes = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), dim=1).flatten()[: flat.numel()]
    assert torch.equal(codes, nearest_code_4bit(scaled[: flat.numel()], quant_type))
