"""8-bit block-wise quantization with a codebook of up to 256 values.

Each block of ``blocksize`` consecutive values is divided by its largest magnitude (absmax), and
every quotient is replaced by the index of a codebook value near it (Dettmers et al. 2022, "8-bit
Optimizers via Block-wise Quantization", arXiv:2110.02861, section 2).
"""

from __future__ import annotations

import torch

from bitsandbytes.contract import TensorSpec, check_dtype, check_same_device, check_that, define_op
from bitsandbytes.ops import search
from bitsandbytes.ops.common import (
    block_count,
    check_blocksize,
    check_float,
    check_numel,
    check_result_dtype,
)


def check_code(op: str, code: torch.Tensor) -> None:
    """Raise unless ``code`` is a float32 vector of at most 256 values."""
    check_dtype(op, "code", code, (torch.float32,))
    check_that(
        op,
        0 < code.numel() <= 256,
        lambda: f"code has {code.numel()} elements, expected 1 to 256: one for each value of a byte",
    )


def check_quantize_blockwise(A: torch.Tensor, code: torch.Tensor, blocksize: int) -> None:
    """Check the arguments of ``quantize_blockwise``."""
    check_blocksize("quantize_blockwise", blocksize)
    check_float("quantize_blockwise", "A", A)
    check_code("quantize_blockwise", code)
    check_same_device("quantize_blockwise", A=A, code=code)


def outputs_quantize_blockwise(A: torch.Tensor, code: torch.Tensor, blocksize: int) -> tuple[TensorSpec, ...]:
    """Codes in the shape of ``A`` and one absmax per block."""
    return (
        TensorSpec(A.shape, torch.uint8),
        TensorSpec((block_count(A.numel(), blocksize),), torch.float32),
    )


@define_op(
    "quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
    check=check_quantize_blockwise,
    outputs=outputs_quantize_blockwise,
)
def quantize_blockwise(A: torch.Tensor, code: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to 8-bit codes, block by block.

    Args:
        A: values, any shape, float32, float16 or bfloat16. Blocks run over the flattened tensor;
            the last one may be shorter.
        code: the codebook in ascending order, 1 to 256 float32 values in [-1, 1].
        blocksize: values per block, at least 1.

    Returns:
        ``(codes, absmax)``: uint8 in the shape of ``A``, and float32 of shape ``(blocks,)``.
    """
    scaled, absmax = search.scale_blocks_8bit(A, blocksize)
    return search.nearest_code_8bit(scaled, code).reshape(A.shape), absmax


def check_dequantize_blockwise(
    A: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, dtype: torch.dtype
) -> None:
    """Check the arguments of ``dequantize_blockwise``."""
    op = "dequantize_blockwise"
    check_blocksize(op, blocksize)
    check_dtype(op, "A", A, (torch.uint8,))
    check_dtype(op, "absmax", absmax, (torch.float32,))
    check_code(op, code)
    check_result_dtype(op, "dtype", dtype)
    blocks = block_count(A.numel(), blocksize)
    check_numel(op, "absmax", absmax, blocks, f"one per block of {blocksize} values of A")
    check_same_device(op, A=A, absmax=absmax, code=code)


def outputs_dequantize_blockwise(
    A: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, dtype: torch.dtype
) -> tuple[TensorSpec, ...]:
    """Values in the shape of ``A``."""
    return (TensorSpec(A.shape, dtype),)


@define_op(
    "dequantize_blockwise(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor",
    check=check_dequantize_blockwise,
    outputs=outputs_dequantize_blockwise,
    out_overload=True,
)
def dequantize_blockwise(
    A: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, dtype: torch.dtype
) -> torch.Tensor:
    """Look up 8-bit codes and multiply by the absmax of their block, in float32.

    Args:
        A: uint8 codes, any shape. A code beyond the end of ``code`` reads its last value.
        absmax: float32, one per block of the flattened ``A``.
        code: the codebook, 1 to 256 float32 values.
        blocksize: values per block.
        dtype: dtype of the result: float32, float16 or bfloat16, rounded once.

    Returns:
        ``code[A] * absmax[block]`` in the shape of ``A``.
    """
    values = code.reshape(-1)[A.reshape(-1).long().clamp_(max=code.numel() - 1)]
    return search.unscale_blocks(values, absmax, blocksize).to(dtype).reshape(A.shape)
