"""Products with a 4-bit weight against float64, element by element, on every instruction set.

The bound on one element of ``A @ W.T``, with S the sum of the magnitudes of its products:

* summing K products in float32 errs by at most about K units of 2**-24 of S, in any order;
* the contract lets a kernel round the weight to the dtype of A, which errs by its unit roundoff of S;
* the result is rounded once to that dtype, with a result below its normal numbers off by half a step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from bitsandbytes.codebooks import code_4bit, create_dynamic_map
from bitsandbytes.contract import OPS
from bitsandbytes.ops.fourbit import decode_4bit, expand_absmax
from bitsandbytes.testing.tolerances import same_bits

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST_STEP = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
CPU = torch.device("cpu")
OPERATIONS = torch.ops.bitsandbytes

#: Rows of A on both sides of every change of strategy, for vectors of 1, 4, 8 and 16 lanes.
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 25, 33, 47, 48, 49, 70)
#: (N, K, blocksize): whole and partial groups, blocks inside, across and beyond rows, odd sizes.
WEIGHTS = (
    (1, 1, 2),
    (3, 2, 64),
    (5, 8, 8),
    (7, 72, 8),
    (13, 96, 32),
    (2, 64, 64),
    (65, 128, 64),
    (33, 130, 64),
    (9, 131, 32),
    (17, 192, 16),
    (40, 576, 64),
    (18, 576, 8),
    (21, 320, 128),
    (200, 72, 32),
    (18, 200, 128),
    (10, 520, 2**62),
    (6, 264, 96),
    (11, 2056, 256),
    (4, 4104, 4096),
)


class Weight:
    """A random packed weight with its exact values."""

    def __init__(
        self, shape: tuple[int, int], blocksize: int, quant_type: str, nested: bool, generator: torch.Generator
    ) -> None:
        values = torch.randn(shape, generator=generator) * 0.1
        self.shape, self.blocksize, self.quant_type = shape, blocksize, quant_type
        self.packed, self.absmax = OPS["quantize_4bit"].reference(values, blocksize, quant_type, torch.uint8)
        self.statistics: tuple[torch.Tensor | None, ...] = (None, None, None)
        if nested:
            code, offset = create_dynamic_map(), self.absmax.mean()
            codes, self.absmax = OPS["quantize_blockwise"].reference(self.absmax - offset, code, 256)
            self.statistics = (codes, code, offset)

    def exact(self) -> torch.Tensor:
        expanded = expand_absmax(self.absmax, *self.statistics)
        return decode_4bit(self.packed, code_4bit(self.quant_type, CPU), expanded, self.blocksize, self.shape).double()

    def times(self, A: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return OPERATIONS.gemm_4bit(
            A, self.packed, self.shape, self.absmax, self.blocksize, self.quant_type, bias, *self.statistics
        )

    def times_transposed(self, A: torch.Tensor) -> torch.Tensor:
        return OPERATIONS.gemm_4bit_transposed(
            A, self.packed, self.shape, self.absmax, self.blocksize, self.quant_type, *self.statistics
        )


def assert_product(
    result: torch.Tensor, A: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """Compare with ``A @ weight + bias``, all in float64, under the bound above."""
    assert result.dtype == A.dtype
    assert result.shape == (*A.shape[:-1], weight.shape[1])
    values = A.double()
    truth, size = values @ weight, values.abs() @ weight.abs()
    if bias is not None:
        truth, size = truth + bias.double(), size + bias.double().abs()
    unit = UNIT[A.dtype]
    rounding_of_weight = 0.0 if A.dtype is torch.float32 else unit * 1.01
    summing = (A.shape[-1] + 8) * 2.0**-24
    bound = size * (rounding_of_weight + summing) + truth.abs() * unit * 1.01 + SMALLEST_STEP[A.dtype]
    excess = (result.double() - truth).abs() - bound
    assert bool((excess <= 0).all()), f"an element is {float(excess.max()):.3g} beyond its bound"


@pytest.fixture(params=(1, 2, 3))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("shape", "blocksize"), [((n, k), blocksize) for n, k, blocksize in WEIGHTS])
def test_products(isa: str, shape: tuple[int, int], blocksize: int, generator: torch.Generator) -> None:
    variants = itertools.cycle(itertools.product(("nf4", "fp4"), (False, True), (False, True)))
    for (rows, dtype), (quant_type, nested, with_bias) in zip(itertools.product(ROWS, DTYPES), variants, strict=False):
        weight = Weight(shape, blocksize, quant_type, nested, generator)
        A = torch.randn(rows, shape[1], generator=generator).to(dtype)
        bias = torch.randn(shape[0], generator=generator) if with_bias else None
        assert_product(weight.times(A, bias), A, weight.exact().t(), bias)
        G = torch.randn(rows, shape[0], generator=generator).to(dtype)
        assert_product(weight.times_transposed(G), G, weight.exact())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 16, 40])
@pytest.mark.parametrize("width", [576, 584])
def test_threads_do_not_change_bits(
    isa: str, threads: int, width: int, rows: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    # Large enough to be split, with a rest.
    weight = Weight((1030, width), 64, "nf4", True, generator)
    A = torch.randn(rows, width, generator=generator).to(dtype)
    G = torch.randn(rows, 1030, generator=generator).to(dtype)
    results = weight.times(A), weight.times_transposed(G)
    assert_product(results[0], A, weight.exact().t())
    assert_product(results[1], G, weight.exact())
    torch.set_num_threads(1)
    assert same_bits(results[0], weight.times(A))
    assert same_bits(results[1], weight.times_transposed(G))


@pytest.mark.parametrize("dtype", DTYPES)
def test_slabs(isa: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    # More rows than one slab of packed activations holds, and more than one block of sums.
    weight = Weight((5, 8192), 64, "nf4", False, generator)
    A = torch.randn(1200, 8192, generator=generator).to(dtype)
    assert_product(weight.times(A), A, weight.exact().t())
    wide = Weight((8192, 24), 64, "fp4", False, generator)
    assert_product(wide.times_transposed(A), A, wide.exact())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0)])
@pytest.mark.parametrize("rows", [0, 1, 20])
def test_empty(isa: str, rows: int, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> None:
    weight = Weight(shape, 64, "nf4", False, generator)
    bias = torch.randn(shape[0], generator=generator)
    result = weight.times(torch.ones(rows, shape[1], dtype=dtype), bias)
    assert torch.equal(result, bias.to(dtype).expand(rows, shape[0]))
    transposed = weight.times_transposed(torch.ones(rows, shape[0], dtype=dtype))
    assert torch.equal(transposed, torch.zeros(rows, shape[1], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 20])
def test_layouts(isa: str, rows: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    weight = Weight((24, 128), 64, "nf4", True, generator)
    A = torch.randn(rows, 128, generator=generator).to(dtype)
    expected = weight.times(A)
    strided = torch.randn(rows, 2, 256, generator=generator).to(dtype)[:, 1, ::2]
    strided.copy_(A)
    assert not strided.is_contiguous()
    assert same_bits(weight.times(strided), expected)
    assert same_bits(weight.times(A.reshape(1, rows, 1, 128)), expected.reshape(1, rows, 1, 24))
    G = torch.randn(24, rows, generator=generator).to(dtype).t()
    assert same_bits(weight.times_transposed(G), weight.times_transposed(G.contiguous()))
    for storage in (torch.int8, torch.float16, torch.bfloat16, torch.float32):
        weight.packed = weight.packed.reshape(-1).view(storage).unsqueeze(1)
        assert same_bits(weight.times(A), expected)
        weight.packed = weight.packed.t()
        assert same_bits(weight.times(A), expected)
        weight.packed = weight.packed.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("shape", [(16, 72), (5, 33), (7, 128), (20, 192)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rows", [1, 3, 8, 20])
def test_not_finite(
    isa: str, rows: int, value: float, dtype: torch.dtype, shape: tuple[int, int], generator: torch.Generator
) -> None:
    weight = Weight(shape, 32, "fp4", False, generator)
    A = torch.randn(rows, shape[1], generator=generator).to(dtype)
    clean = weight.times(A)
    A[rows // 2, -1] = value
    result = weight.times(A)
    others = torch.arange(rows) != rows // 2
    assert same_bits(result[others], clean[others])
    truth = A.double() @ weight.exact().t()
    assert torch.equal(result.isfinite(), truth.isfinite())
    A[rows // 2, -1] = 1.0
    weight.absmax[-1] = value
    result = weight.times(A)
    assert torch.equal(result.isfinite(), (A.double() @ weight.exact().t()).isfinite())
    G = torch.randn(rows, shape[0], generator=generator).to(dtype)
    truth = G.double() @ weight.exact()
    assert torch.equal(weight.times_transposed(G).isfinite(), truth.isfinite())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 9])
def test_outliers(isa: str, rows: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Activations far larger than their neighbours do not spoil these, whether the weight is zero there or not."""
    weight = Weight((9, 576), 64, "nf4", True, generator)
    A = torch.randn(rows, 576, generator=generator)
    A[:, 10::64] *= 1e4
    A = A.to(dtype)
    assert_product(weight.times(A), A, weight.exact().t())
    codes = weight.packed.view(9, 288)
    codes[:, 5::32] = 7 << 4 | codes[:, 5::32] & 15
    assert bool((weight.exact()[:, 10::64] == 0).all())
    assert_product(weight.times(A), A, weight.exact().t())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "blocksize"), [((7, 64), 16), ((7, 64), 64), ((30, 200), 16), ((3, 77), 16)])
def test_any_table(
    isa: str, shape: tuple[int, int], blocksize: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    weight = Weight(shape, blocksize, "nf4", False, generator)
    A = torch.randn(1, shape[1], generator=generator).to(dtype)
    assert_product(
        OPERATIONS.gemv_4bit(A, weight.packed, shape, weight.absmax, code_4bit("nf4", CPU), blocksize),
        A,
        weight.exact().t(),
    )
    code = torch.randn(16, generator=generator)
    exact = decode_4bit(weight.packed, code, weight.absmax, blocksize, shape).double().t()
    arguments = (A, weight.packed, shape, weight.absmax, code, blocksize)
    assert_product(OPERATIONS.gemv_4bit(*arguments), A, exact)
    # A value that no weight has must not show, nor must one in front of a row's end.
    used = torch.unique(torch.cat((weight.packed >> 4, weight.packed & 15)))
    code[[i for i in range(16) if i not in used.tolist()]] = float("nan")
    assert_product(OPERATIONS.gemv_4bit(*arguments), A, exact)
    wide = torch.full((1, 2 * shape[0]), 7.0, dtype=dtype)
    OPERATIONS.gemv_4bit.out(*arguments, wide[:, ::2])
    assert same_bits(wide[:, ::2], OPERATIONS.gemv_4bit(*arguments))
    assert bool((wide[:, 1::2] == 7.0).all())


def test_padding_of_a_row_is_never_read(isa: str) -> None:
    # Code 0 stands where lanes have no element; a table that is infinite there must not leak into results.
    code = torch.ones(16)
    code[0] = float("inf")
    packed = torch.full((36, 1), 0x11, dtype=torch.uint8)
    A = torch.ones(1, 72)
    result = OPERATIONS.gemv_4bit(A, packed, (1, 72), torch.ones(9), code, 8)
    assert result.item() == 72.0


def test_short_codebook_of_nested_statistics(isa: str, generator: torch.Generator) -> None:
    # Codes beyond a short codebook read its last entry, as in the reference.
    weight = Weight((8, 512), 32, "nf4", True, generator)
    codes, offset = weight.statistics[0], weight.statistics[2]
    weight.statistics = (codes, torch.tensor([-0.5, 0.25, 1.0]), offset)
    for rows in (1, 20):
        A = torch.randn(rows, 512, generator=generator)
        assert_product(weight.times(A), A, weight.exact().t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 2048), (3, 8 * 8200), (33, 576)])
def test_nested_statistics_of_every_code(
    isa: str, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    """They are expanded to the very numbers that the contract gives, in whichever way."""
    nested = Weight(shape, 8, "nf4", True, generator)
    codes, code, offset = nested.statistics
    assert codes is not None
    codes.copy_(torch.randint(0, 256, codes.shape, generator=generator, dtype=torch.uint8))
    codes[:256] = torch.randperm(256, generator=generator).to(torch.uint8)
    plain = Weight(shape, 8, "nf4", False, generator)
    plain.packed, plain.absmax = nested.packed, expand_absmax(nested.absmax, codes, code, offset)
    for rows in (1, 8, 20):
        A = torch.randn(rows, shape[1], generator=generator).to(dtype)
        assert torch.equal(nested.times(A), plain.times(A))
