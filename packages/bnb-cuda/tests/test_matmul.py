"""Products with quantized weights against float64, over sizes, layouts and statistics."""

from __future__ import annotations

import pytest
import torch

import bitsandbytes as bnb
import bitsandbytes.functional as F

pytestmark = pytest.mark.gpu

#: Relative error of a result rounded to the dtype, in the norm: half a unit in the last place is 2^-9 of a
#: bfloat16 at most; the codebook, rounded to the same dtype, adds as much.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-6}
SIZES = [(16, 64), (77, 2048), (130, 14336), (257, 320), (1000, 192), (4096, 4096), (4100, 1088), (8461, 704)]
ROWS = (1, 3, 8, 9, 16, 17, 31, 33, 64, 65, 128, 190, 300)


def quantized(n, k, dtype, quant_type="nf4", blocksize=64, nested=False):
    weight = torch.randn(n, k, device="cuda", dtype=dtype) * 0.02
    packed, state = F.quantize_4bit(weight, quant_type=quant_type, blocksize=blocksize, compress_statistics=nested)
    exact = F.QuantState.from_dict(state.as_dict(packed=True), device=weight.device)
    exact.dtype = torch.float32
    return packed, state, F.dequantize_4bit(packed, exact).double()


def assert_close(result, truth, dtype):
    error = ((result.double() - truth).norm() / truth.norm()).item()
    assert error < TOLERANCE[dtype], error


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize(("quant_type", "blocksize"), [("nf4", 64), ("fp4", 32), ("nf4", 4096), ("fp4", 128)])
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gemm_4bit(dtype, n, k, quant_type, blocksize, nested):
    packed, state, exact = quantized(n, k, dtype, quant_type, blocksize, nested)
    for rows in ROWS:
        x = torch.randn(rows, k, device="cuda", dtype=dtype)
        bias = torch.randn(n, device="cuda", dtype=dtype) if rows % 2 else None
        truth = x.double() @ exact.t() + (0 if bias is None else bias.double())
        assert_close(bnb.matmul_4bit(x, packed.t(), quant_state=state, bias=bias), truth, dtype)


@pytest.mark.parametrize("rows", [1, 16, 40])
def test_infinite_activations_stay_in_their_row(rows):
    packed, state, exact = quantized(64, 192, torch.float16)
    x = torch.randn(rows, 192, device="cuda", dtype=torch.float16)
    x[0, 0] = float("inf")
    result = bnb.matmul_4bit(x, packed.t(), quant_state=state)
    assert not result[0].isfinite().any()
    if rows > 1:
        assert_close(result[1:], x[1:].double() @ exact.t(), torch.float16)


def test_strided_and_empty_activations():
    packed, state, exact = quantized(96, 128, torch.bfloat16)
    wide = torch.randn(5, 256, device="cuda", dtype=torch.bfloat16)
    assert_close(
        bnb.matmul_4bit(wide[:, ::2], packed.t(), quant_state=state), wide[:, ::2].double() @ exact.t(), wide.dtype
    )
    odd = torch.randn(5 * 128 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(5, 128)
    assert_close(bnb.matmul_4bit(odd, packed.t(), quant_state=state), odd.double() @ exact.t(), odd.dtype)
    assert bnb.matmul_4bit(wide[:0, :128], packed.t(), quant_state=state).shape == (0, 96)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 100, 600])
@pytest.mark.parametrize(("n", "k"), [(64, 64), (131, 512), (1024, 1000)])
def test_int8_linear(n, k, rows, threshold):
    weight = torch.randn(n, k, device="cuda", dtype=torch.float16)
    x = torch.randn(rows, k, device="cuda", dtype=torch.float16)
    x[:, 3] = 20.0
    codes, stats, _ = F.int8_vectorwise_quant(weight)
    bias = torch.randn(n, device="cuda", dtype=torch.float16)
    exact = codes.double() * stats.double()[:, None] / 127
    inliers = x.clone()
    if threshold:
        inliers[:, (x.abs() >= threshold).any(dim=0)] = 0
    x_codes, x_stats, _ = F.int8_vectorwise_quant(x, threshold=threshold)
    kept = x_codes.double() * x_stats.double()[:, None] / 127 + (x.double() - inliers.double())
    result = torch.ops.bitsandbytes.int8_linear(x, codes, stats, threshold, bias)
    assert_close(result, kept @ exact.t() + bias.double(), torch.float16)


def small_calls():
    """One call of each kind, of sizes that take different kernels."""
    packed, state, _ = quantized(256, 512, torch.float16)
    nested_packed, nested, _ = quantized(256, 512, torch.float16, nested=True)
    weight = torch.randn(256, 512, device="cuda", dtype=torch.float16)
    codes, stats, _ = F.int8_vectorwise_quant(weight)
    blocks, blocks_state = F.quantize_blockwise(weight)
    xs = [torch.randn(rows, 512, device="cuda", dtype=torch.float16) for rows in (1, 12, 40, 70)]
    ids = torch.arange(40, device="cuda")
    yield from (lambda x=x: bnb.matmul_4bit(x, packed.t(), quant_state=state) for x in xs)
    yield from (lambda x=x: bnb.matmul_4bit(x, nested_packed.t(), quant_state=nested) for x in xs)
    for threshold in (0.0, 2.0):
        yield from (lambda x=x, h=threshold: torch.ops.bitsandbytes.int8_linear(x, codes, stats, h, None) for x in xs)
    yield lambda: F.quantize_4bit(weight)[0]
    yield lambda: F.dequantize_4bit(packed, state)
    yield lambda: F.dequantize_4bit(nested_packed, nested)
    yield lambda: F.quantize_blockwise(weight)[0]
    yield lambda: F.dequantize_blockwise(blocks, blocks_state)
    yield lambda: F.int8_vectorwise_quant(weight)[0]
    yield lambda: F.int8_double_quant(weight)[1]
    yield lambda: F.gemv_4bit(xs[0], packed.t(), state=state)
    yield lambda: torch.ops.bitsandbytes.embedding_4bit(ids, packed, [256, 512], state.absmax, 64, "nf4", torch.float16)


def test_graph_capture_and_side_streams_give_the_same():
    calls = list(small_calls())
    expected = [call() for call in calls]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        beside = [call() for call in calls]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [call() for call in calls]
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for one, two, three in zip(expected, beside, captured, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("rows", [1, 12, 40, 70, 300])
@pytest.mark.parametrize("kind", ["nf4", "nested", "int8"])
def test_a_kernel_sees_what_the_one_ahead_of_it_wrote(kind, rows):
    """Each kernel may begin before the one ahead of it has ended, whose results it multiplies."""
    size = 1024
    weights = [torch.randn(size, size, device="cuda", dtype=torch.float16) / size**0.5 for _ in range(4)]
    if kind == "int8":
        coded = [F.int8_vectorwise_quant(weight)[:2] for weight in weights]
        layers = [
            lambda x, c=codes, s=stats: torch.ops.bitsandbytes.int8_linear(x, c, s, 3.0, None) for codes, stats in coded
        ]
    else:
        coded = [F.quantize_4bit(w, quant_type="nf4", compress_statistics=kind == "nested") for w in weights]
        layers = [lambda x, p=packed, s=state: bnb.matmul_4bit(x, p.t(), quant_state=s) for packed, state in coded]
    inputs = [torch.randn(rows, size, device="cuda", dtype=torch.float16) for _ in range(20)]

    def through_all(x, between=lambda: None):
        for layer in layers:
            x = layer(x)
            between()
        return x

    expected = [through_all(x, torch.cuda.synchronize) for x in inputs]
    assert all(torch.equal(through_all(x), y) for x, y in zip(inputs, expected, strict=True))
    # Memory of results is used again at once, so that what comes late or is read early shows.
    held = torch.empty_like(inputs[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = through_all(held)
    for x, y in zip(inputs, expected, strict=True):
        held.copy_(x)
        graph.replay()
        assert torch.equal(captured, y)


def test_a_product_sees_a_weight_that_was_just_written():
    weight = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1, 2048, device="cuda", dtype=torch.bfloat16)
    expected, packed, state = [], *F.quantize_4bit(weight, quant_type="nf4")
    others = [F.quantize_4bit(weight * factor + 1, quant_type="nf4") for factor in range(1, 9)]
    for codes, own in others:
        torch.cuda.synchronize()
        expected.append(bnb.matmul_4bit(x, codes.t(), quant_state=own))
    results = []
    for codes, own in others:
        packed.copy_(codes)
        state.absmax.copy_(own.absmax)
        results.append(bnb.matmul_4bit(x, packed.t(), quant_state=state))
    assert all(torch.equal(one, two) for one, two in zip(results, expected, strict=True))


@pytest.mark.multigpu
def test_a_device_that_is_not_current_gives_the_same_and_takes_nothing_from_the_current_one():
    expected = [call() for call in small_calls()]
    with torch.cuda.device(1):
        torch.manual_seed(0)
        calls = list(small_calls())
    torch.cuda.synchronize(1)
    allocations = torch.cuda.memory_stats(0)["allocation.all.allocated"]
    results = [call() for call in calls]
    assert torch.cuda.memory_stats(0)["allocation.all.allocated"] == allocations
    assert torch.cuda.current_device() == 0
    for result, tensor in zip(results, expected, strict=True):
        assert result.device == torch.device("cuda", 1)
        assert torch.equal(result.cpu(), tensor.cpu())


@pytest.mark.multigpu
@pytest.mark.parametrize("rows", [1, 40])
def test_operands_on_two_devices_are_refused(rows):
    packed, state, _ = quantized(64, 128, torch.float16)
    codes, stats, _ = F.int8_vectorwise_quant(torch.randn(64, 128, device="cuda", dtype=torch.float16))
    x = torch.randn(rows, 128, device="cuda:1", dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"gemm_4bit.*cuda:1"):
        torch.ops.bitsandbytes.gemm_4bit(x, packed, [64, 128], state.absmax, 64, "nf4")
    with pytest.raises(RuntimeError, match=r"int8_linear.*cuda:1"):
        torch.ops.bitsandbytes.int8_linear(x, codes, stats, 0.0, None)


@pytest.mark.parametrize("cls", [bnb.optim.AdamW8bit, bnb.optim.AdamW32bit, bnb.optim.Lion8bit])
def test_optimizer_step_in_a_graph(cls):
    parameters = [[torch.nn.Parameter(torch.ones(5000, device="cuda")) for _ in range(3)] for _ in range(2)]
    gradient = torch.randn(5000, device="cuda")
    for group in parameters:
        for p in group:
            p.grad = gradient.clone()
    # A rate on the device is what makes a step capturable.
    rate = torch.tensor(1e-3, device="cuda")
    eager, graphed = cls(parameters[0], lr=1e-3), cls(parameters[1], lr=rate)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graphed.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step()
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        eager.step()
    for one, two in zip(*parameters, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_paged_optimizer_steps_as_the_plain_one():
    gradient = torch.randn(300_000, device="cuda")
    results = []
    for cls in (bnb.optim.AdamW8bit, bnb.optim.PagedAdamW8bit):
        p = torch.nn.Parameter(torch.ones(300_000, device="cuda"))
        p.grad = gradient.clone()
        optimizer = cls([p])
        for _ in range(3):
            optimizer.step()
        results.append(p.detach().clone())
    assert torch.equal(*results)
