"""Linear8bitLt, Int8Params and matmul: values, gradients, moves, state dicts, threads."""

from __future__ import annotations

import copy
import io
import threading
import warnings

import pytest
import safetensors.torch
import torch
from helpers import assert_product_close, decode_weight_8bit

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes.autograd._functions import GlobalOutlierPooler, MatMul8bitLt
from bitsandbytes.errors import ArgumentError, CheckpointError
from bitsandbytes.nn import Int8Params, Linear8bitLt

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def quantized(inputs=64, outputs=32, **arguments):
    torch.manual_seed(1)
    return Linear8bitLt(inputs, outputs, has_fp16_weights=False, **arguments).to("cpu")


def int8_bound(x, W):
    """Largest error of quantized activations: half a step of a row, on every weight of a column."""
    step = x.detach().double().abs().amax(-1, keepdim=True) / 127
    return 0.5 * step @ W.abs().sum(1, keepdim=True).T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (5, 64), (2, 3, 64), (2, 3, 4, 64), (0, 64), (2, 0, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_inference(dtype, threshold, shape, bias):
    layer = quantized(threshold=threshold, bias=bias).eval()
    x = torch.randn(shape).to(dtype)
    if x.numel():
        x.reshape(-1, 64)[:, 5] = 20.0
    y = layer(x)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 32)
    if not x.numel():
        return
    W = decode_weight_8bit(layer.weight.data, layer.weight.SCB)
    rows = x.reshape(-1, 64).double()
    expected = rows @ W.T + (layer.bias.detach().double() if bias else 0)
    kept = rows.clone()
    if threshold:
        kept[:, 5] = 0
    bound = int8_bound(kept, W) + expected.abs() * 2 * torch.finfo(dtype).eps + 1e-5
    assert ((y.reshape(-1, 32).double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 4, 64), (0, 64)])
def test_backward(dtype, training, shape):
    layer = quantized(threshold=6.0).train(training)
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = layer(x)
    grad = torch.randn(y.shape).to(dtype)
    y.backward(grad)
    W = decode_weight_8bit(layer.weight.data, layer.weight.SCB)
    assert x.grad.shape == x.shape and layer.weight.grad is None
    assert layer.bias.grad.dtype == layer.bias.dtype
    if x.numel():
        assert_product_close(x.grad, grad, W.T, None, dtype)


def test_stack_of_unequal_sizes():
    model = torch.nn.Sequential(
        Linear8bitLt(16, 32, has_fp16_weights=False, threshold=6.0),
        Linear8bitLt(32, 32, has_fp16_weights=False, threshold=6.0),
        torch.nn.ReLU(),
        Linear8bitLt(32, 8, has_fp16_weights=False, threshold=6.0),
    ).to("cpu")
    x = torch.randn(10, 16, dtype=torch.float16, requires_grad=True)
    (model(x).softmax(-1) ** 2).sum().backward()
    assert x.grad.shape == x.shape and x.grad.isfinite().all()


@pytest.mark.parametrize("function", ["float", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_training_of_floating_point_weights(function, dtype):
    torch.manual_seed(0)
    x = torch.randn(6, 32).to(dtype).requires_grad_()
    B = torch.randn(8, 32).to(dtype).requires_grad_()
    bias = torch.randn(8).requires_grad_()
    state = bnb.MatmulLtState()
    state.is_training = function == "float"
    state.threshold = 6.0
    y = bnb.matmul(x, B, state=state, bias=bias)
    grad = torch.randn(6, 8).to(dtype)
    y.backward(grad)
    assert_product_close(B.grad, grad.T, x.T, None, dtype)
    assert_product_close(x.grad, grad, decode_weight_8bit(state.CB, state.SCB).T, None, dtype)
    torch.testing.assert_close(bias.grad.double(), grad.double().sum(0), rtol=1e-5, atol=1e-5)


def test_floating_point_weights_learn():
    torch.manual_seed(0)
    layer = Linear8bitLt(16, 1, threshold=6.0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    x = torch.randn(64, 16)
    target = x[:, :4].sum(1, keepdim=True)
    losses = []
    for _step in range(150):
        loss = torch.nn.functional.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]
    # Evaluation must see the last step, not a weight quantized before it.
    layer.eval()
    fresh = Linear8bitLt(16, 1, threshold=6.0)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), fresh.eval()(x))
    with torch.no_grad():
        layer.weight.mul_(2)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), fresh(x))


def test_outliers_do_not_leak_into_the_next_batch():
    layer = quantized(64, 64, bias=False, threshold=6.0).eval()
    other = copy.deepcopy(layer)
    x1, x2 = 0.1 * torch.randn(8, 64).half(), 0.1 * torch.randn(8, 64).half()
    x1[:, 5] = 20
    first = layer(x2)
    layer(x1)
    assert torch.equal(layer(x2), first)
    assert torch.equal(other(x2), first)


def test_outlier_pool_shares_columns():
    pool = GlobalOutlierPooler.get_instance()
    assert pool is GlobalOutlierPooler.get_instance()
    pool.initialize()
    layer = quantized(64, 16, bias=False, threshold=6.0).eval()
    narrow = quantized(32, 16, bias=False, threshold=6.0).eval()
    for module in (layer, narrow):
        module.state.outlier_pool = pool
    x = 0.1 * torch.randn(4, 64)
    x[0, 7] = 50.0
    layer(x)
    assert pool.get_current_outlier_idx().tolist() == [7]
    calm = 0.1 * torch.randn(4, 64)
    W = decode_weight_8bit(layer.weight.data, layer.weight.SCB)
    y = layer(calm)
    assert layer.state.idx.tolist() == [7]
    # Column 7 is exact now, the others carry the error of quantization.
    kept = calm.double().clone()
    kept[:, 7] = 0
    assert ((y.double() - calm.double() @ W.T).abs() <= int8_bound(calm, W) + 1e-6).all()
    wide = torch.zeros(1, 32)
    wide[0, 3] = 9.0
    narrow(wide)
    assert pool.get_current_outlier_idx().tolist() == [7], "a layer of another size does not contribute"
    pool.initialize()
    with pytest.raises(RuntimeError, match="get_instance"):
        GlobalOutlierPooler()


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_large_sums_stay_finite(threshold):
    layer = Linear8bitLt(4098, 8, bias=False, has_fp16_weights=False, threshold=threshold)
    layer.weight.data.fill_(1.0)
    layer = layer.to("cpu").eval()
    value = 5.9 if threshold else 1.0
    y = layer(torch.full((2, 4098), value, dtype=torch.float16))
    torch.testing.assert_close(y.float(), torch.full((2, 8), value * 4098), rtol=5e-3, atol=0)


def test_unequal_first_dimension_of_one():
    layer = Linear8bitLt(1, 1, has_fp16_weights=False).to("cpu")
    x = torch.tensor([3.0], requires_grad=True)
    y = layer(x)
    y.backward()
    assert y.shape == (1,) and x.grad.shape == (1,)


def test_weight_passes_through_float16():
    # The layout of record: codes of the float16 weight, except where float16 would ruin a row.
    torch.manual_seed(0)
    weight = torch.randn(4, 64)
    weight[1] *= 1e6
    weight[2] *= 1e-9
    params = Int8Params(weight.clone(), requires_grad=False).to("cpu")
    half_codes, half_absmax, _none = F.int8_vectorwise_quant(weight.half())
    exact_codes, exact_absmax, _none = F.int8_vectorwise_quant(weight)
    for row, (codes, absmax) in enumerate(
        [(half_codes, half_absmax), (exact_codes, exact_absmax), (exact_codes, exact_absmax), (half_codes, half_absmax)]
    ):
        assert torch.equal(params.data[row], codes[row]) and params.SCB[row] == absmax[row]


@pytest.mark.parametrize("before_forward", [False, True])
@pytest.mark.parametrize("has_fp16_weights", [False, True])
@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
def test_copies_of_a_layer(before_forward, has_fp16_weights, way):
    layer = Linear8bitLt(32, 16, has_fp16_weights=has_fp16_weights, threshold=6.0).to("cpu").eval()
    x = torch.randn(2, 32)
    if not before_forward:
        layer(x)
    if way == "deepcopy":
        other = copy.deepcopy(layer)
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert type(other.weight) is Int8Params and other.weight.has_fp16_weights == has_fp16_weights
    assert other.weight.data_ptr() != layer.weight.data_ptr()
    if not has_fp16_weights:
        assert other.weight.CB is not None and other.weight.SCB is not None
        assert other.weight.CB.data_ptr() == other.weight.data_ptr()
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("after_forward", [False, True])
def test_safetensors_round_trip(tmp_path, after_forward):
    layer = quantized().eval()
    x = torch.randn(3, 64)
    if after_forward:
        layer(x)
    state_dict = layer.state_dict()
    assert list(state_dict) == ["weight", "bias", "SCB", "weight_format"]
    assert state_dict["weight_format"].dtype == torch.uint8 and state_dict["weight_format"].item() == 0
    safetensors.torch.save_file(state_dict, tmp_path / "layer.safetensors")
    torch.save(state_dict, tmp_path / "layer.pt")
    for loaded in (
        safetensors.torch.load_file(tmp_path / "layer.safetensors"),
        torch.load(tmp_path / "layer.pt", weights_only=True),
        {**state_dict, "weight_format": "row"},
    ):
        for target in ("fresh", "quantized", "used", "assign"):
            other = Linear8bitLt(64, 32, has_fp16_weights=False, device="meta" if target == "assign" else None)
            if target in ("quantized", "used"):
                other = other.to("cpu")
            if target == "used":
                other(x)
            other.load_state_dict(dict(loaded), assign=target == "assign")
            assert type(other.weight) is Int8Params
            assert torch.equal(other.eval()(x), layer(x)), target


def test_other_layouts_are_refused_by_name():
    layer = quantized()
    for mark in (torch.tensor(2, dtype=torch.uint8), "col_turing"):
        with pytest.raises(CheckpointError, match="'col_turing'; only 'row' weight format is supported"):
            layer.load_state_dict({**layer.state_dict(), "weight_format": mark})
    with pytest.raises(CheckpointError, match="is 9, known formats"):
        layer.load_state_dict({**layer.state_dict(), "weight_format": torch.tensor(9)})


def test_damaged_state_dicts_are_refused():
    layer = quantized()
    without = layer.state_dict()
    del without["SCB"]
    with pytest.raises(RuntimeError, match="no SCB, the absmax of their rows"):
        layer.load_state_dict(without)
    short = layer.state_dict()
    short["SCB"] = short["SCB"][:-1]
    with pytest.raises(RuntimeError, match="SCB has 31 values, but weight has 32 rows"):
        layer.load_state_dict(short)


def test_unquantized_checkpoint_into_quantized_layer():
    weight = torch.randn(32, 64)
    layer = quantized(bias=False)
    layer.load_state_dict({"weight": weight})
    expected = Int8Params(weight.clone(), requires_grad=False).to("cpu")
    assert torch.equal(layer.weight.data, expected.data) and torch.equal(layer.weight.SCB, expected.SCB)


def test_tied_plain_weight_works_unquantized():
    embedding = torch.nn.Embedding(100, 64)
    head = Linear8bitLt(64, 100, bias=False, has_fp16_weights=False)
    head.weight = embedding.weight
    head = head.to("cpu")
    x = torch.randn(2, 64)
    torch.testing.assert_close(head(x), x @ embedding.weight.T)


def test_int8_weight_without_scales_is_named():
    with pytest.raises(ArgumentError, match=r"state.SCB, the absmax of their rows, is None"):
        bnb.matmul(torch.randn(1, 4), torch.ones(2, 4, dtype=torch.int8))


def test_conversion_leaves_codes_alone():
    layer = quantized()
    codes = layer.weight.data.clone()
    for convert in (layer.half, layer.float, layer.double, lambda: layer.to(torch.bfloat16), lambda: layer.to("cpu")):
        convert()
        assert torch.equal(layer.weight.data, codes) and layer.weight.SCB.dtype == torch.float32
        assert type(layer.weight) is Int8Params


def test_replayed_dictionary():
    params = quantized().weight
    params._is_hf_initialized = True
    again = Int8Params(params.data, requires_grad=False, **params.__dict__)
    assert again.SCB is params.SCB and again.CB is params.CB
    attributes = dict(params.__dict__)
    attributes.pop("SCB")
    anew = Int8Params(torch.randn(32, 64), requires_grad=False, **attributes).to("cpu")
    assert anew.CB.data_ptr() == anew.data_ptr() and anew.SCB.shape == (32,)


def test_meta_move_frees_the_codes():
    parked = quantized().weight.to("meta")
    assert parked.device.type == "meta" and parked.CB is None and parked.SCB is None


def test_scales_may_live_on_the_state():
    # Offloading hooks clear the one and set the other.
    layer = quantized().eval()
    x = torch.randn(2, 64)
    expected = layer(x)
    layer.state.SCB = None
    assert torch.equal(layer(x), expected)
    layer.state.SCB, layer.weight.SCB = layer.weight.SCB, None
    assert torch.equal(layer(x), expected)


def test_many_threads():
    torch.manual_seed(0)
    inputs = []
    for index in range(8):
        x = 0.1 * torch.randn(index + 1, 64)
        x[:, index * 3] = 10.0 + index
        inputs.append(x)
    serial = quantized(64, 64, threshold=6.0).eval()
    with torch.no_grad():
        expected = [serial(x) for x in inputs]
    layer = quantized(64, 64, threshold=6.0).eval()
    failures: list[str] = []
    barrier = threading.Barrier(8)

    def work(index: int) -> None:
        barrier.wait()
        with torch.no_grad():
            for call in range(200):
                try:
                    if not torch.equal(layer(inputs[index]), expected[index]):
                        failures.append(f"thread {index}, call {call}: other result")
                except Exception as error:
                    failures.append(f"thread {index}, call {call}: {error}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[:3]


def test_deprecated_fields_of_the_state():
    state = bnb.MatmulLtState()
    with pytest.warns(FutureWarning, match="CxB is deprecated"):
        assert state.CxB is None
    state.CxB = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert state.CxB is None
    with pytest.raises(AttributeError, match="nonsense"):
        state.__getattr__("nonsense")
    assert state == bnb.MatmulLtState() and state != bnb.MatmulLtState(CB=torch.zeros(1))
    state.CB = torch.zeros(1)
    state.reset_grads()
    assert state.CB is None


def test_functions_by_their_old_signature():
    layer = quantized(bias=False)
    state = bnb.MatmulLtState(CB=layer.weight.data, SCB=layer.weight.SCB)
    state.has_fp16_weights, state.is_training = False, False
    x = torch.randn(2, 64)
    y = MatMul8bitLt.apply(x, layer.weight, None, None, state)
    assert torch.equal(y, layer.eval()(x))
    out = torch.empty_like(y)
    assert bnb.matmul(x, layer.weight.data, out=out, state=state) is out and torch.equal(out, y)


@pytest.mark.parametrize("training", [False, True])
def test_forward_does_not_depend_on_gradients(training):
    """Activation checkpointing runs a layer once without and once with them."""
    layer = quantized(bias=True).train(training)
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = layer(x)
    assert torch.equal(layer(x.requires_grad_()), expected)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("training", [False, True])
def test_compile(threshold, training):
    layer = quantized(threshold=threshold).train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (3, 5):
        x = torch.randn(rows, 64, requires_grad=training)
        y = compiled(x)
        torch.testing.assert_close(y, layer(x))
        if training:
            y.sum().backward()
            assert x.grad is not None
