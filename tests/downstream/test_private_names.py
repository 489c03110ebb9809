"""What libraries do with this package beyond its documented interface, in their own way of doing it."""

import ast
import copy
import importlib
import inspect
import textwrap

import pytest
import torch
from accelerate.utils import set_module_tensor_to_device

import bitsandbytes as bnb

FOUR_BIT_ATTRIBUTES = {
    "quant_state",
    "blocksize",
    "compress_statistics",
    "quant_type",
    "quant_storage",
    "module",
    "bnb_quantized",
}


def four_bit_layer(**options):
    torch.manual_seed(0)
    return bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", **options)


def eight_bit_layer(**options):
    torch.manual_seed(0)
    return bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False, threshold=6.0, **options)


# --- parameters are rebuilt from their own attributes -------------------------------------------------


def test_attributes_of_a_four_bit_parameter_live_in_its_dict():
    assert set(four_bit_layer().weight.__dict__) >= FOUR_BIT_ATTRIBUTES
    assert set(four_bit_layer().to("cpu").weight.__dict__) >= FOUR_BIT_ATTRIBUTES


@pytest.mark.parametrize("strangers", [{}, {"_is_hf_initialized": True, "source_cls": torch.nn.Linear}])
def test_four_bit_parameter_is_rebuilt_while_loading(strangers):
    """transformers and diffusers: a value for a parameter on the meta device."""
    with torch.device("meta"):
        layer = four_bit_layer(compress_statistics=True)
    value = torch.randn(64, 128)
    old = layer.weight
    old.__dict__.update(strangers)
    layer.weight = bnb.nn.Params4bit(value, requires_grad=False, **old.__dict__).to("cpu")
    expected, state = bnb.functional.quantize_4bit(value, quant_type="nf4", compress_statistics=True)
    assert torch.equal(layer.weight, expected)
    assert torch.equal(layer.weight.quant_state.absmax, state.absmax)
    assert layer.weight.bnb_quantized


def test_four_bit_parameter_is_rebuilt_when_adapters_are_merged():
    """peft: public attributes only, ``bnb_quantized`` reset, the data replaced."""
    layer = four_bit_layer().to("cpu")
    attributes = {name: value for name, value in layer.weight.__dict__.items() if not name.startswith("_")}
    attributes["bnb_quantized"] = False
    attributes["requires_grad"] = False
    attributes.pop("data", None)
    merged = torch.randn(64, 128)
    weight = bnb.nn.Params4bit(merged, **attributes).to("cpu")
    assert torch.equal(weight, bnb.functional.quantize_4bit(merged, quant_type="nf4", compress_statistics=True)[0])
    assert weight.quant_state.shape == merged.shape


def test_four_bit_parameter_takes_every_attribute_by_keyword():
    """lightning, axolotl and unsloth build a parameter that is quantized already."""
    packed, state = bnb.functional.quantize_4bit(torch.randn(64, 128), quant_type="nf4")
    weight = bnb.nn.Params4bit(
        data=packed,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=False,
        quant_type="nf4",
        quant_storage=torch.uint8,
        module=None,
        bnb_quantized=True,
    )
    assert torch.equal(weight.to("cpu"), packed)
    assert weight.to("cpu").quant_state.quant_type == "nf4"


@pytest.mark.parametrize("with_module", [True, False])
def test_four_bit_parameter_from_a_checkpoint(with_module):
    source = four_bit_layer(compress_statistics=True).to("cpu")
    entries = {f"layer.{key}": value for key, value in source.state_dict().items()}
    layer = four_bit_layer()
    options = {"module": layer} if with_module else {}
    layer.weight = bnb.nn.Params4bit.from_prequantized(
        data=entries.pop("layer.weight"),
        quantized_stats=entries,
        requires_grad=False,
        device=torch.device("cpu"),
        **options,
    )
    inputs = torch.randn(3, 128)
    assert torch.equal(layer(inputs), source(inputs))
    if with_module:
        assert layer.quant_state is layer.weight.quant_state


@pytest.mark.parametrize("strangers", [{}, {"_is_hf_initialized": True}])
def test_eight_bit_parameter_is_rebuilt_while_loading(strangers):
    with torch.device("meta"):
        layer = eight_bit_layer()
    value = torch.randn(64, 128).half()
    attributes = {**layer.weight.__dict__, **strangers}
    attributes.pop("SCB", None)
    layer.weight = bnb.nn.Int8Params(value, requires_grad=False, **attributes).to("cpu")
    rows, scales, _ = bnb.functional.int8_vectorwise_quant(value)
    assert torch.equal(layer.weight.data, rows)
    assert torch.equal(layer.weight.SCB, scales)


def test_eight_bit_weights_from_a_checkpoint_are_not_quantized_again():
    """transformers and diffusers: int8 data first, its scales set on the parameter afterwards."""
    source = eight_bit_layer().to("cpu")
    inputs = torch.randn(3, 128, dtype=torch.float16)
    expected = source(inputs)
    state = source.state_dict()
    with torch.device("meta"):
        layer = eight_bit_layer()
    attributes = {name: value for name, value in layer.weight.__dict__.items() if name != "SCB"}
    layer.weight = bnb.nn.Int8Params(state["weight"], requires_grad=False, **attributes).to("cpu")
    layer.weight.SCB = state["SCB"]
    assert torch.equal(layer.weight.data, state["weight"])
    assert torch.equal(layer(inputs), expected)


def test_eight_bit_parameter_keeps_both_names_through_moves():
    weight = bnb.nn.Int8Params(torch.randn(8, 16), has_fp16_weights=False, requires_grad=False)
    moved = weight.to("cpu").to("cpu")
    assert moved.CB.dtype == torch.int8
    assert moved.SCB.shape == (8,)


def test_storage_dtype_is_set_on_a_parameter_without_data():
    """transformers gives weights on the meta device their final dtype before it quantizes anything."""
    with torch.device("meta"):
        four, eight = four_bit_layer(quant_storage=torch.bfloat16), eight_bit_layer()
    four.weight.data = four.weight.data.to(four.weight.quant_storage)
    eight.weight.data = eight.weight.data.to(torch.int8)
    assert (four.weight.dtype, eight.weight.dtype) == (torch.bfloat16, torch.int8)
    assert (type(four.weight), type(eight.weight)) == (bnb.nn.Params4bit, bnb.nn.Int8Params)


# --- names and classes --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [four_bit_layer, eight_bit_layer])
def test_classes_are_told_by_name(make):
    layer = make().to("cpu")
    assert type(layer).__name__ in {"Linear4bit", "Linear8bitLt"}
    assert type(layer.weight).__name__ in {"Params4bit", "Int8Params"}
    assert type(layer).__module__.startswith("bitsandbytes")
    assert type(layer.weight).__module__.startswith("bitsandbytes")
    twin = copy.deepcopy(layer)
    assert type(twin.weight) is type(layer.weight)


def test_an_unquantized_parameter_has_no_quant_state_that_is_true():
    assert not getattr(four_bit_layer().weight, "quant_state", None)
    assert getattr(eight_bit_layer().weight, "SCB", None) is None


def test_what_is_read_when_an_adapter_wraps_a_layer():
    layer = four_bit_layer()
    assert layer.compute_dtype == torch.bfloat16
    assert layer.weight.compress_statistics is True
    assert layer.weight.quant_type == "nf4"
    assert layer.weight.quant_storage.itemsize == 1
    eight = eight_bit_layer()
    assert (eight.state.has_fp16_weights, eight.state.threshold, eight.index) == (False, 6.0, None)


def test_state_of_an_eight_bit_layer_can_be_cleared():
    """accelerate clears it after each forward of an offloaded layer, and sets weight and scales anew."""
    layer = eight_bit_layer().to("cpu")
    inputs = torch.randn(3, 128, dtype=torch.float16)
    saved = {key: value.clone() for key, value in layer.state_dict().items()}
    expected = layer(inputs)
    layer.state.SCB = None
    layer.state.CxB = None
    layer.state.reset_grads()
    set_module_tensor_to_device(layer, "weight", "meta")
    set_module_tensor_to_device(
        layer, "weight", torch.device("cpu"), value=saved["weight"], fp16_statistics=saved["SCB"]
    )
    assert torch.equal(layer(inputs), expected)


def test_matmul_with_a_state_that_is_filled_by_hand():
    """The plugin of vLLM."""
    weight = torch.randn(64, 128).half()
    rows, scales, _ = bnb.functional.int8_vectorwise_quant(weight)
    state = bnb.MatmulLtState()
    state.CB, state.SCB = rows, scales
    state.threshold, state.has_fp16_weights, state.is_training, state.use_pool = 6.0, False, False, False
    inputs = torch.randn(5, 128).half()
    expected = inputs.double() @ (rows.double() * scales.double()[:, None] / 127).t()
    error = (bnb.matmul(inputs, rows, state=state).double() - expected).norm() / expected.norm()
    assert error < 0.02


def test_four_bit_matmul_writes_into_a_given_tensor():
    """unsloth and the plugin of vLLM."""
    packed, state = bnb.functional.quantize_4bit(torch.randn(64, 128), quant_type="nf4")
    inputs, bias, out = torch.randn(5, 128), torch.randn(64), torch.empty(5, 64)
    result = bnb.matmul_4bit(inputs, packed.t(), bias=bias, quant_state=state, out=out)
    expected = inputs @ bnb.functional.dequantize_4bit(packed, state).t() + bias
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_statistics_are_dequantized_by_position():
    """unsloth and the plugin of vLLM undo double quantization by hand."""
    weight = torch.randn(256, 256)
    _, nested = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    _, plain = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    absmax = bnb.functional.dequantize_blockwise(nested.absmax, nested.state2) + nested.offset
    torch.testing.assert_close(absmax.flatten(), plain.absmax.flatten(), rtol=0.05, atol=0.02)
    assert nested.state2.code.numel() == 256
    assert nested.state2.blocksize == 256


@pytest.mark.parametrize(
    "name",
    [
        "bitsandbytes.backends.cuda.ops",
        "bitsandbytes.cextension",
        "bitsandbytes.cuda_specs",
        "bitsandbytes.nn.modules",
        "bitsandbytes.nn.parametrize",
        "bitsandbytes.optim.optimizer",
    ],
)
def test_modules_that_others_import(name):
    assert importlib.import_module(name).__name__ == name


def test_methods_that_others_replace(monkeypatch):
    """axolotl replaces how an 8-bit layer is saved, unsloth the forward pass of a 4-bit layer."""
    layers = [eight_bit_layer().to("cpu"), four_bit_layer().to("cpu")]
    monkeypatch.setattr(
        bnb.nn.Linear8bitLt,
        "_save_to_state_dict",
        lambda self, destination, prefix, keep_vars: destination.update({f"{prefix}replaced": torch.ones(1)}),
    )
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda self, x: x + 1)
    assert list(layers[0].state_dict()) == ["replaced"]
    assert torch.equal(layers[1](torch.zeros(2)), torch.ones(2))


def test_names_that_others_import():
    assert callable(bnb.nn.modules.fix_4bit_weight_quant_state_from_module)
    assert callable(bnb.nn.parametrize.replace_parameter_4bit)
    assert hasattr(torch.ops.bitsandbytes, "gemm_4bit")


def test_source_of_the_optimizer_step_can_be_read():
    """unsloth rewrites it and leaves a shape that it does not know alone."""
    source = textwrap.dedent(inspect.getsource(bnb.optim.optimizer.Optimizer8bit.step))
    assert any(isinstance(node, ast.FunctionDef) and node.name == "step" for node in ast.walk(ast.parse(source)))


@pytest.mark.parametrize(("name", "bits"), [("AdamW", 32), ("AdamW32bit", 32), ("Lion", 32), ("Adagrad32bit", 32)])
def test_bits_of_an_optimizer_can_be_asked(name, bits):
    """accelerate, for DeepSpeed."""
    optimizer = getattr(bnb.optim, name)([torch.nn.Parameter(torch.zeros(8))])
    assert getattr(optimizer, "optim_bits", optimizer.args.optim_bits) == bits


def test_arguments_of_an_optimizer_can_be_asked():
    """litgpt passes the options that the constructor names."""
    names = inspect.signature(bnb.optim.PagedAdamW).parameters
    assert {"params", "lr", "betas", "eps", "weight_decay"} <= names.keys()


def test_a_pointer_to_a_tensor():
    tensor = torch.arange(4.0)
    assert bnb.functional.get_ptr(tensor).value == tensor.data_ptr()
    assert bnb.functional.get_ptr(None) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU backend may offer the symbols")
@pytest.mark.parametrize("symbol", ["cdequantize_blockwise_fp32", "cgemm_4bit_inference_naive_bf16"])
def test_a_missing_c_symbol_can_be_bound_but_not_called(symbol):
    """axolotl binds symbols when it is imported; unsloth takes a symbol with ``restype`` for a real one."""
    bound = getattr(bnb.functional.lib, symbol)
    assert not hasattr(bound, "restype")
    with pytest.raises(RuntimeError, match=symbol):
        bound(None, 1)
