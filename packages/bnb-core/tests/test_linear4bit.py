"""Linear4bit and matmul_4bit: values, gradients, dtypes, shapes."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_product_close, decode_weight_4bit

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes.errors import ArgumentError
from bitsandbytes.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def quantized(inputs=64, outputs=32, **arguments):
    torch.manual_seed(1)
    return Linear4bit(inputs, outputs, **arguments).to("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (5, 64), (2, 3, 64), (2, 3, 4, 64), (0, 64), (2, 0, 64)])
def test_forward_and_backward(dtype, quant_type, nested, shape):
    layer = quantized(quant_type=quant_type, compress_statistics=nested)
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = layer(x)
    W = decode_weight_4bit(layer.weight, layer.weight.quant_state)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 32)
    if x.numel():
        assert_product_close(y, x, W, layer.bias, dtype)
    grad = torch.randn(y.shape).to(dtype)
    y.backward(grad)
    assert x.grad.shape == x.shape and x.grad.dtype == dtype
    assert layer.bias.grad.dtype == layer.bias.dtype
    assert layer.weight.grad is None
    if x.numel():
        assert_product_close(x.grad, grad, W.T, None, dtype)
        expected = grad.double().reshape(-1, 32).sum(0)
        torch.testing.assert_close(layer.bias.grad.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_no_grad_equals_grad(bias):
    layer = quantized(bias=bias)
    x = torch.randn(3, 64)
    with torch.no_grad():
        without = layer(x)
    assert torch.equal(without, layer(x.requires_grad_()))


def test_single_feature():
    layer = Linear4bit(1, 1, quant_type="nf4").to("cpu")
    x = torch.randn(1, requires_grad=True)
    y = layer(x)
    W = decode_weight_4bit(layer.weight, layer.weight.quant_state)
    assert_product_close(y, x, W, layer.bias, torch.float32)
    y.backward()
    assert x.grad.shape == (1,)


def test_gradcheck_through_two_derivatives():
    # float32 is the widest dtype of the op, so the numerical derivative is compared by hand: the op
    # is linear in x, hence f(x + d) - f(x) = grad . d up to rounding.
    layer = quantized(bias=False)
    x = torch.randn(4, 64, requires_grad=True)
    v = torch.randn(4, 32, requires_grad=True)
    (grad,) = torch.autograd.grad((layer(x) * v).sum(), x, create_graph=True)
    u = torch.randn_like(grad)
    (second,) = torch.autograd.grad((grad * u).sum(), v)
    W = decode_weight_4bit(layer.weight, layer.weight.quant_state)
    assert_product_close(second, u, W, None, torch.float32)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("autocast", [False, True])
def test_compute_dtype_is_kept(rows, dtype, autocast):
    layer = quantized(compute_dtype=torch.bfloat16, quant_type="nf4")
    W = decode_weight_4bit(layer.weight, layer.weight.quant_state).bfloat16()
    for _repeat in range(2):
        x = torch.randn(rows, 64).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
        assert y.dtype == dtype
        assert layer.compute_dtype == torch.bfloat16
        assert layer.bias.dtype == torch.float32
        assert_product_close(y, x.bfloat16(), W, layer.bias.bfloat16(), torch.bfloat16)
        y.sum().backward()
        assert x.grad.dtype == dtype and layer.bias.grad.dtype == torch.float32


def test_compute_dtype_follows_the_first_input():
    layer = quantized()
    assert layer(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16
    assert layer.compute_dtype == torch.bfloat16
    assert layer(torch.randn(2, 64)).dtype == torch.float32
    assert layer.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_in_input_output_layout(rows, dtype):
    W = torch.randn(128, 64).to(dtype)
    packed, state = F.quantize_4bit(W, quant_type="nf4")
    x = torch.randn(rows, 128).to(dtype)
    y = bnb.matmul_4bit(x, packed, quant_state=state, bias=torch.ones(64))
    assert y.shape == (rows, 64)
    assert_product_close(y, x, decode_weight_4bit(packed, state).T, torch.ones(64), dtype)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2)])
def test_weight_of_one_byte(shape):
    W = torch.randn(shape)
    packed, state = F.quantize_4bit(W, quant_type="nf4")
    x = torch.randn(3, shape[1])
    y = bnb.matmul_4bit(x, packed.t(), quant_state=state)
    assert_product_close(y, x, decode_weight_4bit(packed, state), None, torch.float32)


def test_out_argument():
    layer = quantized(bias=False)
    x, out = torch.randn(3, 64), torch.empty(3, 32)
    result = bnb.matmul_4bit(x, layer.weight.t(), layer.weight.quant_state, out=out)
    assert result is out
    assert torch.equal(out, layer(x))


def test_missing_state_is_named():
    with pytest.raises(ArgumentError, match="quant_state is None"):
        bnb.matmul_4bit(torch.randn(1, 4), torch.zeros(8, 1, dtype=torch.uint8), quant_state=None)


def test_unquantized_layer_says_what_to_do():
    with pytest.raises(ArgumentError, match="not quantized yet; move the layer"):
        Linear4bit(8, 8)(torch.randn(1, 8))


def test_wrong_input_names_the_argument():
    layer = quantized()
    with pytest.raises(ArgumentError, match=r"A has shape \(2, 63\), expected 64 input features"):
        layer(torch.randn(2, 63))
    with pytest.raises(ArgumentError, match=r"A has dtype torch\.int64"):
        layer(torch.zeros(2, 64, dtype=torch.int64))


def test_tied_plain_weight_works_unquantized():
    embedding = torch.nn.Embedding(100, 64)
    head = Linear4bit(64, 100, bias=False)
    head.weight = embedding.weight
    head = head.to("cpu")
    x = torch.randn(2, 64)
    torch.testing.assert_close(head(x), x @ embedding.weight.T)


@pytest.mark.parametrize(("cls", "quant_type"), [(LinearFP4, "fp4"), (LinearNF4, "nf4")])
def test_named_layers(cls, quant_type):
    layer = cls(64, 32, False, torch.bfloat16).to("cpu")
    assert layer.weight.quant_state.quant_type == quant_type and layer.compute_dtype == torch.bfloat16


def test_state_restored_from_the_layer():
    # What FSDP does: a plain parameter around its own buffer.
    layer = quantized()
    x = torch.randn(2, 64)
    expected = layer(x)
    layer.weight = torch.nn.Parameter(layer.weight.data.clone(), requires_grad=False)
    assert torch.equal(layer(x), expected)
    assert isinstance(layer.weight, Params4bit)


def test_training_reduces_the_loss():
    torch.manual_seed(0)
    model = torch.nn.Sequential(Linear4bit(16, 32), torch.nn.ReLU(), Linear4bit(32, 1)).to("cpu")
    adapter = torch.nn.Linear(16, 16)
    x = torch.randn(64, 16)
    target = x.sum(1, keepdim=True)
    optimizer = torch.optim.Adam([*adapter.parameters(), model[0].bias, model[2].bias], lr=0.02)
    losses = []
    for _step in range(60):
        loss = torch.nn.functional.mse_loss(model(adapter(x)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("nested", [False, True])
def test_compile_with_activation_checkpointing(nested):
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        *(Linear4bit(64, 64, compute_dtype=torch.bfloat16, compress_statistics=nested) for _index in range(3))
    ).to("cpu")

    def run(x):
        return checkpoint(layers, x, use_reentrant=False)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for rows in (4, 7):
        x = torch.randn(rows, 64, requires_grad=True)
        other = x.detach().clone().requires_grad_()
        eager, traced = run(x), compiled(other)
        torch.testing.assert_close(traced, eager)
        eager.sum().backward()
        traced.sum().backward()
        torch.testing.assert_close(other.grad, x.grad)


def test_compile_inference_and_new_layer():
    layer = quantized(compute_dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (1, 5, 9):
            x = torch.randn(rows, 64)
            torch.testing.assert_close(compiled(x), layer(x))
