"""Checks and small helpers that several contracts share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from bitsandbytes.contract import check_dtype, check_that
from bitsandbytes.errors import ArgumentTypeError

#: Dtypes of values before quantization and after dequantization.
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: Dtypes that packed 4-bit codes may be stored as. The bytes are the same for all of them.
STORAGE_DTYPES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32)

#: Blocks of nested statistics hold 256 values of absmax (QLoRA, section 3: double quantization).
NESTED_BLOCKSIZE = 256

#: Largest block size; sums of it with a count of elements must fit 64 bits.
MAX_BLOCKSIZE = 2**62


def block_count(elements: int, blocksize: int) -> int:
    """Number of blocks that cover ``elements`` values, the last one possibly partial."""
    return (elements + blocksize - 1) // blocksize


def check_blocksize(op: str, blocksize: int, *, even: bool = False) -> None:
    """Raise unless ``blocksize`` is a positive integer, and even where two codes share a byte."""
    if isinstance(blocksize, bool) or not isinstance(blocksize, (int, torch.SymInt)):
        raise ArgumentTypeError(
            f"bitsandbytes::{op}: blocksize is {blocksize!r} of type {type(blocksize).__name__}, expected an int"
        )
    kind = "an even number from 2" if even else "a number from 1"
    check_that(
        op,
        (2 if even else 1) <= blocksize <= MAX_BLOCKSIZE and not (even and blocksize % 2),
        lambda: f"blocksize is {blocksize}, expected {kind} to {MAX_BLOCKSIZE}; usual values are 32 to 4096",
    )


def check_float(op: str, name: str, tensor: torch.Tensor) -> None:
    """Raise unless the tensor is float32, float16 or bfloat16."""
    check_dtype(op, name, tensor, FLOAT_DTYPES)


def check_result_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    """Raise unless ``dtype`` is one that values can be dequantized to."""
    if dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(allowed) for allowed in FLOAT_DTYPES)
        raise ArgumentTypeError(f"bitsandbytes::{op}: {name} is {dtype}, allowed: {allowed}")


def check_numel(op: str, name: str, tensor: torch.Tensor, expected: int, why: str) -> None:
    """Raise unless the tensor has exactly ``expected`` elements."""
    check_that(
        op,
        tensor.numel() == expected,
        lambda: f"{name} has {tensor.numel()} elements (shape {tuple(tensor.shape)}), expected {expected}: {why}",
    )


def check_bias(op: str, bias: torch.Tensor | None, features: int) -> None:
    """Raise unless ``bias`` is absent or a floating point vector with one entry per output feature."""
    if bias is not None:
        check_float(op, "bias", bias)
        check_that(
            op,
            bias.dim() == 1 and bias.shape[0] == features,
            lambda: f"bias has shape {tuple(bias.shape)}, expected ({features},)",
        )


def rows_of(shape: Sequence[int]) -> int:
    """Number of rows of a tensor seen as a matrix over its last dimension."""
    return math.prod(shape[:-1])


def as_rows(A: torch.Tensor) -> torch.Tensor:
    """View or copy as a matrix over the last dimension; works for empty tensors too."""
    return A.reshape(rows_of(A.shape), A.shape[-1])
