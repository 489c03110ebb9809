"""Stateless functions: values against independent float64 encoders, shapes, arguments, bad input."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bitsandbytes.functional as F
from bitsandbytes.codebooks import code_4bit
from bitsandbytes.errors import ArgumentError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def nearest_distance(scaled: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """Distance of each value to the closest table entry, float64."""
    return (scaled.double().unsqueeze(-1) - code.double()).abs().amin(-1)


def blocks_of(values: torch.Tensor, blocksize: int) -> torch.Tensor:
    """Values of the flattened tensor as rows of blocks, float64, the last one padded with zeros."""
    flat = values.double().reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).reshape(-1, blocksize)


# --- 4 bit --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    blocksize=st.sampled_from([2, 16, 32, 64, 100, 256, 4096]),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from(DTYPES),
    nested=st.booleans(),
    scale=st.sampled_from([1e-6, 1.0, 300.0]),
    seed=st.integers(0, 2**16),
)
def test_4bit_takes_the_nearest_code(shape, blocksize, quant_type, dtype, nested, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) * scale).to(dtype)
    packed, state = F.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested)
    assert packed.shape == ((x.numel() + 1) // 2, 1)
    values = F.dequantize_4bit(packed, state)
    assert values.shape == x.shape and values.dtype == dtype
    if nested or not x.numel():
        return
    rows = blocks_of(x, blocksize)
    absmax = rows.abs().amax(1, keepdim=True)
    assert torch.equal(state.absmax.double(), absmax.squeeze(1))
    # Half a rounding of the scaled value may tip a tie; the distance stays the smallest one.
    best = nearest_distance(rows / absmax.clamp_min(1e-38), code_4bit(quant_type, torch.device("cpu"))) * absmax
    error = (blocks_of(values, blocksize) - rows).abs()
    slack = absmax * 1e-6 + rows.abs() * 2 * torch.finfo(dtype).eps + torch.finfo(dtype).tiny
    assert (error <= best + slack).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("quant_type", "expected"),
    [("fp4", (500, 527, 552, 575, 598, 622, 647)), ("nf4", (377, 391, 404, 416, 427, 438, 451))],
)
def test_4bit_error_grows_slowly_with_the_block_size(dtype, quant_type, expected):
    torch.manual_seed(0)
    # A quarter of the reported matrix has half of its error norm.
    x = torch.randn(1024, 4096).to(dtype)
    for blocksize, norm in zip((64, 128, 256, 512, 1024, 2048, 4096), expected, strict=True):
        packed, state = F.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
        values = F.dequantize_4bit(packed, state)
        error = (x.float() - values.float()).norm().item()
        assert abs(2 * error / norm - 1) < 0.01, (blocksize, error)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_of_strided_input(quant_type):
    x = torch.randn(3, 4, 6)
    wide = torch.randn(4, 3, 38, 256)
    for view, blocksize in ((x[:, ::2, :], 64), (wide[:, :, 10:15, :], 256), (x.permute(2, 0, 1), 32)):
        got, state = F.quantize_4bit(view, blocksize=blocksize, quant_type=quant_type)
        expected, other = F.quantize_4bit(view.contiguous(), blocksize=blocksize, quant_type=quant_type)
        assert torch.equal(got, expected) and torch.equal(state.absmax, other.absmax)
        values = F.dequantize_4bit(got, state)
        assert values.shape == view.shape and torch.equal(values, F.dequantize_4bit(expected, other))
    view = wide[:, :, 10:15, :]
    packed, state = F.quantize_4bit(view, blocksize=256, quant_type=quant_type)
    assert torch.equal(state.absmax, view.abs().amax(-1).reshape(-1))
    whole, _state = F.quantize_4bit(wide, blocksize=256, quant_type=quant_type)
    assert torch.equal(packed.reshape(4, 3, 5, 128), whole.reshape(4, 3, 38, 128)[:, :, 10:15])


@pytest.mark.parametrize("count", [1, 127, 128, 256, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [64, 128])
def test_4bit_keeps_one_dimension(count, dtype, blocksize):
    x = torch.randn(count).to(dtype)
    for quant_type in ("nf4", "fp4"):
        assert F.dequantize_4bit(*F.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)).shape == (count,)


@pytest.mark.parametrize("nested", [False, True])
def test_4bit_with_buffers(nested):
    x = torch.randn(8, 64)
    expected, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=nested)
    out, absmax = torch.empty_like(expected), torch.empty(8)
    packed, other = F.quantize_4bit(x, absmax=absmax, out=out, quant_type="nf4", compress_statistics=nested)
    assert packed is out and torch.equal(out, expected) and other == state
    assert torch.equal(absmax, x.abs().amax(1))
    values = torch.empty(8, 64)
    assert F.dequantize_4bit(packed, state, out=values) is values
    assert torch.equal(values, F.dequantize_4bit(packed, state))
    if not nested:
        again = torch.empty(8, 64)
        F.dequantize_4bit(packed, absmax=absmax, out=again, quant_type="nf4")
        assert torch.equal(again, values)


def test_4bit_named_variants():
    x = torch.randn(4, 64)
    for name in ("nf4", "fp4"):
        packed, state = getattr(F, f"quantize_{name}")(x)
        expected, other = F.quantize_4bit(x, quant_type=name)
        assert torch.equal(packed, expected) and state == other
        assert torch.equal(getattr(F, f"dequantize_{name}")(packed, state), F.dequantize_4bit(packed, state))


def test_4bit_transposed_codes_give_the_transposed_matrix():
    packed, state = F.quantize_4bit(torch.randn(4, 64), quant_type="nf4")
    assert torch.equal(F.dequantize_4bit(packed.t(), state), F.dequantize_4bit(packed, state).t())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_4bit_of_unusual_values(quant_type, dtype):
    zeros = torch.zeros(2, 64, dtype=dtype)
    assert torch.equal(F.dequantize_4bit(*F.quantize_4bit(zeros, quant_type=quant_type)), zeros)
    constant = torch.full((2, 64), -3.0, dtype=dtype)
    assert torch.equal(F.dequantize_4bit(*F.quantize_4bit(constant, quant_type=quant_type)), constant)
    # A block with a NaN may be lost; its neighbour must not be.
    broken = torch.ones(2, 64, dtype=dtype)
    broken[0, 3] = float("nan")
    values = F.dequantize_4bit(*F.quantize_4bit(broken, quant_type=quant_type))
    assert torch.equal(values[1], broken[1])


def test_gemv_4bit():
    W = torch.randn(32, 64)
    packed, state = F.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
    x = torch.randn(1, 64)
    expected = x.double() @ F.dequantize_4bit(packed, state).double().T
    torch.testing.assert_close(F.gemv_4bit(x, packed.t(), state=state).double(), expected, rtol=1e-5, atol=1e-5)
    out = torch.empty(1, 32)
    assert F.gemv_4bit(x, packed.t(), out=out, state=state) is out
    with pytest.raises(ValueError, match="state"):
        F.gemv_4bit(x, packed.t())


# --- 8 bit, block-wise --------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    blocksize=st.sampled_from([1, 63, 64, 256, 4096]),
    dtype=st.sampled_from(DTYPES),
    code=st.sampled_from(["dynamic", "unsigned", "linear", "fp8", "normal"]),
    seed=st.integers(0, 2**16),
)
def test_blockwise_takes_a_near_code(shape, blocksize, dtype, code, seed):
    table = {
        "dynamic": lambda: F.create_dynamic_map(True),
        "unsigned": lambda: F.create_dynamic_map(False),
        "linear": lambda: F.create_linear_map(True, 8),
        "fp8": lambda: F.create_fp8_map(True, 4, 3),
        "normal": lambda: F.create_normal_map().sort().values,
    }[code]()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    if code == "unsigned":
        x = x.abs()
    codes, state = F.quantize_blockwise(x, code=table, blocksize=blocksize)
    assert codes.shape == x.shape and codes.dtype == torch.uint8
    values = F.dequantize_blockwise(codes, state)
    assert values.shape == x.shape and values.dtype == dtype
    if not x.numel():
        return
    rows = blocks_of(x, blocksize)
    absmax = rows.abs().amax(1, keepdim=True)
    assert torch.equal(state.absmax.double(), absmax.squeeze(1))
    best = nearest_distance(rows / absmax.clamp_min(1e-38), table) * absmax
    error = (blocks_of(values, blocksize) - rows).abs()
    # The search works on a grid of 65536 points, so a value within a step of a boundary may go either way.
    slack = absmax * (2 / 65535 + 1e-6) + rows.abs() * 2 * torch.finfo(dtype).eps
    assert (error <= best + slack).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_blockwise_of_half_precision(dtype):
    ones = torch.ones(5, 10, dtype=dtype)
    codes, state = F.quantize_blockwise(ones)
    assert torch.equal(F.dequantize_blockwise(codes, state), ones)
    assert torch.equal(F.dequantize_blockwise(codes, absmax=state.absmax, code=state.code), ones.float())
    out = torch.empty(5, 10)
    F.dequantize_blockwise(codes, absmax=state.absmax.half(), code=state.code, out=out)
    assert torch.equal(out, ones.float())


def test_blockwise_nested_and_buffers():
    x = torch.rand(1000)
    codes, state = F.quantize_blockwise(x, blocksize=64, nested=True)
    assert state.nested and state.absmax.dtype == torch.uint8
    values = F.dequantize_blockwise(codes, state)
    assert (values - x).abs().mean() < 0.02
    plain, expected = F.quantize_blockwise(x, blocksize=64)
    out, absmax = torch.empty_like(plain), torch.empty(16)
    got, _state = F.quantize_blockwise(x, blocksize=64, out=out, absmax=absmax)
    assert got is out and torch.equal(out, plain) and torch.equal(absmax, expected.absmax)


@pytest.mark.parametrize("function", ["quantize_blockwise", "quantize_4bit"])
@pytest.mark.parametrize("blocksize", [2**64, 0, -64, 2.5])
def test_nonsense_block_size(function, blocksize):
    with pytest.raises((ValueError, TypeError), match="blocksize"):
        getattr(F, function)(torch.ones(1, 1, 2), blocksize=blocksize)


def test_unusual_block_sizes_work():
    x = torch.randn(100)
    for blocksize in (63, 2**33):
        codes, state = F.quantize_blockwise(x, blocksize=blocksize)
        assert state.absmax.numel() == -(-100 // blocksize)
        assert (F.dequantize_blockwise(codes, state) - x).abs().max() < 0.1
    with pytest.raises(ValueError, match="blocksize is 63, expected an even number"):
        F.quantize_4bit(x, blocksize=63)
    empty, state = F.quantize_blockwise(torch.zeros(0, 0, 0))
    assert F.dequantize_blockwise(empty, state).shape == (0, 0, 0)


def test_nonsense_does_not_kill_the_process():
    code = """
import torch, bitsandbytes.functional as F
for blocksize in (2**64, 0, -64, 63, 2**33):
    try:
        F.quantize_blockwise(torch.ones(1, 1, 1), blocksize=blocksize)
    except (ValueError, TypeError) as error:
        assert "blocksize" in str(error)
print("alive")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "alive" in result.stdout, result.stderr


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.quantize_4bit(torch.zeros(4, dtype=torch.int32)), "A has dtype torch.int32"),
        (lambda: F.quantize_4bit(torch.zeros(4), quant_type="int3"), "quant_type is 'int3'"),
        (lambda: F.quantize_4bit(torch.zeros(4), quant_storage=torch.int64), "quant_storage"),
        (lambda: F.dequantize_4bit(torch.zeros(2, 1, dtype=torch.uint8)), "pass either quant_state"),
        (
            lambda: F.dequantize_4bit(
                torch.zeros(3, 1, dtype=torch.uint8), absmax=torch.ones(1), out=torch.empty(64), quant_type="nf4"
            ),
            "A holds 3 bytes",
        ),
        (
            lambda: F.dequantize_4bit(
                torch.zeros(32, 1, dtype=torch.uint8), absmax=torch.ones(2), out=torch.empty(64), quant_type="nf4"
            ),
            "absmax has 2 elements",
        ),
        (lambda: F.quantize_blockwise(torch.zeros(4), code=torch.zeros(300)), "code"),
        (lambda: F.quantize_blockwise(torch.zeros(4), out=torch.zeros(5, dtype=torch.uint8)), "out has shape"),
        (lambda: F.dequantize_blockwise(torch.zeros(4, dtype=torch.uint8)), "pass either quant_state or absmax"),
        (
            lambda: F.dequantize_blockwise(torch.zeros(4, dtype=torch.int8), absmax=torch.ones(1)),
            "A has dtype torch.int8",
        ),
        (lambda: F.int8_vectorwise_quant(torch.zeros(4, 4), threshold=-1.0), "threshold is -1.0"),
        (lambda: F.int8_linear_matmul(torch.zeros(2, 3), torch.zeros(2, 3)), "A has dtype"),
        (
            lambda: F.int8_linear_matmul(torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 4, dtype=torch.int8)),
            "must be equal",
        ),
        (lambda: F.is_on_gpu([torch.zeros(1)]), "same GPU"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


# --- int8 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_int8_rows(dtype, threshold):
    torch.manual_seed(0)
    A = torch.randn(16, 48).to(dtype)
    A[2, 5] = 8.0
    codes, absmax, columns = F.int8_vectorwise_quant(A, threshold)
    kept = A.double().clone()
    if threshold:
        expected = torch.where((A.abs() >= threshold).any(0))[0]
        assert torch.equal(columns, expected)
        kept[A.abs() >= threshold] = 0
        assert (codes[:, expected] == 0).all()
        kept_codes = kept.clone()
        kept_codes[:, expected] = 0
    else:
        assert columns is None
        kept_codes = kept
    rows = kept.abs().amax(1)
    assert torch.equal(absmax.double(), rows)
    scaled = kept_codes / rows.unsqueeze(1) * 127
    assert (codes.double() - scaled).abs().max() <= 0.5 + 1e-5
    values = F.int8_vectorwise_dequant(codes, absmax)
    torch.testing.assert_close(values.double(), codes.double() * rows.unsqueeze(1) / 127, rtol=1e-6, atol=0)


def test_int8_double_quant():
    A = torch.randn(16, 48)
    row, column, rows, columns, outliers = F.int8_double_quant(A)
    assert outliers is None
    assert torch.equal(row, F.int8_vectorwise_quant(A)[0]) and torch.equal(rows, A.abs().amax(1))
    assert torch.equal(columns, A.abs().amax(0))
    assert (column.double() - A.double() / columns.double() * 127).abs().max() <= 0.5 + 1e-5
    buffers = [torch.empty_like(t) for t in (columns, rows, column, row)]
    results = F.int8_double_quant(A, *buffers)
    assert results[0] is buffers[3] and results[1] is buffers[2] and torch.equal(buffers[1], rows)


def test_int8_products_are_exact():
    A = torch.randint(-127, 128, (5, 3000), dtype=torch.int8)
    B = torch.randint(-127, 128, (7, 3000), dtype=torch.int8)
    expected = A.long() @ B.long().T
    assert torch.equal(F.int8_linear_matmul(A, B).long(), expected)
    out = torch.empty(5, 7, dtype=torch.int32)
    assert F.int8_linear_matmul(A, B, out=out) is out and torch.equal(out.long(), expected)
    rows, columns = torch.rand(5), torch.rand(7)
    values = F.int8_mm_dequant(out, rows, columns, bias=torch.ones(7))
    assert values.dtype == torch.float16
    exact = expected.double() * rows.double().unsqueeze(1) * columns.double() / 127**2 + 1
    torch.testing.assert_close(values.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("transposed_A", [False, True])
@pytest.mark.parametrize("transposed_B", [False, True])
def test_igemm(transposed_A, transposed_B):
    A = torch.randint(-127, 128, (3, 5) if not transposed_A else (5, 3), dtype=torch.int8)
    B = torch.randint(-127, 128, (5, 7) if not transposed_B else (7, 5), dtype=torch.int8)
    left, right = (A.T if transposed_A else A), (B.T if transposed_B else B)
    assert torch.equal(
        F.igemm(A, B, transposed_A=transposed_A, transposed_B=transposed_B).long(), left.long() @ right.long()
    )
    batch_a, batch_b = A.expand(4, *A.shape), B.expand(4, *B.shape)
    product = F.batched_igemm(batch_a, batch_b, transposed_A=transposed_A, transposed_B=transposed_B)
    assert torch.equal(product.long(), (left.long() @ right.long()).expand(4, 3, 7))


def test_igemm_sums_over_batch_and_sequence():
    A = torch.randint(-127, 128, (2, 6, 3), dtype=torch.int8)
    B = torch.randint(-127, 128, (2, 6, 5), dtype=torch.int8)
    expected = torch.einsum("bsi,bso->io", A.long(), B.long())
    assert torch.equal(F.igemm(A, B).long(), expected)
    with pytest.raises(ArgumentError, match="cannot multiply"):
        F.igemm(A, B[:, :4])
    with pytest.raises(ArgumentError, match="out has shape"):
        F.igemm(A, B, out=torch.empty(3, 3, dtype=torch.int32))


# --- deprecated names ---------------------------------------------------------------------------


def test_deprecated_quantize():
    x = torch.randn(64)
    with pytest.warns(FutureWarning, match="quantize is deprecated.*use quantize_blockwise"):
        codes, state = F.quantize(x)
    with pytest.warns(FutureWarning, match="dequantize is deprecated"):
        values = F.dequantize(codes, state)
    expected, blockwise = F.quantize_blockwise(x, blocksize=64)
    assert torch.equal(codes, expected) and torch.equal(values, F.dequantize_blockwise(expected, blockwise))
    scaled = x / x.abs().max()
    code = F.create_dynamic_map()
    with pytest.warns(FutureWarning):
        codes = F.quantize_no_absmax(scaled, code)
    with pytest.warns(FutureWarning):
        values = F.dequantize_no_absmax(codes, code)
    assert (values - scaled).abs().max() < 0.02


def test_deprecated_optimizer_update():
    torch.manual_seed(0)
    p, g = torch.randn(4096), torch.randn(4096)
    qmap1, qmap2 = F.create_dynamic_map(True), F.create_dynamic_map(False)
    exact = torch.nn.Parameter(p.clone())
    reference = torch.optim.Adam([exact], lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    state1, state2 = torch.full((4096,), 127, dtype=torch.uint8), torch.zeros(4096, dtype=torch.uint8)
    max1, max2, new1, new2 = (torch.zeros(1) for _index in range(4))
    for step in range(1, 4):
        with pytest.warns(FutureWarning, match="optimizer_update_8bit is deprecated"):
            F.optimizer_update_8bit(
                "adam", g, p, state1, state2, 0.9, 0.999, 1e-8, step, 1e-2, qmap1, qmap2, max1, max2, new1, new2
            )
        max1, new1, max2, new2 = new1, max1, new2, max2
        exact.grad = g.clone()
        reference.step()
    assert (p - exact.detach()).abs().mean() < 2e-3


# --- the interleaved CPU layout -----------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_cpu_packing_is_undone_exactly(nested, storage):
    W = torch.randn(64, 128)
    packed, state = F.quantize_4bit(W, quant_type="nf4", compress_statistics=nested, quant_storage=storage)
    before, expected = packed.clone(), F.dequantize_4bit(packed, state)
    interleaved, state = F._convert_weight_packed_for_cpu(packed, state)
    assert interleaved.shape == (64, 64) and state.packing_format_for_cpu
    assert state.absmax.shape == (2, 64) and state.absmax.dtype == torch.bfloat16 and not state.nested
    again, state = F._convert_weight_packed_for_cpu_inverse(interleaved, state)
    assert again.dtype == storage and torch.equal(again.view(torch.uint8), before.view(torch.uint8))
    assert state.nested == nested and torch.equal(F.dequantize_4bit(again, state), expected)


def test_cpu_packing_layout():
    # Rows r and r + 16 of a tile share bytes, two columns at a time; low nibble first.
    W = torch.randn(32, 64)
    packed, state = F.quantize_4bit(W, quant_type="nf4")
    codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(32, 64)
    interleaved, _state = F._convert_weight_packed_for_cpu(packed, state)
    flat = interleaved.reshape(-1)
    for pair in range(32):
        for row in range(16):
            for column in range(2):
                byte = int(flat[pair * 32 + 2 * row + column])
                assert byte & 15 == codes[row, 2 * pair + column] and byte >> 4 == codes[row + 16, 2 * pair + column]


def test_cpu_packing_refuses_what_does_not_fit():
    packed, state = F.quantize_4bit(torch.randn(33, 64), quant_type="nf4")
    with pytest.raises(ArgumentError, match="tiles of 32 rows"):
        F._convert_weight_packed_for_cpu(packed, state)
    with pytest.raises(ArgumentError, match="interleaved CPU layout"):
        F._convert_weight_packed_for_cpu_inverse(packed, state)


# --- paged tensors and pointers -----------------------------------------------------------------


def test_paged_tensors_on_the_cpu():
    A = F.get_paged(4, 8, dtype=torch.float32, device=torch.device("cpu"))
    assert A.shape == (4, 8) and A.dtype == torch.float32
    F.fill(A, 3.0)
    assert (A == 3).all()
    F._mul(A, torch.full((4, 8), 2.0))
    assert (A == 6).all()
    F.elementwise_func("arange", A, None, 0)
    assert torch.equal(A.reshape(-1), torch.arange(32.0))
    F.prefetch_tensor(A)
    manager = F.GlobalPageManager.get_instance()
    manager.paged_tensors.append(A)
    manager.prefetch_all()
    manager.initialize()
    assert manager.paged_tensors == []
    with pytest.raises(ArgumentError, match="unknown element-wise function"):
        F.elementwise_func("cosine", A, None, 0)


def test_unknown_4bit_type():
    with pytest.raises(NotImplementedError, match="'nf5' is not known; known types: nf4, fp4, int4, af4"):
        F.get_4bit_type("nf5")


def test_get_ptr():
    A = torch.zeros(4)
    assert F.get_ptr(A).value == A.data_ptr() and F.get_ptr(None) is None
