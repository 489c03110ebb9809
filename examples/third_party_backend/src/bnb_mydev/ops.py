"""Kernels of three ops; every other op runs on the reference, in PyTorch on the same device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitsandbytes.backends import Kernel
from bnb_mydev import _C

#: Numbers of ``bnb::Dtype`` and ``bnb::QuantType`` in the headers.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
QUANT_TYPES = {"nf4": 0, "fp4": 1}


def dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Values of packed 4-bit codes."""
    A, absmax = A.contiguous(), absmax.contiguous()
    out = torch.empty(shape, dtype=dtype, device=A.device)
    _C.dequantize_4bit(
        A.data_ptr(),
        absmax.data_ptr(),
        out.numel(),
        blocksize,
        QUANT_TYPES[quant_type],
        DTYPES[dtype],
        out.data_ptr(),
    )
    return out


def gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """Product with a 4-bit weight."""
    A, B, absmax = A.contiguous(), B.contiguous(), absmax.contiguous()
    bias = None if bias is None else bias.to(A.dtype).contiguous()
    columns, width = shapeB
    out = torch.empty((*A.shape[:-1], columns), dtype=A.dtype, device=A.device)
    _C.gemm_4bit(
        A.data_ptr(),
        B.data_ptr(),
        absmax.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        A.shape[:-1].numel(),
        columns,
        width,
        blocksize,
        QUANT_TYPES[quant_type],
        DTYPES[A.dtype],
        out.data_ptr(),
    )
    return out


def takes_gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> bool:
    """Whether the kernel takes this call: it has no code for nested statistics."""
    return absmax_8bit is None


def int8_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    """Exact product of int8 matrices."""
    A, B = A.contiguous(), B.contiguous()
    out = torch.empty((*A.shape[:-1], B.shape[0]), dtype=torch.int32, device=A.device)
    _C.int8_linear_matmul(A.data_ptr(), B.data_ptr(), A.shape[:-1].numel(), B.shape[0], B.shape[1], out.data_ptr())
    return out


def int8_linear(A: Tensor, CB: Tensor, SCB: Tensor, threshold: float = 0.0, bias: Tensor | None = None) -> Tensor:
    """The forward of an int8 layer without outliers, out of three ops of which one is native."""
    ops = torch.ops.bitsandbytes
    CA, SCA, _no_outliers = ops.int8_vectorwise_quant(A)
    return ops.int8_mm_dequant(int8_linear_matmul(CA, CB), SCA, SCB, A.dtype, bias)


def takes_int8_linear(A: Tensor, CB: Tensor, SCB: Tensor, threshold: float = 0.0, bias: Tensor | None = None) -> bool:
    """Whether the kernel takes this call: it has no code for outlier columns."""
    return threshold == 0.0


def launches() -> int:
    """Kernels launched so far."""
    return _C.launches()


KERNELS = (
    Kernel("dequantize_4bit", dequantize_4bit),
    Kernel("gemm_4bit", gemm_4bit, takes_gemm_4bit),
    Kernel("int8_linear_matmul", int8_linear_matmul),
    Kernel("int8_linear", int8_linear, takes_int8_linear),
)
