"""Quantization to int8 by rows and by columns at once, against float64, over sizes, layouts and special values."""

from __future__ import annotations

import pytest
import torch

import bitsandbytes.functional as F

pytestmark = pytest.mark.gpu

#: Vectors of 8 columns and single ones, several bands of rows, groups of rows that are not whole.
SIZES = [(1, 8), (3, 1), (33, 40), (31, 2056), (300, 2047), (2500, 136), (1057, 4100), (9000, 264)]


def truth_of(values: torch.Tensor, threshold: float) -> tuple[torch.Tensor, ...]:
    """Exact quotients by rows and by columns, absmax of both, and the outlier columns."""
    exact = values.double()
    outliers = exact.abs() >= threshold if threshold else torch.zeros_like(exact, dtype=torch.bool)
    inliers = exact.masked_fill(outliers | exact.isnan(), 0.0)
    columns = outliers.any(0)
    rows_absmax, columns_absmax = inliers.abs().amax(1), inliers.abs().amax(0)
    by_rows = (inliers / rows_absmax[:, None] * 127).nan_to_num().masked_fill(columns, 0.0)
    by_columns = (inliers / columns_absmax * 127).nan_to_num()
    return by_rows, by_columns, rows_absmax, columns_absmax, columns.nonzero().flatten()


def check(values: torch.Tensor, threshold: float) -> None:
    """Codes within half a step (and rounding in float32) of the quotients, statistics and columns exactly."""
    by_rows, by_columns, rows_absmax, columns_absmax, columns = truth_of(values, threshold)
    row_codes, column_codes, row_stats, column_stats, listed = F.int8_double_quant(values, threshold=threshold)
    assert torch.equal(row_stats.double(), rows_absmax)
    assert torch.equal(column_stats.double(), columns_absmax)
    assert (row_codes.double() - by_rows).abs().max() <= 0.5 + 1e-4
    assert (column_codes.double() - by_columns).abs().max() <= 0.5 + 1e-4
    if threshold:
        assert torch.equal(listed, columns)
    else:
        assert listed is None


@pytest.mark.parametrize("threshold", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_double_quant(rows, columns, dtype, threshold):
    torch.manual_seed(rows)
    check(torch.randn(rows, columns, device="cuda", dtype=dtype), threshold)


@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_double_quant_of_special_values(threshold):
    torch.manual_seed(0)
    values = torch.randn(70, 96, device="cuda")
    values[3], values[:, 5] = 0.0, 0.0
    values[7, 11] = float("nan")
    # Their reciprocals are infinite in float32.
    values[:, 17] *= 1e-40
    values[20] *= 1e-40
    if threshold:
        values[60, 40], values[61, 41] = float("inf"), -float("inf")
        values[:, 50] = 100.0
    check(values, threshold)


def test_double_quant_equals_quantization_by_rows_and_of_the_transpose():
    torch.manual_seed(1)
    values = torch.randn(515, 1000, device="cuda", dtype=torch.float16)
    row_codes, column_codes, row_stats, column_stats, _ = F.int8_double_quant(values)
    codes, stats, _ = F.int8_vectorwise_quant(values)
    assert torch.equal(codes, row_codes)
    assert torch.equal(stats, row_stats)
    codes, stats, _ = F.int8_vectorwise_quant(values.t().contiguous())
    assert torch.equal(codes.t(), column_codes)
    assert torch.equal(stats, column_stats)


def test_double_quant_without_rows():
    row_codes, column_codes, row_stats, column_stats, listed = F.int8_double_quant(
        torch.empty(0, 24, device="cuda", dtype=torch.float16), threshold=6.0
    )
    assert row_codes.shape == column_codes.shape == (0, 24)
    assert row_stats.shape == (0,)
    assert torch.equal(column_stats, torch.zeros(24, device="cuda"))
    assert listed.numel() == 0
