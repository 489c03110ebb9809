"""int8 quantization and products: integers exactly, floats against float64, on every instruction set."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitsandbytes.contract import OPS
from bitsandbytes.testing.tolerances import same_bits

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
OPERATIONS = torch.ops.bitsandbytes
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 25, 33, 48, 49, 70)
#: (N, K) around every width of a step: 1, 2, 4, 16, 32 and 64 elements, and of a panel.
WEIGHTS = (
    (1, 1),
    (3, 2),
    (5, 3),
    (2, 15),
    (9, 31),
    (13, 33),
    (7, 63),
    (64, 64),
    (66, 65),
    (33, 130),
    (11, 576),
    (5, 2100),
)
# The fixture only names the instruction set, which stays for all examples.
properties = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=(1, 2, 3))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def codes(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """All int8 values, -128 too."""
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


# --- quantization -----------------------------------------------------------------------------------


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    """Matrices of any size: normal values of any scale, or any bit patterns at all."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, width, dtype = draw(st.integers(0, 40)), draw(st.integers(0, 300)), draw(st.sampled_from(DTYPES))
    if draw(st.booleans()):
        scale = 10.0 ** draw(st.integers(-44, 37))
        return (torch.randn(rows, width, generator=generator) * scale).to(dtype)
    raw = torch.randint(0, 256, (rows * width * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(rows, width)


def assert_reference_bits(op: str, *arguments: object) -> None:
    results, expected = OPS[op].overload(*arguments), OPS[op].reference(*arguments)
    for position, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        if wanted is None:
            assert result is None
        else:
            assert same_bits(result, wanted), f"result {position} of {op} differs"


@properties
@given(x=matrices(), threshold=st.sampled_from((0.0, 1e-9, 0.3, 2.5, 6.0, 6.01, 1e6, float("inf"))))
def test_quantization(isa: str, x: torch.Tensor, threshold: float) -> None:
    assert_reference_bits("int8_vectorwise_quant", x, threshold)
    assert_reference_bits("int8_double_quant", x, threshold)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_round_to_even(isa: str, dtype: torch.dtype) -> None:
    # absmax 127 makes the scale 1: values with a half lie on ties.
    x = torch.arange(-127, 127.5, 0.5)
    x = torch.cat((x, torch.tensor([127.0]))).to(dtype).reshape(1, -1)
    assert_reference_bits("int8_vectorwise_quant", x, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_large_quantization(
    isa: str, threads: int, threshold: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = torch.randn(201, 1029, generator=generator).to(dtype)
    x[17, 3] = float("nan")
    x[40, 1028] = float("inf")
    x[41] = 0.0
    assert_reference_bits("int8_vectorwise_quant", x, threshold)
    assert_reference_bits("int8_double_quant", x.t(), threshold)
    assert_reference_bits("int8_vectorwise_quant", x[::3, 5::2], threshold)
    assert_reference_bits("int8_vectorwise_quant", x.reshape(3, 67, 1029), threshold)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (5, 7, 33), (64, 640)])
def test_dequantization(isa: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> None:
    values = codes(*shape, generator=generator)
    stats = torch.rand(values.shape[:-1].numel(), generator=generator).to(dtype)
    wanted = OPS["int8_vectorwise_dequant"].reference(values, stats)
    assert same_bits(OPERATIONS.int8_vectorwise_dequant(values, stats), wanted)


# --- exact products ---------------------------------------------------------------------------------


def exact_product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Every sum of int8 products is exact in float64."""
    return (A.double() @ B.double().t()).long()


@pytest.mark.parametrize(("out_features", "in_features"), WEIGHTS)
def test_products_are_exact(isa: str, out_features: int, in_features: int, generator: torch.Generator) -> None:
    B = codes(out_features, in_features, generator=generator)
    for rows in ROWS:
        A = codes(rows, in_features, generator=generator)
        result = OPERATIONS.int8_linear_matmul(A, B)
        assert result.dtype == torch.int32
        assert torch.equal(result.long(), exact_product(A, B)), f"{rows} rows"


@pytest.mark.parametrize("rows", [1, 4, 8, 17])
@pytest.mark.parametrize(("left", "right"), [(-128, -128), (127, -128), (-128, 127), (127, 127)])
def test_no_saturation(isa: str, rows: int, left: int, right: int) -> None:
    # The largest inner size whose sums fit: 131071 * 128**2 is just below 2**31.
    A = torch.full((rows, 131071), left, dtype=torch.int8)
    B = torch.full((3, 131071), right, dtype=torch.int8)
    result = OPERATIONS.int8_linear_matmul(A, B)
    assert torch.equal(result, torch.full((rows, 3), left * right * 131071, dtype=torch.int32))


@pytest.mark.parametrize("rows", [1, 8, 40])
def test_threads_and_layouts(isa: str, threads: int, rows: int, generator: torch.Generator) -> None:
    A, B = codes(rows, 2 * 700, generator=generator)[:, ::2], codes(700, 1030, generator=generator).t()
    wanted = exact_product(A, B)
    assert torch.equal(OPERATIONS.int8_linear_matmul(A, B).long(), wanted)
    assert torch.equal(OPERATIONS.int8_linear_matmul(A.reshape(rows, 1, 700), B).long(), wanted.unsqueeze(1))
    wide = torch.full((rows, 2060), 77, dtype=torch.int32)
    OPERATIONS.int8_linear_matmul.out(A, B, wide[:, 1::2])
    assert torch.equal(wide[:, 1::2].long(), wanted)
    assert bool((wide[:, ::2] == 77).all())


@pytest.mark.parametrize(
    ("rows", "out_features", "in_features"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0), (30, 3, 0)]
)
def test_empty_products(isa: str, rows: int, out_features: int, in_features: int) -> None:
    A, B = torch.ones(rows, in_features, dtype=torch.int8), torch.ones(out_features, in_features, dtype=torch.int8)
    result = OPERATIONS.int8_linear_matmul(A, B)
    assert torch.equal(result, torch.zeros(rows, out_features, dtype=torch.int32))
    X, bias = torch.ones(rows, in_features), torch.ones(out_features)
    for threshold in (0.0, 0.5):
        assert torch.equal(OPERATIONS.int8_linear(X, B, bias, threshold, bias), torch.ones(rows, out_features))


# --- products in floating point ---------------------------------------------------------------------


def scaled_truth(
    A: torch.Tensor,
    CA: torch.Tensor,
    CB: torch.Tensor,
    SCA: torch.Tensor,
    SCB: torch.Tensor,
    columns: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact result, and the sum of the magnitudes of its three terms."""
    integer = (CA.double() @ CB.double().t()) * SCA.double().unsqueeze(1) * SCB.double() / 127.0**2
    truth, size = integer, integer.abs()
    if columns is not None:
        weight = CB[:, columns].double() * SCB.double().unsqueeze(1) / 127.0
        outliers = A[:, columns].double()
        truth, size = truth + outliers @ weight.t(), size + outliers.abs() @ weight.abs().t()
    if bias is not None:
        truth, size = truth + bias.double(), size + bias.double().abs()
    return truth, size


def assert_close(result: torch.Tensor, truth: torch.Tensor, size: torch.Tensor, columns: int) -> None:
    """Scales, bias and ``columns`` outliers each err by a few units of float32, the result once in its dtype."""
    assert result.shape == truth.shape
    unit = UNIT[result.dtype]
    bound = size * (columns + 8) * 2.0**-24 + truth.abs() * unit * 1.01 + 2.0**-25
    excess = (result.double() - truth).abs() - bound
    assert bool((excess <= 0).all()), f"an element is {float(excess.max()):.3g} beyond its bound"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_features", "in_features"), WEIGHTS)
def test_layers(isa: str, out_features: int, in_features: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    weight = torch.randn(out_features, in_features, generator=generator)
    CB, SCB = OPS["int8_vectorwise_quant"].reference(weight)[:2]
    for rows, with_bias in zip(ROWS, itertools.cycle((False, True)), strict=False):
        A = torch.randn(rows, in_features, generator=generator)
        A[rows // 2, in_features // 2] = 30.0
        A[:, 0] *= 9.0
        A = A.to(dtype)
        bias = torch.randn(out_features, generator=generator) if with_bias else None
        for threshold in (0.0, 6.0):
            CA, SCA, columns = OPS["int8_vectorwise_quant"].reference(A, threshold)
            truth, size = scaled_truth(A, CA, CB, SCA, SCB, columns, bias)
            count = 0 if columns is None else len(columns)
            fused = OPERATIONS.int8_linear(A, CB, SCB, threshold, bias)
            assert fused.dtype == dtype
            assert_close(fused, truth, size, count)
            mixed, outliers = OPERATIONS.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, columns, bias)
            assert same_bits(mixed, fused)
            if columns is None:
                assert outliers is None
                assert same_bits(OPERATIONS.int8_scaled_mm(CA, CB, SCA, SCB, bias, dtype), fused)
                sums = OPERATIONS.int8_linear_matmul(CA, CB)
                assert same_bits(OPERATIONS.int8_mm_dequant(sums, SCA, SCB, dtype, bias), fused)
            else:
                assert torch.equal(outliers, A[:, columns])


@pytest.mark.parametrize("rows", [1, 6, 40])
def test_outlier_columns_as_given(isa: str, rows: int, generator: torch.Generator) -> None:
    A = torch.randn(rows, 96, generator=generator)
    CB, SCB = OPS["int8_vectorwise_quant"].reference(torch.randn(20, 96, generator=generator))[:2]
    CA, SCA = OPS["int8_vectorwise_quant"].reference(A)[:2]
    for columns in (
        torch.tensor([5, 95, 5]),
        torch.tensor([-1, 0], dtype=torch.int32),
        torch.zeros(0, dtype=torch.int64),
    ):
        truth, size = scaled_truth(A, CA, CB, SCA, SCB, columns.long(), None)
        product, outliers = OPERATIONS.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, columns)
        assert_close(product, truth, size, len(columns))
        assert torch.equal(outliers, A[:, columns])
    with pytest.raises(IndexError):
        OPERATIONS.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, torch.tensor([96]))


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(
    isa: str, value: float, threshold: float, dtype: torch.dtype, rows: int, generator: torch.Generator
) -> None:
    CB, SCB = OPS["int8_vectorwise_quant"].reference(torch.randn(20, 70, generator=generator))[:2]
    CB[:, 69] = torch.where(CB[:, 69] == 0, 1, CB[:, 69])
    A = torch.randn(rows, 70, generator=generator).to(dtype)
    A[rows // 2, 69] = value
    result = OPERATIONS.int8_linear(A, CB, SCB, threshold)
    wanted = torch.zeros(rows, dtype=torch.bool)
    wanted[rows // 2] = True
    # A row with a value that is not finite has no finite result, and no other row is touched.
    assert torch.equal(result.isfinite().logical_not().all(1), wanted)
    assert torch.equal(result.isfinite().logical_not().any(1), wanted)
    assert torch.equal(result.isfinite(), OPS["int8_linear"].reference(A, CB, SCB, threshold).isfinite())


def test_threads_do_not_change_a_layer(isa: str, threads: int, generator: torch.Generator) -> None:
    CB, SCB = OPS["int8_vectorwise_quant"].reference(torch.randn(1030, 577, generator=generator))[:2]
    for rows in (1, 8, 70):
        A = torch.randn(rows, 577, generator=generator) * 3
        result = OPERATIONS.int8_linear(A, CB, SCB, 6.0)
        CA, SCA, columns = OPS["int8_vectorwise_quant"].reference(A, 6.0)
        assert_close(result, *scaled_truth(A, CA, CB, SCA, SCB, columns, None), len(columns))
        torch.set_num_threads(1)
        assert same_bits(OPERATIONS.int8_linear(A, CB, SCB, 6.0), result)
        torch.set_num_threads(threads)


def test_float16_does_not_overflow_between(isa: str) -> None:
    # The integer part alone is beyond float16; with the outliers the result is within.
    A = torch.full((2, 64), 60.0, dtype=torch.float16)
    A[:, 0] = -65000.0
    weight = torch.full((3, 64), 30.0)
    weight[:, 0] = 1.0
    CB, SCB = OPS["int8_vectorwise_quant"].reference(weight)[:2]
    CA, SCA, columns = OPS["int8_vectorwise_quant"].reference(A, 1000.0)
    truth, size = scaled_truth(A, CA, CB, SCA, SCB, columns, None)
    assert float((CA.double() @ CB.double().t() * 60 * 30 / 127**2).max()) > 65504
    assert_close(OPERATIONS.int8_linear(A, CB, SCB, 1000.0), truth, size, 1)
