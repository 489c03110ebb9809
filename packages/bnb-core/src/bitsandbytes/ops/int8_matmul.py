"""Products of int8 matrices and their way back to floating point (LLM.int8(), arXiv:2208.07339).

For row-wise quantized ``A`` (codes ``CA``, absmax ``SCA``) and ``B`` (codes ``CB``, absmax ``SCB``)
the product is ``(CA @ CB.T) * SCA[:, None] * SCB[None, :] / 127**2`` (equation 4).
"""

from __future__ import annotations

import torch

from bitsandbytes.contract import TensorSpec, check_dtype, check_same_device, check_that, define_op
from bitsandbytes.ops.common import (
    as_rows,
    check_bias,
    check_float,
    check_numel,
    check_result_dtype,
    rows_of,
)
from bitsandbytes.ops.int8 import (
    LARGEST_CODE,
    check_matrix_like,
    check_threshold,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)

#: Scale of a product of two codes.
PRODUCT_SCALE = 1.0 / (LARGEST_CODE * LARGEST_CODE)

#: Inner sizes up to this one give sums of int8 products below 2**24, which float32 holds exactly.
_EXACT_CHUNK = 1024


def check_int8_operands(op: str, A: torch.Tensor, B: torch.Tensor) -> None:
    """Raise unless ``A`` and the matrix ``B`` are int8 with the same inner size."""
    check_dtype(op, "A", A, (torch.int8,))
    check_dtype(op, "B", B, (torch.int8,))
    check_matrix_like(op, "A", A)
    check_that(op, B.dim() == 2, lambda: f"B has shape {tuple(B.shape)}, expected a matrix (N, K)")
    check_that(
        op,
        A.shape[-1] == B.shape[1],
        lambda: f"A has shape {tuple(A.shape)} and B {tuple(B.shape)}; their last dimensions must be equal",
    )
    check_same_device(op, A=A, B=B)


def check_int8_linear_matmul(A: torch.Tensor, B: torch.Tensor) -> None:
    """Check the arguments of ``int8_linear_matmul``."""
    check_int8_operands("int8_linear_matmul", A, B)


def outputs_int8_linear_matmul(A: torch.Tensor, B: torch.Tensor) -> tuple[TensorSpec, ...]:
    """Integer sums."""
    return (TensorSpec((*A.shape[:-1], B.shape[0]), torch.int32),)


@define_op(
    "int8_linear_matmul(Tensor A, Tensor B) -> Tensor",
    check=check_int8_linear_matmul,
    outputs=outputs_int8_linear_matmul,
    out_overload=True,
)
def int8_linear_matmul(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Exact product of int8 matrices.

    Args:
        A: int8, shape ``(..., K)``.
        B: int8, shape ``(N, K)``.

    Returns:
        ``A @ B.T``, int32 of shape ``(..., N)``.
    """
    # Integer products exist on few devices; sums of at most 1024 int8 products are exact in float32.
    total = torch.zeros(*A.shape[:-1], B.shape[0], dtype=torch.int32, device=A.device)
    for left, right in zip(A.split(_EXACT_CHUNK, dim=-1), B.split(_EXACT_CHUNK, dim=-1), strict=True):
        total += torch.nn.functional.linear(left.float(), right.float()).int()
    return total


def check_int8_mm_dequant(
    A: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    dtype: torch.dtype | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """Check the arguments of ``int8_mm_dequant``."""
    op = "int8_mm_dequant"
    check_dtype(op, "A", A, (torch.int32,))
    check_matrix_like(op, "A", A)
    check_product_stats(op, row_stats, col_stats, rows_of(A.shape), A.shape[-1])
    check_bias(op, bias, A.shape[-1])
    if dtype is not None:
        check_result_dtype(op, "dtype", dtype)
    check_same_device(op, A=A, row_stats=row_stats, col_stats=col_stats, bias=bias)


def check_product_stats(op: str, row_stats: torch.Tensor, col_stats: torch.Tensor, rows: int, columns: int) -> None:
    """Raise unless there is one float32 absmax per row and per column of a product."""
    check_dtype(op, "row_stats", row_stats, (torch.float32,))
    check_dtype(op, "col_stats", col_stats, (torch.float32,))
    check_numel(op, "row_stats", row_stats, rows, "one absmax per row of the product")
    check_numel(op, "col_stats", col_stats, columns, "one absmax per column of the product")


def outputs_int8_mm_dequant(
    A: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    dtype: torch.dtype | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[TensorSpec, ...]:
    """Values in the shape of ``A``."""
    return (TensorSpec(A.shape, dtype or torch.float16),)


@define_op(
    "int8_mm_dequant(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) "
    "-> Tensor",
    check=check_int8_mm_dequant,
    outputs=outputs_int8_mm_dequant,
)
def int8_mm_dequant(
    A: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    dtype: torch.dtype | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scale an integer product back to floating point.

    Args:
        A: int32, shape ``(..., N)``.
        row_stats: float32 absmax of each row of the left operand, one per row.
        col_stats: float32 absmax of each row of the right operand, N values.
        dtype: dtype of the result, float16 where not given.
        bias: shape ``(N,)`` or ``None``.

    Returns:
        ``A * (row_stats[:, None] * col_stats / 127**2) + bias`` in the shape of ``A``, computed in
        float32 and rounded once.
    """
    scale = row_stats.reshape(-1, 1) * col_stats.reshape(1, -1) * PRODUCT_SCALE
    values = as_rows(A) * scale
    if bias is not None:
        values = values + bias.float()
    return values.to(dtype or torch.float16).reshape(A.shape)


def check_int8_scaled_mm(
    A: torch.Tensor,
    B: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Check the arguments of ``int8_scaled_mm``."""
    op = "int8_scaled_mm"
    check_int8_operands(op, A, B)
    check_product_stats(op, row_stats, col_stats, rows_of(A.shape), B.shape[0])
    check_bias(op, bias, B.shape[0])
    if dtype is not None:
        check_result_dtype(op, "dtype", dtype)
    check_same_device(op, A=A, row_stats=row_stats, col_stats=col_stats, bias=bias)


def outputs_int8_scaled_mm(
    A: torch.Tensor,
    B: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[TensorSpec, ...]:
    """Rows of N features."""
    return (TensorSpec((*A.shape[:-1], B.shape[0]), dtype or torch.float16),)


@define_op(
    "int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, "
    "ScalarType? dtype=None) -> Tensor",
    check=check_int8_scaled_mm,
    outputs=outputs_int8_scaled_mm,
)
def int8_scaled_mm(
    A: torch.Tensor,
    B: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Product of int8 matrices, scaled, with bias: ``int8_linear_matmul`` and ``int8_mm_dequant``.

    Args:
        A: int8, shape ``(..., K)``.
        B: int8, shape ``(N, K)``.
        row_stats: float32 absmax per row of ``A``.
        col_stats: float32 absmax per row of ``B``.
        bias: shape ``(N,)`` or ``None``.
        dtype: dtype of the result, float16 where not given.

    Returns:
        Shape ``(..., N)``.
    """
    return int8_mm_dequant(int8_linear_matmul(A, B), row_stats, col_stats, dtype, bias)


def check_int8_mixed_scaled_mm(
    A: torch.Tensor,
    CA: torch.Tensor,
    CB: torch.Tensor,
    SCA: torch.Tensor,
    SCB: torch.Tensor,
    outlier_cols: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """Check the arguments of ``int8_mixed_scaled_mm``."""
    op = "int8_mixed_scaled_mm"
    check_float(op, "A", A)
    check_int8_operands(op, CA, CB)
    check_that(
        op, A.shape == CA.shape, lambda: f"A has shape {tuple(A.shape)} and CA {tuple(CA.shape)}, expected the same"
    )
    check_product_stats(op, SCA, SCB, rows_of(A.shape), CB.shape[0])
    check_bias(op, bias, CB.shape[0])
    if outlier_cols is not None:
        check_dtype(op, "outlier_cols", outlier_cols, (torch.int64, torch.int32))
    check_same_device(op, A=A, CA=CA, CB=CB, SCA=SCA, SCB=SCB, outlier_cols=outlier_cols, bias=bias)


def fake_int8_mixed_scaled_mm(
    A: torch.Tensor,
    CA: torch.Tensor,
    CB: torch.Tensor,
    SCA: torch.Tensor,
    SCB: torch.Tensor,
    outlier_cols: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Shapes of the results on fake tensors."""
    out = A.new_empty(*A.shape[:-1], CB.shape[0])
    return out, None if outlier_cols is None else A.new_empty(rows_of(A.shape), outlier_cols.shape[0])


@define_op(
    "int8_mixed_scaled_mm(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, "
    "Tensor? bias=None) -> (Tensor, Tensor?)",
    check=check_int8_mixed_scaled_mm,
    fake=fake_int8_mixed_scaled_mm,
)
def int8_mixed_scaled_mm(
    A: torch.Tensor,
    CA: torch.Tensor,
    CB: torch.Tensor,
    SCA: torch.Tensor,
    SCB: torch.Tensor,
    outlier_cols: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Product of int8 matrices plus that of the outlier columns in floating point.

    Args:
        A: the values that ``CA`` was quantized from, shape ``(..., K)``.
        CA: int8 codes of ``A``, zero in the outlier columns.
        CB: int8 weight, shape ``(N, K)``.
        SCA: float32 absmax per row of ``A``.
        SCB: float32 absmax per row of the weight.
        outlier_cols: indices of the outlier columns, or ``None``.
        bias: shape ``(N,)`` or ``None``.

    Returns:
        ``(product, outliers)``: shape ``(..., N)`` in the dtype of ``A``, and the outlier columns of
        ``A`` as a matrix, or ``None`` where ``outlier_cols`` is ``None``.
    """
    if outlier_cols is None:
        return int8_scaled_mm(CA, CB, SCA, SCB, bias, A.dtype), None
    # The sum of both parts is rounded once; float16 could overflow in between.
    product = int8_scaled_mm(CA, CB, SCA, SCB, bias, torch.float32)
    outliers = as_rows(A)[:, outlier_cols]
    weight = int8_vectorwise_dequant(CB[:, outlier_cols], SCB)
    correction = torch.nn.functional.linear(outliers.float(), weight).reshape(product.shape)
    return (product + correction).to(A.dtype), outliers


def check_int8_linear(
    A: torch.Tensor,
    CB: torch.Tensor,
    SCB: torch.Tensor,
    threshold: float = 0.0,
    bias: torch.Tensor | None = None,
) -> None:
    """Check the arguments of ``int8_linear``."""
    op = "int8_linear"
    check_float(op, "A", A)
    check_matrix_like(op, "A", A)
    check_dtype(op, "CB", CB, (torch.int8,))
    check_that(op, CB.dim() == 2, lambda: f"CB has shape {tuple(CB.shape)}, expected a matrix (N, K)")
    check_that(
        op,
        A.shape[-1] == CB.shape[1],
        lambda: f"A has shape {tuple(A.shape)}, expected {CB.shape[1]} input features in its last dimension",
    )
    check_dtype(op, "SCB", SCB, (torch.float32,))
    check_numel(op, "SCB", SCB, CB.shape[0], "one absmax per row of CB")
    check_threshold(op, threshold)
    check_bias(op, bias, CB.shape[0])
    check_same_device(op, A=A, CB=CB, SCB=SCB, bias=bias)


def outputs_int8_linear(
    A: torch.Tensor,
    CB: torch.Tensor,
    SCB: torch.Tensor,
    threshold: float = 0.0,
    bias: torch.Tensor | None = None,
) -> tuple[TensorSpec, ...]:
    """Rows of N features."""
    return (TensorSpec((*A.shape[:-1], CB.shape[0]), A.dtype),)


@define_op(
    "int8_linear(Tensor A, Tensor CB, Tensor SCB, float threshold=0.0, Tensor? bias=None) -> Tensor",
    check=check_int8_linear,
    outputs=outputs_int8_linear,
)
def int8_linear(
    A: torch.Tensor,
    CB: torch.Tensor,
    SCB: torch.Tensor,
    threshold: float = 0.0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The whole forward of an LLM.int8() layer: quantize, multiply, scale, outliers, bias.

    No result depends on data in its shape, so that a caller need not wait for the device and the op
    can be captured in a graph.

    Args:
        A: shape ``(..., K)``, float32, float16 or bfloat16.
        CB: int8 weight, shape ``(N, K)``.
        SCB: float32 absmax per row of the weight.
        threshold: magnitude from which a value of ``A`` makes its column an outlier column, which is
            multiplied in floating point; 0 turns the decomposition off.
        bias: shape ``(N,)`` or ``None``.

    Returns:
        Shape ``(..., N)`` in the dtype of ``A``.
    """
    CA, SCA, outlier_columns = int8_vectorwise_quant(A, threshold)
    return int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, outlier_columns, bias)[0]
