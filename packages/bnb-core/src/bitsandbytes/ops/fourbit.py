"""4-bit quantization: NormalFloat4 and FP4, plain or with nested statistics.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314): blocks of values are divided by their largest
magnitude (absmax) and coded with one of 16 values (section 3, equations 1 to 4); with nested
statistics ("double quantization") the absmax values are themselves quantized to 8 bit after their
mean, the offset, is subtracted.

Layout: codes of the flattened tensor, two to a byte, the earlier one in the high nibble; an odd
count pads with the code of zero. Packed codes have shape ``(bytes / itemsize, 1)`` and may
be viewed as any storage dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from bitsandbytes.codebooks import QUANT_TYPES_4BIT, code_4bit
from bitsandbytes.contract import TensorSpec, check_dtype, check_same_device, check_that, define_op
from bitsandbytes.errors import ArgumentTypeError
from bitsandbytes.ops import search
from bitsandbytes.ops.blockwise import check_code, dequantize_blockwise
from bitsandbytes.ops.common import (
    NESTED_BLOCKSIZE,
    STORAGE_DTYPES,
    block_count,
    check_blocksize,
    check_float,
    check_numel,
    check_result_dtype,
)


def packed_bytes(elements: int) -> int:
    """Bytes that hold ``elements`` 4-bit codes."""
    return (elements + 1) // 2


def check_quant_type(op: str, quant_type: str) -> None:
    """Raise unless ``quant_type`` is a 4-bit type."""
    check_that(
        op,
        quant_type in QUANT_TYPES_4BIT,
        lambda: f"quant_type is {quant_type!r}, allowed: {', '.join(QUANT_TYPES_4BIT)}",
    )


def check_packed(op: str, name: str, packed: torch.Tensor, shape: Sequence[int]) -> None:
    """Raise unless ``packed`` holds exactly the codes of a tensor of ``shape``."""
    check_dtype(op, name, packed, STORAGE_DTYPES)
    check_that(op, all(size >= 0 for size in shape), lambda: f"shape {tuple(shape)} has a negative size")
    given, expected = packed.numel() * packed.element_size(), packed_bytes(math.prod(shape))
    check_that(
        op,
        given == expected,
        lambda: (
            f"{name} holds {given} bytes (shape {tuple(packed.shape)}, {packed.dtype}), but a tensor of shape "
            f"{tuple(shape)} needs {expected}; is it a shard, or the weight of another layer?"
        ),
    )


def check_absmax(
    op: str,
    absmax: torch.Tensor,
    elements: int,
    blocksize: int,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
    nested_blocksize: int = NESTED_BLOCKSIZE,
) -> None:
    """Check the statistics of a 4-bit tensor, plain (``absmax`` alone) or nested (all four)."""
    blocks = block_count(elements, blocksize)
    check_dtype(op, "absmax", absmax, (torch.float32,))
    nested = (absmax_8bit, absmax_code, absmax_offset)
    if all(part is None for part in nested):
        check_numel(op, "absmax", absmax, blocks, f"one per block of {blocksize} values")
        return
    if absmax_8bit is None or absmax_code is None or absmax_offset is None:
        raise ArgumentTypeError(
            f"bitsandbytes::{op}: nested statistics need absmax_8bit, absmax_code and absmax_offset together"
        )
    check_dtype(op, "absmax_8bit", absmax_8bit, (torch.uint8,))
    check_dtype(op, "absmax_offset", absmax_offset, (torch.float32,))
    check_code(op, absmax_code)
    check_numel(op, "absmax_8bit", absmax_8bit, blocks, f"one per block of {blocksize} values")
    check_numel(op, "absmax_offset", absmax_offset, 1, "the mean that was subtracted from absmax")
    check_numel(
        op,
        "absmax",
        absmax,
        block_count(blocks, nested_blocksize),
        f"with nested statistics one per {nested_blocksize} values of absmax_8bit",
    )


def expand_absmax(
    absmax: torch.Tensor,
    absmax_8bit: torch.Tensor | None,
    absmax_code: torch.Tensor | None,
    absmax_offset: torch.Tensor | None,
    nested_blocksize: int = NESTED_BLOCKSIZE,
) -> torch.Tensor:
    """The float32 absmax per block from plain or nested statistics.

    Nested: ``absmax_code[absmax_8bit] * absmax[block of nested_blocksize] + absmax_offset``, the
    product and the sum each rounded to float32.
    """
    if absmax_8bit is None or absmax_code is None or absmax_offset is None:
        return absmax.reshape(-1)
    values = dequantize_blockwise(absmax_8bit.reshape(-1), absmax, absmax_code, nested_blocksize, torch.float32)
    return values + absmax_offset.reshape(())


def check_quantize_4bit(A: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> None:
    """Check the arguments of ``quantize_4bit``."""
    op = "quantize_4bit"
    check_blocksize(op, blocksize, even=True)
    check_float(op, "A", A)
    check_quant_type(op, quant_type)
    if quant_storage not in STORAGE_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in STORAGE_DTYPES)
        raise ArgumentTypeError(f"bitsandbytes::{op}: quant_storage is {quant_storage}, allowed: {allowed}")
    count = packed_bytes(A.numel())
    check_that(
        op,
        count % quant_storage.itemsize == 0,
        lambda: (
            f"{count} packed bytes cannot be viewed as quant_storage={quant_storage} "
            f"({quant_storage.itemsize} bytes each); use torch.uint8"
        ),
    )


def outputs_quantize_4bit(
    A: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[TensorSpec, ...]:
    """Packed codes and one absmax per block."""
    return (
        TensorSpec((packed_bytes(A.numel()) // quant_storage.itemsize, 1), quant_storage),
        TensorSpec((block_count(A.numel(), blocksize),), torch.float32),
    )


@define_op(
    "quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    check=check_quantize_4bit,
    outputs=outputs_quantize_4bit,
)
def quantize_4bit(
    A: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to packed 4-bit codes, block by block.

    Args:
        A: values, any shape, float32, float16 or bfloat16. Blocks run over the flattened tensor;
            the last one may be shorter.
        blocksize: values per block, even.
        quant_type: ``"nf4"`` or ``"fp4"``.
        quant_storage: dtype of the packed codes; their bytes must fill whole elements of it.

    Returns:
        ``(packed, absmax)``: codes of shape ``(bytes / itemsize, 1)`` and dtype ``quant_storage``;
        float32 of shape ``(blocks,)``.
    """
    scaled, absmax = search.scale_blocks_4bit(A, blocksize)
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    codes = search.nearest_code_4bit(scaled, quant_type)
    packed = (codes[::2] << 4) | codes[1::2]
    return packed.view(quant_storage).unsqueeze(1), absmax


def check_dequantize_4bit(
    A: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> None:
    """Check the arguments of ``dequantize_4bit``."""
    op = "dequantize_4bit"
    check_blocksize(op, blocksize, even=True)
    check_quant_type(op, quant_type)
    check_result_dtype(op, "dtype", dtype)
    check_packed(op, "A", A, shape)
    check_absmax(op, absmax, math.prod(shape), blocksize)
    check_same_device(op, A=A, absmax=absmax)


def outputs_dequantize_4bit(
    A: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> tuple[TensorSpec, ...]:
    """Values in ``shape``."""
    return (TensorSpec(shape, dtype),)


@define_op(
    "dequantize_4bit(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor",
    check=check_dequantize_4bit,
    outputs=outputs_dequantize_4bit,
    out_overload=True,
)
def dequantize_4bit(
    A: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Unpack 4-bit codes, look them up and multiply by the absmax of their block, in float32.

    Args:
        A: packed codes in any storage dtype and shape, exactly ``(prod(shape) + 1) // 2`` bytes.
        absmax: float32, one per block.
        blocksize: values per block, even.
        quant_type: ``"nf4"`` or ``"fp4"``.
        shape: shape of the result.
        dtype: dtype of the result: float32, float16 or bfloat16, rounded once.

    Returns:
        ``table[code] * absmax[block]`` in ``shape``.
    """
    return decode_4bit(A, code_4bit(quant_type, A.device), absmax, blocksize, shape).to(dtype)


def decode_4bit(
    packed: torch.Tensor, code: torch.Tensor, absmax: torch.Tensor, blocksize: int, shape: Sequence[int]
) -> torch.Tensor:
    """Float32 values of packed codes under any 16-entry table."""
    data = packed.contiguous().view(torch.uint8).reshape(-1)
    codes = torch.stack((data >> 4, data & 0xF), dim=1).reshape(-1)[: math.prod(shape)]
    return search.unscale_blocks(code[codes.int()], absmax, blocksize).reshape(shape)


def check_dequantize_4bit_nested(
    A: torch.Tensor,
    absmax: torch.Tensor,
    absmax_8bit: torch.Tensor,
    absmax_code: torch.Tensor,
    absmax_offset: torch.Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested_blocksize: int = NESTED_BLOCKSIZE,
) -> None:
    """Check the arguments of ``dequantize_4bit_nested``."""
    op = "dequantize_4bit_nested"
    check_blocksize(op, blocksize, even=True)
    check_blocksize(op, nested_blocksize)
    check_quant_type(op, quant_type)
    check_result_dtype(op, "dtype", dtype)
    check_packed(op, "A", A, shape)
    elements = math.prod(shape)
    check_absmax(op, absmax, elements, blocksize, absmax_8bit, absmax_code, absmax_offset, nested_blocksize)
    check_same_device(
        op, A=A, absmax=absmax, absmax_8bit=absmax_8bit, absmax_code=absmax_code, absmax_offset=absmax_offset
    )


def outputs_dequantize_4bit_nested(
    A: torch.Tensor,
    absmax: torch.Tensor,
    absmax_8bit: torch.Tensor,
    absmax_code: torch.Tensor,
    absmax_offset: torch.Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested_blocksize: int = NESTED_BLOCKSIZE,
) -> tuple[TensorSpec, ...]:
    """Values in ``shape``."""
    return (TensorSpec(shape, dtype),)


@define_op(
    "dequantize_4bit_nested(Tensor A, Tensor absmax, Tensor absmax_8bit, Tensor absmax_code, Tensor absmax_offset, "
    "int blocksize, str quant_type, int[] shape, ScalarType dtype, int nested_blocksize=256) -> Tensor",
    check=check_dequantize_4bit_nested,
    outputs=outputs_dequantize_4bit_nested,
)
def dequantize_4bit_nested(
    A: torch.Tensor,
    absmax: torch.Tensor,
    absmax_8bit: torch.Tensor,
    absmax_code: torch.Tensor,
    absmax_offset: torch.Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested_blocksize: int = NESTED_BLOCKSIZE,
) -> torch.Tensor:
    """Dequantize a 4-bit tensor with nested statistics in one pass.

    Args:
        A: packed codes, exactly ``(prod(shape) + 1) // 2`` bytes.
        absmax: float32, the absmax of the nested blocks.
        absmax_8bit: uint8, the coded absmax of each block of ``A``.
        absmax_code: the codebook of ``absmax_8bit``, up to 256 float32 values.
        absmax_offset: float32, one element, added to each decoded absmax.
        blocksize: values per block of ``A``, even.
        quant_type: ``"nf4"`` or ``"fp4"``.
        shape: shape of the result.
        dtype: dtype of the result: float32, float16 or bfloat16, rounded once.
        nested_blocksize: values of ``absmax_8bit`` per nested block.

    Returns:
        ``table[code] * (absmax_code[absmax_8bit] * absmax + absmax_offset)`` in ``shape``.
    """
    expanded = expand_absmax(absmax, absmax_8bit, absmax_code, absmax_offset, nested_blocksize)
    return dequantize_4bit(A, expanded, blocksize, quant_type, shape, dtype)
