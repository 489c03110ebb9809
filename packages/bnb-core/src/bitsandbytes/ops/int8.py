"""Row-wise int8 quantization of LLM.int8().

Each row is scaled so that its largest magnitude (absmax) becomes 127 and rounded to integers
(Dettmers et al. 2022, arXiv:2208.07339, section 2). With a threshold, columns that hold an
outlier, a magnitude of at least the threshold, are left to floating point arithmetic: outliers do
not count in absmax, and their columns are zero in the result (section 3.2).
"""

from __future__ import annotations

import torch

from bitsandbytes.codebooks import follows_cpu
from bitsandbytes.contract import TensorSpec, check_dtype, check_same_device, check_that, define_op
from bitsandbytes.ops.common import as_rows, check_float, check_numel, rows_of

#: The largest int8 code that a scaled value takes; -128 is never produced.
LARGEST_CODE = 127.0


def check_threshold(op: str, threshold: float) -> None:
    """Raise unless the outlier threshold is a number from 0; 0 means no decomposition."""
    check_that(op, threshold >= 0.0, lambda: f"threshold is {threshold}, expected a number from 0 (0 turns it off)")


def check_matrix_like(op: str, name: str, tensor: torch.Tensor) -> None:
    """Raise for a scalar, which has no rows."""
    check_that(op, tensor.dim() >= 1, lambda: f"{name} is a scalar, expected at least one dimension")


def check_int8_vectorwise_quant(A: torch.Tensor, threshold: float = 0.0) -> None:
    """Check the arguments of ``int8_vectorwise_quant``."""
    check_float("int8_vectorwise_quant", "A", A)
    check_matrix_like("int8_vectorwise_quant", "A", A)
    check_threshold("int8_vectorwise_quant", threshold)


def fake_outlier_columns(A: torch.Tensor, threshold: float) -> torch.Tensor | None:
    """A vector of columns whose length depends on data, or ``None`` without a threshold."""
    if threshold == 0.0:
        return None
    count = torch.library.get_ctx().new_dynamic_size()
    return A.new_empty(count, dtype=torch.int64)


def fake_int8_vectorwise_quant(
    A: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Shapes of the results on fake tensors."""
    stats = A.new_empty(rows_of(A.shape), dtype=torch.float32)
    return torch.empty(A.shape, dtype=torch.int8, device=A.device), stats, fake_outlier_columns(A, threshold)


@define_op(
    "int8_vectorwise_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)",
    check=check_int8_vectorwise_quant,
    fake=fake_int8_vectorwise_quant,
)
def int8_vectorwise_quant(
    A: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize each row to int8.

    Args:
        A: shape ``(..., K)``, float32, float16 or bfloat16. It is not modified.
        threshold: magnitude from which a value is an outlier; 0 turns the decomposition off.

    Returns:
        ``(codes, absmax, outlier_columns)``: int8 in the shape of ``A``; float32 of shape
        ``(rows,)``; and, with a threshold, the ascending int64 indices of the columns that hold an
        outlier (possibly none), else ``None``.
    """
    values = as_rows(A)
    outlier_columns = None
    if threshold > 0.0:
        is_outlier = values.abs() >= threshold
        outlier_columns = torch.argwhere(is_outlier.any(dim=0)).reshape(-1)
        values = values.masked_fill(is_outlier, 0.0)
    codes, absmax = quantize_along(values, dim=1)
    if outlier_columns is not None:
        codes[:, outlier_columns] = 0
    return codes.reshape(A.shape), absmax, outlier_columns


def quantize_along(values: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of a matrix with one absmax per row (``dim=1``) or per column (``dim=0``)."""
    values = values.float()
    magnitudes = values.abs()
    if not follows_cpu(values.device):
        # GPUs leave NaN out of absmax; on the CPU it spoils its row.
        magnitudes = magnitudes.nan_to_num(nan=0.0, posinf=torch.inf)
    absmax = magnitudes.amax(dim=dim) if values.shape[dim] else values.new_zeros(values.shape[1 - dim])
    scale = (LARGEST_CODE / absmax).unsqueeze(dim)
    # Below 127 / FLT_MAX the scale overflows; dividing first does not.
    scaled = torch.where(scale.isinf(), values / absmax.unsqueeze(dim) * LARGEST_CODE, values * scale)
    # A row of zeros, or with NaN or infinity, scales to NaN; its codes are 0.
    return scaled.nan_to_num(nan=0.0).round().to(torch.int8), absmax


def check_int8_vectorwise_dequant(A: torch.Tensor, stats: torch.Tensor) -> None:
    """Check the arguments of ``int8_vectorwise_dequant``."""
    op = "int8_vectorwise_dequant"
    check_dtype(op, "A", A, (torch.int8,))
    check_matrix_like(op, "A", A)
    check_float(op, "stats", stats)
    check_numel(op, "stats", stats, rows_of(A.shape), "one absmax per row of A")
    check_same_device(op, A=A, stats=stats)


def outputs_int8_vectorwise_dequant(A: torch.Tensor, stats: torch.Tensor) -> tuple[TensorSpec, ...]:
    """Values in the shape of ``A``."""
    return (TensorSpec(A.shape, torch.float32),)


@define_op(
    "int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor",
    check=check_int8_vectorwise_dequant,
    outputs=outputs_int8_vectorwise_dequant,
)
def int8_vectorwise_dequant(A: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    """Multiply int8 codes by the scale of their row.

    Args:
        A: int8 codes, shape ``(..., K)``.
        stats: absmax of each row, one per row.

    Returns:
        ``A * stats * (1 / 127)``, float32 in the shape of ``A``, multiplied in this order.
    """
    return A * stats.reshape(*A.shape[:-1], 1).float() * (1.0 / LARGEST_CODE)


def check_int8_double_quant(A: torch.Tensor, threshold: float = 0.0) -> None:
    """Check the arguments of ``int8_double_quant``."""
    check_float("int8_double_quant", "A", A)
    check_matrix_like("int8_double_quant", "A", A)
    check_threshold("int8_double_quant", threshold)


def fake_int8_double_quant(
    A: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Shapes of the results on fake tensors."""
    codes = torch.empty(A.shape, dtype=torch.int8, device=A.device)
    row_stats = A.new_empty(rows_of(A.shape), dtype=torch.float32)
    column_stats = A.new_empty(A.shape[-1], dtype=torch.float32)
    return codes, torch.empty_like(codes), row_stats, column_stats, fake_outlier_columns(A, threshold)


@define_op(
    "int8_double_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
    check=check_int8_double_quant,
    fake=fake_int8_double_quant,
)
def int8_double_quant(
    A: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize to int8 with a scale per row, and once more with a scale per column.

    Args:
        A: shape ``(..., K)``, float32, float16 or bfloat16.
        threshold: magnitude from which a value is an outlier; 0 turns the decomposition off.

    Returns:
        ``(row_codes, column_codes, row_absmax, column_absmax, outlier_columns)``: int8 in the shape
        of ``A`` twice, float32 of shape ``(rows,)`` and ``(K,)``, and the outlier columns as in
        ``int8_vectorwise_quant``. Outliers count in neither absmax; their columns are zero in the
        row codes, and the outliers themselves are zero in the column codes.
    """
    row_codes, row_absmax, outlier_columns = int8_vectorwise_quant(A, threshold)
    values = as_rows(A)
    if threshold > 0.0:
        values = values.masked_fill(values.abs() >= threshold, 0.0)
    column_codes, column_absmax = quantize_along(values, dim=0)
    return row_codes, column_codes.reshape(A.shape), row_absmax, column_absmax, outlier_columns
