"""int8 products whose activations have any number of outlier columns: few are gathered, many multiplied in place."""

from __future__ import annotations

import pytest
import torch

import bitsandbytes.functional as F

pytestmark = pytest.mark.gpu

THRESHOLD = 6.0
#: Relative error in the norm of a result that is rounded to the dtype once.
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 3e-6}
ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 64, 65, 129, 300)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def weight_of(n, k):
    """Codes, absmax, and what they stand for."""
    codes, absmax, _ = F.int8_vectorwise_quant(torch.randn(n, k, device="cuda", dtype=torch.float16) * 0.05)
    return codes, absmax, codes.double() * absmax.double()[:, None] / 127


def activations(rows, k, columns, dtype):
    """Values below the threshold but for one, in a row of its own, of each of so many columns."""
    x = torch.randn(rows, k, device="cuda").clamp(-5, 5)
    chosen = torch.randperm(k, device="cuda")[:columns]
    x[torch.randint(rows, (columns,), device="cuda"), chosen] = 8.0 + 10 * torch.rand(columns, device="cuda")
    return x.to(dtype)


def expected(x, weight):
    """The columns with outliers as they are, the others by their codes."""
    codes, absmax, listed = F.int8_vectorwise_quant(x, threshold=THRESHOLD)
    product = (codes.double() * absmax.double()[:, None] / 127) @ weight.t()
    return product + x[:, listed].double() @ weight[:, listed].t(), listed


def relative_error(result, truth):
    return ((result.double() - truth).norm() / truth.norm()).item()


SIZES = pytest.mark.parametrize(
    ("n", "k"), [(64, 128), (100, 272), (77, 1104), (4100, 1088), (512, 4096), (14336, 512)]
)


def check_any_number_of_outlier_columns(n, k, dtype, all_rows):
    from bnb_cuda import _C

    codes, absmax, weight = weight_of(n, k)
    # On both sides of the numbers from which on they are multiplied in place, and of one stage of a product.
    room = _C.gathered_room(k)
    numbers = {1, 32, 33, 64, 65, room, room + 1, k // 2, k}
    for columns in sorted(number for number in numbers if number <= k):
        for rows in all_rows:
            x = activations(rows, k, columns, dtype)
            truth, listed = expected(x, weight)
            assert len(listed) == columns
            bias = torch.randn(n, device="cuda", dtype=dtype) if rows % 2 else None
            if bias is not None:
                truth += bias.double()
            result = torch.ops.bitsandbytes.int8_linear(x, codes, absmax, THRESHOLD, bias)
            error = relative_error(result, truth)
            assert error < TOLERANCE[dtype], (rows, columns, error)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@SIZES
def test_any_number_of_outlier_columns(n, k, dtype):
    check_any_number_of_outlier_columns(n, k, dtype, ROWS)


@pytest.mark.parametrize("path", ["FEW", "GROUPS"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@SIZES
def test_few_rows_by_kernels_that_others_win_over(n, k, dtype, path, monkeypatch):
    """Those of other cards, and of other numbers of rows."""
    from bnb_cuda.tuning import Int8Path

    for name in ("int8.plan", "int8_linear.linear_plan"):
        monkeypatch.setattr(f"bnb_cuda.{name}", lambda *sizes: Int8Path[path])
    check_any_number_of_outlier_columns(n, k, dtype, [rows for rows in ROWS if rows <= 16])


@pytest.mark.parametrize(
    ("k", "rows"),
    [
        *((14336, 64), (14336, 65), (4096, 224), (4096, 225)),
        *((14336, 146), (14336, 147), (16384, 128), (16384, 129), (1024, 256), (1024, 257)),
        *((16384, 1), (16400, 1), (16400, 40), (264, 40)),
    ],
)
def test_outlier_columns_are_found_in_any_number_of_rows(k, rows):
    """On both sides of the sizes up to which a product merges the flags of rows, up to which rows keep flags of their
    own, and of those that fit a thread block."""
    codes, absmax, weight = weight_of(64, k)
    for columns in (0, 5, k // 20, k):
        x = activations(rows, k, columns, torch.float16)
        truth, listed = expected(x, weight)
        assert len(listed) == columns
        result = torch.ops.bitsandbytes.int8_linear(x, codes, absmax, THRESHOLD, None)
        assert relative_error(result, truth) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(("k", "columns"), [(1040, 64), (1040, 128), (2048, 250)])
def test_outlier_columns_that_lie_together(k, columns, at_end):
    """More of a stage of 128 columns than a panel has."""
    n, rows = 200, 130
    codes, absmax, weight = weight_of(n, k)
    x = torch.randn(rows, k, device="cuda").clamp(-5, 5)
    places = torch.arange(columns, device="cuda") + (k - columns if at_end else 0)
    x[torch.arange(columns, device="cuda") % rows, places] = 9.0
    x = x.half()
    truth, listed = expected(x, weight)
    assert len(listed) == columns
    result = torch.ops.bitsandbytes.int8_linear(x, codes, absmax, THRESHOLD, None)
    assert relative_error(result, truth) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("columns", [3, 700])
@pytest.mark.parametrize("rows", ROWS)
def test_values_that_are_not_finite_stay_where_they_belong(rows, columns):
    n, k, dtype = 256, 1024, torch.bfloat16
    codes, absmax, weight = weight_of(n, k)
    x = activations(rows, k, columns, dtype)
    _, listed = expected(x, weight)
    others = [column for column in range(k) if column not in set(listed.tolist())]
    # A NaN is no outlier, and its code is 0.
    x[rows // 2, others[0]] = torch.nan
    truth, _ = expected(x, weight)
    result = torch.ops.bitsandbytes.int8_linear(x, codes, absmax, THRESHOLD, None)
    assert relative_error(result, truth) < TOLERANCE[dtype]
    # An infinity is an outlier; its row shows it and no other does.
    x[rows - 1, others[1]] = torch.inf
    result = torch.ops.bitsandbytes.int8_linear(x, codes, absmax, THRESHOLD, None)
    signs = weight[:, others[1]].sign()
    assert torch.equal(result[rows - 1][signs != 0].double(), (torch.inf * signs)[signs != 0])
    if rows > 1:
        truth, _ = expected(x, weight)
        assert relative_error(result[: rows - 1], truth[: rows - 1]) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 12, 40])
@pytest.mark.parametrize(("k", "number", "different"), [(512, 300, 200), (16, 40, 16), (64, 33, 5)])
def test_listed_columns_count_as_often_as_they_are_listed(k, number, different, rows):
    n = 128
    codes, absmax, weight = weight_of(n, k)
    x = torch.randn(rows, k, device="cuda", dtype=torch.float16)
    x_codes, x_absmax, _ = F.int8_vectorwise_quant(x)
    listed = torch.arange(number, device="cuda") % different
    result, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(x, x_codes, codes, x_absmax, absmax, listed, None)
    truth = (x_codes.double() * x_absmax.double()[:, None] / 127) @ weight.t()
    truth += x[:, listed].double() @ weight[:, listed].t()
    assert relative_error(result, truth) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("rows", [4, 40, 400])
def test_number_of_outlier_columns_may_change_in_a_graph(rows):
    codes, absmax, weight = weight_of(512, 2048)
    held = activations(rows, 2048, 0, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    torch.ops.bitsandbytes.int8_linear(held, codes, absmax, THRESHOLD, None)
    with torch.cuda.graph(graph):
        result = torch.ops.bitsandbytes.int8_linear(held, codes, absmax, THRESHOLD, None)
    for columns in (0, 2, 2048, 50, 200, 0):
        held.copy_(activations(rows, 2048, columns, torch.bfloat16))
        graph.replay()
        assert relative_error(result, expected(held, weight)[0]) < TOLERANCE[torch.bfloat16]
