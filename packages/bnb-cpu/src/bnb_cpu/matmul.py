"""Kernels of the products: 4-bit weights, int8 operands, and int8 quantization.

As in :mod:`bnb_cpu.ops`, nothing is checked again, and tensors stay referenced by a name until the
native call returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, empty, get_num_threads

from bitsandbytes.backends.description import Kernel
from bitsandbytes.backends.repeats import Repeats, native_repeats
from bnb_cpu.arguments import (
    DTYPES,
    QUANT_TYPES,
    address,
    all_contiguous,
    contiguous_or_none,
    dtype_number,
)
from bnb_cpu.memory import LARGE_RESULT, empty_result
from bnb_cpu.native import _C


def rows_of(A: Tensor) -> int:
    """Number of rows of a tensor seen as a matrix over its last dimension."""
    width = A.shape[-1]
    return A.numel() // width if width else A.shape[:-1].numel()


# --- 4 bit ------------------------------------------------------------------------------------------


def gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """Native ``gemv_4bit``."""
    out = empty_result((*A.shape[:-1], shapeB[0]), A.dtype, A.device)
    _gemm_4bit_into(A, B, shapeB, absmax, blocksize, out, table=code)
    return out


def gemv_4bit_out(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int, out: Tensor
) -> None:
    """Native ``gemv_4bit.out``."""
    if out.is_contiguous():
        _gemm_4bit_into(A, B, shapeB, absmax, blocksize, out, table=code)
    else:
        out.copy_(gemv_4bit(A, B, shapeB, absmax, code, blocksize))


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
    out = empty_result((*A.shape[:-1], shapeB[0]), A.dtype, A.device)
    _gemm_4bit_into(
        A, B, shapeB, absmax, blocksize, out, quant_type, None, bias, absmax_8bit, absmax_code, absmax_offset
    )
    return out


def _gemm_4bit_into(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    out: Tensor,
    quant_type: str = "nf4",
    table: Tensor | None = None,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> None:
    A, B, absmax = A.contiguous(), B.contiguous(), absmax.contiguous()
    table, bias = contiguous_or_none(table), contiguous_or_none(bias)
    absmax_8bit, absmax_code = contiguous_or_none(absmax_8bit), contiguous_or_none(absmax_code)
    _C.gemm_4bit(
        A.data_ptr(),
        DTYPES[A.dtype],
        rows_of(A),
        B.data_ptr(),
        shapeB[0],
        shapeB[1],
        absmax.data_ptr(),
        address(absmax_8bit),
        address(absmax_code),
        0 if absmax_code is None else absmax_code.numel(),
        address(absmax_offset),
        blocksize,
        address(table),
        QUANT_TYPES[quant_type],
        address(bias),
        dtype_number(bias),
        out.data_ptr(),
        get_num_threads(),
    )


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
    """Native ``gemm_4bit_transposed``."""
    A, B, absmax = A.contiguous(), B.contiguous(), absmax.contiguous()
    absmax_8bit, absmax_code = contiguous_or_none(absmax_8bit), contiguous_or_none(absmax_code)
    out = empty_result((*A.shape[:-1], shapeB[1]), A.dtype, A.device)
    _C.gemm_4bit_transposed(
        A.data_ptr(),
        DTYPES[A.dtype],
        rows_of(A),
        B.data_ptr(),
        shapeB[0],
        shapeB[1],
        absmax.data_ptr(),
        address(absmax_8bit),
        address(absmax_code),
        0 if absmax_code is None else absmax_code.numel(),
        address(absmax_offset),
        blocksize,
        QUANT_TYPES[quant_type],
        out.data_ptr(),
        get_num_threads(),
    )
    return out


# --- int8 quantization ------------------------------------------------------------------------------


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Native ``int8_vectorwise_quant``."""
    A = A.contiguous()
    rows, width, device = rows_of(A), A.shape[-1], A.device
    codes = empty_result(A.shape, torch.int8, device)
    absmax = empty(rows, dtype=torch.float32, device=device)
    columns = empty(width, dtype=torch.int64, device=device) if threshold > 0.0 else None
    count = _C.int8_vectorwise_quant(
        A.data_ptr(),
        DTYPES[A.dtype],
        rows,
        width,
        threshold,
        codes.data_ptr(),
        absmax.data_ptr(),
        address(columns),
        get_num_threads(),
    )
    # A copy: the caller should not keep the room for all columns.
    return codes, absmax, None if columns is None else columns[:count].clone()


def int8_double_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Native ``int8_double_quant``."""
    A = A.contiguous()
    row_codes, row_absmax, outlier_columns = int8_vectorwise_quant(A, threshold)
    column_codes = empty_result(A.shape, torch.int8, A.device)
    column_absmax = empty(A.shape[-1], dtype=torch.float32, device=A.device)
    _C.int8_columnwise_quant(
        A.data_ptr(),
        DTYPES[A.dtype],
        rows_of(A),
        A.shape[-1],
        threshold,
        column_codes.data_ptr(),
        column_absmax.data_ptr(),
        get_num_threads(),
    )
    return row_codes, column_codes, row_absmax, column_absmax, outlier_columns


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """Native ``int8_vectorwise_dequant``."""
    A, absmax = A.contiguous(), stats.float().contiguous()
    out = empty_result(A.shape, torch.float32, A.device)
    _C.int8_vectorwise_dequant(
        A.data_ptr(), absmax.data_ptr(), rows_of(A), A.shape[-1], out.data_ptr(), get_num_threads()
    )
    return out


# --- int8 products ----------------------------------------------------------------------------------


def int8_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    """Native ``int8_linear_matmul``."""
    out = empty_result((*A.shape[:-1], B.shape[0]), torch.int32, A.device)
    _int8_matmul_into(A, B, out)
    return out


def int8_linear_matmul_out(A: Tensor, B: Tensor, out: Tensor) -> None:
    """Native ``int8_linear_matmul.out``."""
    if out.is_contiguous():
        _int8_matmul_into(A, B, out)
    else:
        out.copy_(int8_linear_matmul(A, B))


def _int8_matmul_into(A: Tensor, B: Tensor, out: Tensor) -> None:
    A, B = A.contiguous(), B.contiguous()
    _C.int8_matmul(A.data_ptr(), B.data_ptr(), rows_of(A), B.shape[0], B.shape[1], out.data_ptr(), get_num_threads())


def int8_mm_dequant(
    A: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Native ``int8_mm_dequant``."""
    A, row_stats, col_stats = A.contiguous(), row_stats.contiguous(), col_stats.contiguous()
    bias = contiguous_or_none(bias)
    out = empty_result(A.shape, dtype or torch.float16, A.device)
    _C.int8_mm_dequant(
        A.data_ptr(),
        row_stats.data_ptr(),
        col_stats.data_ptr(),
        rows_of(A),
        A.shape[-1],
        address(bias),
        dtype_number(bias),
        out.data_ptr(),
        DTYPES[out.dtype],
        get_num_threads(),
    )
    return out


def int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Native ``int8_scaled_mm``."""
    return _scaled_product(A, B, row_stats, col_stats, None, None, bias, dtype or torch.float16)


def int8_mixed_scaled_mm(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Native ``int8_mixed_scaled_mm``."""
    if outlier_cols is None:
        return _scaled_product(CA, CB, SCA, SCB, None, None, bias, A.dtype), None
    A = A.contiguous()
    # Indexing also refuses columns that do not exist.
    outliers = A.reshape(rows_of(A), A.shape[-1])[:, outlier_cols]
    columns = outlier_cols.reshape(-1).long()
    columns = torch.where(columns < 0, columns + A.shape[-1], columns)
    return _scaled_product(CA, CB, SCA, SCB, A, columns, bias, A.dtype), outliers


def _scaled_product(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    values: Tensor | None,
    outlier_columns: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    A, B, row_stats, col_stats = A.contiguous(), B.contiguous(), row_stats.contiguous(), col_stats.contiguous()
    bias = contiguous_or_none(bias)
    out = empty_result((*A.shape[:-1], B.shape[0]), dtype, A.device)
    _C.int8_scaled_mm(
        A.data_ptr(),
        B.data_ptr(),
        row_stats.data_ptr(),
        col_stats.data_ptr(),
        rows_of(A),
        B.shape[0],
        B.shape[1],
        address(values),
        address(outlier_columns),
        0 if outlier_columns is None else outlier_columns.numel(),
        address(bias),
        dtype_number(bias),
        out.data_ptr(),
        DTYPES[dtype],
        get_num_threads(),
    )
    return out


def int8_linear(A: Tensor, CB: Tensor, SCB: Tensor, threshold: float = 0.0, bias: Tensor | None = None) -> Tensor:
    """Native ``int8_linear``."""
    A, CB, SCB, bias = A.contiguous(), CB.contiguous(), SCB.contiguous(), contiguous_or_none(bias)
    out = empty_result((*A.shape[:-1], CB.shape[0]), A.dtype, A.device)
    _C.int8_linear(
        A.data_ptr(),
        DTYPES[A.dtype],
        rows_of(A),
        CB.data_ptr(),
        SCB.data_ptr(),
        CB.shape[0],
        CB.shape[1],
        threshold,
        address(bias),
        dtype_number(bias),
        out.data_ptr(),
        get_num_threads(),
    )
    return out


# --- repeated calls ---------------------------------------------------------------------------------
#
# What does not change between calls is looked up once. The functions keep addresses, no tensors.


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
    """``gemm_4bit`` as a function of the activations alone."""
    if not all_contiguous(B, absmax, bias, absmax_8bit, absmax_code):
        return None
    multiply, device = _C.gemm_4bit, B.device
    n, k = shapeB
    weight = (
        B.data_ptr(),
        n,
        k,
        absmax.data_ptr(),
        address(absmax_8bit),
        address(absmax_code),
        0 if absmax_code is None else absmax_code.numel(),
        address(absmax_offset),
        blocksize,
        0,
        QUANT_TYPES[quant_type],
        address(bias),
        dtype_number(bias),
    )

    def run(A: Tensor) -> Tensor:
        A, dtype = A if A.is_contiguous() else A.contiguous(), A.dtype
        out = empty_result((*A.shape[:-1], n), dtype, device)
        rows = A.numel() // k if k else rows_of(A)
        multiply(A.data_ptr(), DTYPES[dtype], rows, *weight, out.data_ptr(), get_num_threads())
        return out

    return run


def bind_int8_linear(
    CB: Tensor, SCB: Tensor, threshold: float = 0.0, bias: Tensor | None = None
) -> Callable[[Tensor], Tensor] | None:
    """``int8_linear`` as a function of the activations alone."""
    if not all_contiguous(CB, SCB, bias):
        return None
    multiply, device = _C.int8_linear, CB.device
    n, k = CB.shape
    weight = (CB.data_ptr(), SCB.data_ptr(), n, k, threshold, address(bias), dtype_number(bias))

    def run(A: Tensor) -> Tensor:
        A, dtype = A if A.is_contiguous() else A.contiguous(), A.dtype
        out = empty_result((*A.shape[:-1], n), dtype, device)
        rows = A.numel() // k if k else rows_of(A)
        multiply(A.data_ptr(), DTYPES[dtype], rows, *weight, out.data_ptr(), get_num_threads())
        return out

    return run


def _repeats(op: str) -> Repeats | None:
    return native_repeats(_C, op, get_num_threads, LARGE_RESULT)


#: What this module serves, by op.
MATMUL_KERNELS = (
    Kernel("gemv_4bit", gemv_4bit),
    Kernel("gemv_4bit.out", gemv_4bit_out),
    Kernel("gemm_4bit", gemm_4bit, bind=bind_gemm_4bit, repeats=_repeats("gemm_4bit")),
    Kernel("gemm_4bit_transposed", gemm_4bit_transposed),
    Kernel("int8_vectorwise_quant", int8_vectorwise_quant),
    Kernel("int8_double_quant", int8_double_quant),
    Kernel("int8_vectorwise_dequant", int8_vectorwise_dequant),
    Kernel("int8_linear_matmul", int8_linear_matmul),
    Kernel("int8_linear_matmul.out", int8_linear_matmul_out),
    Kernel("int8_mm_dequant", int8_mm_dequant),
    Kernel("int8_scaled_mm", int8_scaled_mm),
    Kernel("int8_mixed_scaled_mm", int8_mixed_scaled_mm),
    Kernel("int8_linear", int8_linear, bind=bind_int8_linear, repeats=_repeats("int8_linear")),
)
