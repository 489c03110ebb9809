"""Rows of a 4-bit table against the reference."""

from __future__ import annotations

import pytest
import torch

from bitsandbytes.codebooks import create_dynamic_map
from bitsandbytes.contract import OPS
from bitsandbytes.testing.tolerances import same_bits

OP = OPS["embedding_4bit"]
SHAPES = ((11, 64), (7, 33), (5, 1), (3, 300), (9, 96))


def quantized(shape: tuple[int, int], blocksize: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return OPS["quantize_4bit"].reference(torch.randn(shape, generator=generator), blocksize, "nf4", torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_rows(isa: str, nested: bool, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Rows that begin inside a block or inside a byte; indices of any shape, stride and width."""
    for shape in SHAPES:
        for blocksize in (2, 64, 4096):
            packed, absmax = quantized(shape, blocksize, generator)
            statistics: tuple[torch.Tensor, ...] = ()
            if nested:
                offset = absmax.mean()
                codes, absmax = OPS["quantize_blockwise"].reference(absmax - offset, create_dynamic_map(), 256)
                statistics = (codes, create_dynamic_map(), offset)
            indices = torch.randint(0, shape[0], (4, 6), generator=generator)
            for rows in (indices, indices.int(), indices.t(), indices[::2, 1::2], indices[0, 0], indices[:0]):
                arguments = (rows, packed, shape, absmax, blocksize, "nf4", dtype, *statistics)
                assert same_bits(OP.overload(*arguments), OP.reference(*arguments))


@pytest.mark.parametrize("bad", [-1, 11, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_index_outside(bad: int, index_dtype: torch.dtype, generator: torch.Generator) -> None:
    packed, absmax = quantized((11, 64), 64, generator)
    indices = torch.tensor([0, 10, bad], dtype=index_dtype)
    with pytest.raises(IndexError, match=rf"embedding_4bit.*{bad}.*11 rows"):
        OP.overload(indices, packed, (11, 64), absmax, 64, "nf4", torch.float32)
