"""Kernels of LLM.int8() but the layer (:mod:`bnb_cuda.int8_linear`). See :mod:`bnb_cuda.ops` for what all share."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, empty

from bitsandbytes.backends.description import Kernel
from bnb_cuda import _C
from bnb_cuda.arguments import (
    DTYPES,
    address,
    dtype_number,
    plain,
    plain_or_none,
    rows_of,
    stream_of,
)
from bnb_cuda.int8_outliers import (
    Outliers,
    gathered_buffer,
    listed_outliers,
    outlier_addresses,
    outlier_buffers,
)
from bnb_cuda.tuning import LIBRARY_MULTIPLE, Int8Path, plan_int8


def quantize_rows(A: Tensor, threshold: float, cleared: bool = True) -> tuple[Tensor, Tensor, Outliers | None]:
    """Codes and absmax of rows, and the outlier columns without waiting for them.

    ``cleared``: whether the outlier columns get code 0, not just the outliers.
    """
    rows, width, device = rows_of(A), A.shape[-1], A.device
    codes = empty(A.shape, dtype=torch.int8, device=device)
    absmax = empty(rows, dtype=torch.float32, device=device)
    outliers = outlier_buffers(rows, width, threshold, device)
    _C.int8_quantize_rows(
        device.index,
        stream_of(device.index),
        A.data_ptr(),
        DTYPES[A.dtype],
        rows,
        width,
        threshold,
        codes.data_ptr(),
        absmax.data_ptr(),
        *outlier_addresses(outliers),
        cleared,
    )
    return codes, absmax, outliers


def _listed(outliers: Outliers | None) -> Tensor | None:
    """The outlier columns as the op returns them; their number makes the host wait."""
    return None if outliers is None else outliers.columns[: int(outliers.number[0])].long()


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Native ``int8_vectorwise_quant``."""
    codes, absmax, outliers = quantize_rows(plain(A), threshold)
    return codes, absmax, _listed(outliers)


def int8_double_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Native ``int8_double_quant``."""
    A = plain(A)
    rows, width, device = rows_of(A), A.shape[-1], A.device
    row_codes = empty(A.shape, dtype=torch.int8, device=device)
    column_codes = empty(A.shape, dtype=torch.int8, device=device)
    row_absmax = empty(rows, dtype=torch.float32, device=device)
    column_absmax = empty(width, dtype=torch.float32, device=device)
    outliers = outlier_buffers(rows, width, threshold, device)
    _C.int8_double_quantize(
        device.index,
        stream_of(device.index),
        A.data_ptr(),
        DTYPES[A.dtype],
        rows,
        width,
        threshold,
        row_codes.data_ptr(),
        column_codes.data_ptr(),
        row_absmax.data_ptr(),
        column_absmax.data_ptr(),
        *outlier_addresses(outliers),
    )
    return row_codes, column_codes, row_absmax, column_absmax, _listed(outliers)


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """Native ``int8_vectorwise_dequant``."""
    A, absmax, device = plain(A), plain(stats.float()), A.device.index
    out = empty(A.shape, dtype=torch.float32, device=A.device)
    _C.int8_dequantize_rows(
        device,
        stream_of(device),
        A.data_ptr(),
        absmax.data_ptr(),
        rows_of(A),
        A.shape[-1],
        out.data_ptr(),
        DTYPES[torch.float32],
    )
    return out


def int8_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    """``int8_linear_matmul`` by the library's integer product."""
    return integer_product(A, B).reshape(*A.shape[:-1], B.shape[0])


def int8_linear_matmul_out(A: Tensor, B: Tensor, out: Tensor) -> None:
    """``int8_linear_matmul.out`` by the library's integer product."""
    out.copy_(int8_linear_matmul(A, B))


#: The library's integer product wants more rows than this.
LIBRARY_ROWS = 16


def integer_product(A: Tensor, B: Tensor) -> Tensor:
    """Exact ``A @ B.T`` as an int32 matrix; odd sizes are filled up with zeros."""
    A = A.reshape(rows_of(A), A.shape[-1])
    m, k, n = A.shape[0], A.shape[1], B.shape[0]
    if m == 0 or n == 0 or k == 0:
        return torch.zeros(m, n, dtype=torch.int32, device=A.device)
    more_rows = max(0, LIBRARY_ROWS + 1 - m)
    more_k, more_n = -k % LIBRARY_MULTIPLE, -n % LIBRARY_MULTIPLE
    if more_rows or more_k:
        A = torch.nn.functional.pad(A, (0, more_k, 0, more_rows))
    if more_n or more_k:
        B = torch.nn.functional.pad(B, (0, more_k, 0, more_n))
    return torch._int_mm(A.contiguous(), B.contiguous().t())[:m, :n].contiguous()


def int8_mm_dequant(
    A: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Native ``int8_mm_dequant``."""
    product, row_stats, col_stats = plain(A), plain(row_stats), plain(col_stats)
    out = empty(A.shape, dtype=dtype or torch.float16, device=A.device)
    _multiply(0, out, product, None, None, rows_of(A), A.shape[-1], 0, row_stats, col_stats, None, None, bias)
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
    return scaled_product(A, B, row_stats, col_stats, None, None, bias, dtype or torch.float16)


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
        return scaled_product(CA, CB, SCA, SCB, None, None, bias, A.dtype), None
    A = plain(A)
    outliers = A.reshape(rows_of(A), A.shape[-1])[:, outlier_cols]
    columns = outlier_cols.reshape(-1)
    columns = torch.where(columns < 0, columns + A.shape[-1], columns).int().sort().values
    return scaled_product(CA, CB, SCA, SCB, A, listed_outliers(columns), bias, A.dtype), outliers


@cache
def plan(rows: int, n: int, k: int, dtype: torch.dtype, device: int, outliers: bool) -> Int8Path:
    """The plan for a product of codes, remembered."""
    capability = _C.capability(device)
    return plan_int8(rows, n, dtype, _C.int8_gemm_fits(n, k, capability), capability, outliers)


def scaled_product(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    values: Tensor | None,
    outliers: Outliers | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    cleared: bool = True,
) -> Tensor:
    """The scaled product with the correction for outlier columns of ``values``, and a bias.

    ``cleared``: whether ``A`` has code 0 in these columns.
    """
    A, B, row_stats, col_stats = plain(A), plain(B), plain(row_stats), plain(col_stats)
    m, n, k = rows_of(A), B.shape[0], B.shape[1]
    device = B.device
    out = empty((*A.shape[:-1], n), dtype=dtype, device=device)
    if not m or not n:
        return out
    path = plan(m, n, k, dtype, device.index, outliers is not None)
    product = integer_product(A, B) if path is Int8Path.LIBRARY else None
    _multiply(path.value, out, product, A, B, m, n, k, row_stats, col_stats, values, outliers, bias, cleared)
    return out


def _multiply(
    path: int,
    out: Tensor,
    product: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    m: int,
    n: int,
    k: int,
    row_stats: Tensor,
    col_stats: Tensor,
    values: Tensor | None,
    outliers: Outliers | None,
    bias: Tensor | None,
    cleared: bool = True,
) -> None:
    bias, device = plain_or_none(bias), out.device.index
    gathered, room = gathered_buffer(outliers, m + n, k, out) if path == Int8Path.GROUPS.value else (None, 0)
    _C.int8_gemm(
        path,
        device,
        stream_of(device),
        address(product),
        address(A),
        address(B),
        m,
        n,
        k,
        row_stats.data_ptr(),
        col_stats.data_ptr(),
        address(values),
        *outlier_addresses(outliers),
        cleared,
        address(gathered),
        room,
        address(bias),
        dtype_number(bias),
        out.data_ptr(),
        DTYPES[out.dtype],
    )


#: What this module serves, by op.
INT8_KERNELS = (
    Kernel("int8_vectorwise_quant", int8_vectorwise_quant),
    Kernel("int8_double_quant", int8_double_quant),
    Kernel("int8_vectorwise_dequant", int8_vectorwise_dequant),
    Kernel("int8_linear_matmul", int8_linear_matmul),
    Kernel("int8_linear_matmul.out", int8_linear_matmul_out),
    Kernel("int8_mm_dequant", int8_mm_dequant),
    Kernel("int8_scaled_mm", int8_scaled_mm),
    Kernel("int8_mixed_scaled_mm", int8_mixed_scaled_mm),
)
