"""Kernels of the products with a 4-bit weight. See :mod:`bnb_cuda.ops` for what all of them share."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, empty

from bitsandbytes.backends.description import Kernel
from bitsandbytes.codebooks import code_4bit
from bnb_cuda import _C
from bnb_cuda.arguments import (
    DTYPES,
    QUANT_TYPES,
    address,
    all_plain,
    dtype_number,
    is_plain,
    plain,
    plain_or_none,
    rows_of,
    stream_of,
)
from bnb_cuda.tuning import Path, Plan, plan_gemm_4bit


@cache
def plan(rows: int, n: int, k: int, blocksize: int, dtype: torch.dtype, device: int) -> Plan:
    """The plan for a device, remembered."""
    return plan_gemm_4bit(rows, n, k, blocksize, dtype, _C.capability(device), _C.processors(device))


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
    """Native ``gemm_4bit``."""
    n, k = shapeB
    rows, device = rows_of(A), B.device
    how = plan(rows, n, k, blocksize, A.dtype, device.index)
    if how.path is Path.DEQUANTIZE or k == 0:
        weight = dequantized(B, shapeB, absmax, blocksize, quant_type, A.dtype, absmax_8bit, absmax_code, absmax_offset)
        return torch.nn.functional.linear(A, weight, None if bias is None else bias.to(A.dtype))
    A, B, absmax, bias = plain(A), plain(B), plain(absmax), plain_or_none(bias)
    absmax_8bit, absmax_code = plain_or_none(absmax_8bit), plain_or_none(absmax_code)
    out = empty((*A.shape[:-1], n), dtype=A.dtype, device=device)
    if rows and n:
        _C.gemm_4bit(
            how.path.value,
            how.split,
            device.index,
            stream_of(device.index),
            A.data_ptr(),
            DTYPES[A.dtype],
            rows,
            n,
            k,
            B.data_ptr(),
            absmax.data_ptr(),
            address(absmax_8bit),
            address(absmax_code),
            0 if absmax_code is None else absmax_code.numel(),
            address(absmax_offset),
            blocksize,
            QUANT_TYPES[quant_type],
            address(bias),
            dtype_number(bias),
            out.data_ptr(),
            code_4bit(quant_type, device).data_ptr() if how.path is Path.SCALAR else 0,
        )
    return out


def gemm_4bit_transposed(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """``gemm_4bit_transposed``: the weight is dequantized and multiplied by the library."""
    weight = dequantized(B, shapeB, absmax, blocksize, quant_type, A.dtype, absmax_8bit, absmax_code, absmax_offset)
    return torch.matmul(A, weight)


def dequantized(
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
    absmax_8bit: Tensor | None,
    absmax_code: Tensor | None,
    absmax_offset: Tensor | None,
) -> Tensor:
    """The weight in ``dtype``."""
    from bnb_cuda.ops import dequantize_into

    weight = empty(shapeB, dtype=dtype, device=B.device)
    dequantize_into(weight, B, absmax, blocksize, quant_type, absmax_8bit, absmax_code, absmax_offset)
    return weight


def gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """Native ``gemv_4bit``."""
    out = empty((*A.shape[:-1], shapeB[0]), dtype=A.dtype, device=A.device)
    _gemv_4bit_into(A, B, shapeB, absmax, code, blocksize, out)
    return out


def gemv_4bit_out(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int, out: Tensor
) -> None:
    """Native ``gemv_4bit.out``."""
    if is_plain(out):
        _gemv_4bit_into(A, B, shapeB, absmax, code, blocksize, out)
    else:
        out.copy_(gemv_4bit(A, B, shapeB, absmax, code, blocksize))


def _gemv_4bit_into(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int, out: Tensor
) -> None:
    A, B, absmax, code = plain(A), plain(B), plain(absmax), plain(code)
    device = B.device.index
    _C.gemm_4bit(
        Path.SCALAR.value,
        1,
        device,
        stream_of(device),
        A.data_ptr(),
        DTYPES[A.dtype],
        rows_of(A),
        shapeB[0],
        shapeB[1],
        B.data_ptr(),
        absmax.data_ptr(),
        0,
        0,
        0,
        0,
        blocksize,
        0,
        0,
        0,
        out.data_ptr(),
        code.data_ptr(),
    )


def bind_gemm_4bit(
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Callable[[Tensor], Tensor] | None:
    """``gemm_4bit`` as a function of the activations alone. It keeps addresses, no tensors."""
    n, k = shapeB
    if not all_plain(B, absmax, bias, absmax_8bit, absmax_code) or n == 0 or k == 0:
        return None
    device, index = B.device, B.device.index
    statistics = (
        absmax.data_ptr(),
        address(absmax_8bit),
        address(absmax_code),
        0 if absmax_code is None else absmax_code.numel(),
        address(absmax_offset),
    )
    packed, quant, offset = B.data_ptr(), QUANT_TYPES[quant_type], (address(bias), dtype_number(bias))
    table = code_4bit(quant_type, device).data_ptr()
    bias_of = _nothing if bias is None else weakref.ref(bias)
    multiply, dequantize = _C.gemm_4bit, _C.dequantize_4bit

    def run(A: Tensor) -> Tensor:
        rows, dtype = rows_of(A), A.dtype
        how = plan(rows, n, k, blocksize, dtype, index)
        if how.path is Path.DEQUANTIZE:
            weight, bias = empty((n, k), dtype=dtype, device=device), bias_of()
            weight_arguments = (256, n * k, blocksize, quant, weight.data_ptr(), DTYPES[dtype])
            dequantize(index, stream_of(index), packed, *statistics, *weight_arguments)
            return torch.nn.functional.linear(A, weight, None if bias is None else bias.to(dtype))
        A = A if is_plain(A) else plain(A)
        out = empty((*A.shape[:-1], n), dtype=dtype, device=device)
        if rows:
            multiply(
                how.path.value,
                how.split,
                index,
                stream_of(index),
                A.data_ptr(),
                DTYPES[dtype],
                rows,
                n,
                k,
                packed,
                *statistics,
                blocksize,
                quant,
                *offset,
                out.data_ptr(),
                table,
            )
        return out

    return run


def _nothing() -> None:
    return None


#: What this module serves, by op.
MATMUL_KERNELS = (
    Kernel("gemm_4bit", gemm_4bit, bind=bind_gemm_4bit),
    Kernel("gemm_4bit_transposed", gemm_4bit_transposed),
    Kernel("gemv_4bit", gemv_4bit),
    Kernel("gemv_4bit.out", gemv_4bit_out),
)
