"""Faults that users of libraries on top of this package have reported, on layers of the real model."""

import concurrent.futures
import copy
import os
import pickle
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

import bitsandbytes as bnb

from .conftest import load, logits, raw

pytestmark = pytest.mark.model

FORMATS = ["nf4-nested", "fp4", "int8"]


def projection(folder, name):
    """A quantized layer of the real model."""
    return load(folder, name).eval().model.layers[1].mlp.gate_proj


def some_inputs(rows=3, dtype=torch.bfloat16):
    return torch.randn(rows, 576, generator=torch.Generator().manual_seed(0)).to(dtype)


# --- copying and saving -------------------------------------------------------------------------------


@pytest.mark.parametrize("after_forward", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_saved_whole_layer_computes_the_same(tiny_folder, tmp_path, name, after_forward):
    layer, inputs = projection(tiny_folder, name), some_inputs()
    if after_forward:
        layer(inputs)
    torch.save(layer, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    duplicate = copy.deepcopy(layer)
    expected = layer(inputs)
    assert torch.equal(loaded(inputs), expected)
    assert torch.equal(duplicate(inputs), expected)
    assert type(loaded.weight) is type(layer.weight)


def test_shallow_and_deep_copies_of_a_four_bit_weight(tiny_folder):
    weight = projection(tiny_folder, "nf4-nested").weight
    shallow, deep, pickled = copy.copy(weight), copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))
    assert shallow.data_ptr() == weight.data_ptr()
    assert shallow.quant_state is weight.quant_state
    assert deep.data_ptr() != weight.data_ptr()
    assert deep.quant_state is not weight.quant_state
    for other in (shallow, deep, pickled):
        assert isinstance(other, bnb.nn.Params4bit)
        assert torch.equal(other, weight)
        assert torch.equal(other.quant_state.absmax, weight.quant_state.absmax)
        for flag in ("bnb_quantized", "quant_type", "blocksize", "quant_storage", "compress_statistics"):
            assert getattr(other, flag) == getattr(weight, flag), flag


@pytest.mark.parametrize("name", FORMATS)
def test_state_dict_of_a_layer_fits_a_safetensors_file(tiny_folder, tmp_path, name):
    layer, inputs = projection(tiny_folder, name), some_inputs()
    state = layer.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    save_file(state, tmp_path / "layer.safetensors")
    reloaded = load_file(tmp_path / "layer.safetensors")
    torch.save(state, tmp_path / "layer.pt")
    safe = torch.load(tmp_path / "layer.pt", weights_only=True)
    for other in (reloaded, safe):
        assert other.keys() == state.keys()
        assert all(torch.equal(raw(other[key]), raw(state[key])) for key in state)
    if name == "int8":
        expected = layer(inputs)
        layer.load_state_dict(reloaded, strict=True)
        assert torch.equal(layer(inputs), expected)
        assert int(state["weight_format"]) == 0


def test_old_eight_bit_checkpoints_name_the_format_in_words(tiny_folder):
    layer, inputs = projection(tiny_folder, "int8"), some_inputs()
    expected = layer(inputs)
    state = {**layer.state_dict(), "weight_format": "row"}
    layer.load_state_dict(state, strict=True)
    assert torch.equal(layer(inputs), expected)


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_storage_dtype_survives_a_reload_and_a_cast(storage):
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", quant_storage=storage).to("cpu")
    assert layer.weight.numel() == 128 * 64 // 2 // storage.itemsize
    state = layer.state_dict()
    rebuilt = bnb.nn.Params4bit.from_prequantized(state.pop("weight"), state, device="cpu")
    cast = copy.deepcopy(layer).to(torch.float16)
    for weight in (rebuilt, cast.weight):
        assert weight.dtype == storage
        assert weight.quant_storage == storage
        assert torch.equal(raw(weight.data), raw(layer.weight.data))
        expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(bnb.functional.dequantize_4bit(weight.data, weight.quant_state), expected)


@pytest.mark.parametrize("kind", [bnb.nn.Linear4bit, bnb.nn.Linear8bitLt])
def test_layer_tied_to_a_plain_embedding_works_or_says_why(kind):
    embedding = torch.nn.Embedding(100, 64)
    options = {"has_fp16_weights": False} if kind is bnb.nn.Linear8bitLt else {}
    head = kind(64, 100, bias=False, **options)
    head.weight = embedding.weight
    inputs = torch.randn(2, 64)
    reason, output = "", None
    try:
        output = head.to("cpu")(inputs)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error)
    if output is None:
        assert "weight" in reason
    else:
        torch.testing.assert_close(output, inputs @ embedding.weight.t(), rtol=0.02, atol=0.05)


# --- sharded training ---------------------------------------------------------------------------------


def test_every_key_of_a_four_bit_state_dict_is_a_path(tiny_folder):
    layer = projection(tiny_folder, "nf4-nested")
    for key, value in layer.state_dict().items():
        found = layer
        for part in key.split("."):
            found = getattr(found, part)
        assert torch.equal(found, value), key
    with pytest.raises(AttributeError):
        _ = layer.weight.no_such_name
    assert not hasattr(bnb.nn.Linear4bit(64, 64).weight, "absmax")


def test_shards_of_a_four_bit_weight_stay_four_bit_weights(tiny_folder):
    weight = projection(tiny_folder, "nf4-nested").weight
    for pieces in (torch.chunk(weight, 2, dim=0), torch.split(weight, weight.shape[0] // 2)):
        assert len(pieces) == 2
        assert torch.equal(torch.cat([piece.data for piece in pieces]), weight.data)
        for piece in pieces:
            assert isinstance(piece, bnb.nn.Params4bit)
            assert piece.bnb_quantized
            assert piece.quant_state is weight.quant_state
            assert (piece.quant_type, piece.blocksize) == (weight.quant_type, weight.blocksize)
            assert piece.quant_storage == weight.quant_storage


# --- compile and threads ------------------------------------------------------------------------------


def test_checkpointed_layers_compile_without_a_graph_break(tiny_folder):
    block = load(tiny_folder, "nf4-nested").model.layers[0].mlp

    def run(inputs):
        return checkpoint(block, inputs, use_reentrant=False)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for rows in (4, 6):
        results = []
        for function in (run, compiled):
            inputs = some_inputs(rows).requires_grad_()
            output = function(inputs)
            output.float().square().sum().backward()
            results.append((output.detach(), inputs.grad))
        torch.testing.assert_close(results[1][0], results[0][0], rtol=0.02, atol=0.02)
        torch.testing.assert_close(results[1][1], results[0][1], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", FORMATS)
def test_one_layer_serves_many_threads(tiny_folder, name):
    layer = projection(tiny_folder, name)
    batches = []
    for thread in range(8):
        generator = torch.Generator().manual_seed(thread)
        inputs = torch.randn(thread + 1, 576, generator=generator).bfloat16()
        inputs[:, thread * 7 : thread * 7 + 2] = 20.0
        batches.append(inputs)
    with torch.no_grad():
        expected = [copy.deepcopy(layer)(inputs) for inputs in batches]

    def call(index):
        with torch.no_grad():
            return [torch.equal(layer(batches[index]), expected[index]) for _ in range(50)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(all(outcomes) for outcomes in pool.map(call, range(8)))


def test_outliers_of_one_prompt_do_not_reach_the_next(tiny_folder):
    layer = projection(tiny_folder, "int8")
    loud, quiet = some_inputs(8) * 0.1, some_inputs(8) * 0.1
    loud[:, 5] = 20.0
    with torch.no_grad():
        expected = copy.deepcopy(layer)(quiet)
        before = layer(quiet)
        layer(loud)
        after = layer(quiet)
    assert torch.equal(before, expected)
    assert torch.equal(after, expected)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(576,), (1, 576), (2, 3, 576), (2, 3, 4, 576), (0, 576), (2, 0, 576)])
def test_activations_of_any_shape(tiny_folder, name, shape):
    layer = projection(tiny_folder, name)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    output = layer(inputs)
    assert output.shape == (*shape[:-1], 1536)
    assert output.dtype == torch.bfloat16
    flat = layer(inputs.detach().reshape(-1, 576))
    assert torch.equal(output.detach().reshape(-1, 1536), flat)
    output.float().sum().backward()
    assert inputs.grad.shape == shape


# --- training -----------------------------------------------------------------------------------------


def test_loss_and_gradients_stay_finite_after_sharding_the_weights(tiny_folder, text_ids):
    """A shard that lost its class trained with loss 0 and gradients of NaN."""
    model, ids = load(tiny_folder, "nf4-nested"), text_ids[:, :32]
    expected = model(input_ids=ids, labels=ids).loss.item()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            shards = torch.chunk(module.weight, 2, dim=0)
            whole = torch.cat([shard.data for shard in shards])
            module.weight = bnb.nn.Params4bit(whole, requires_grad=False, **shards[0].__dict__)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            assert parameter.grad.isfinite().all()
            assert parameter.grad.abs().sum() > 0


def test_paged_optimizer_on_the_cpu_equals_the_unpaged_one(tiny_folder, text_ids):
    ids, results, messages = text_ids[:, :16], [], []
    for kind in (bnb.optim.AdamW8bit, bnb.optim.PagedAdamW8bit):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
        model.model.embed_tokens.weight.requires_grad_(False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-4)
            for _ in range(3):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        messages.append([str(warning.message) for warning in caught])
        results.append(model.state_dict())
    for key in results[0]:
        assert torch.equal(results[0][key], results[1][key]), key
    assert len([message for message in messages[1] if "paged" in message.lower()]) <= 1
    assert not [message for message in messages[1] if "reinstall" in message.lower()]


# --- import -------------------------------------------------------------------------------------------


def test_import_and_a_round_trip_without_a_visible_gpu():
    script = """
        import torch, bitsandbytes as bnb
        x = torch.linspace(-1, 1, 4096).view(64, 64)
        back = bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(x, quant_type="nf4"))
        assert (back - x).abs().max() < 0.16
    """
    environment = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0


@pytest.mark.parametrize("name", ["nf4-nested", "int8"])
def test_forward_leaves_the_state_dict_alone(tiny_folder, text_ids, name):
    """A layout for inference must not reach checkpoints, nor a dequantized or moved model."""
    model, ids = load(tiny_folder, name).eval(), text_ids[:, :17]
    before = {key: raw(value).clone() for key, value in model.state_dict().items()}
    first = logits(model, ids)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(raw(after[key]), value) for key, value in before.items())
    assert torch.equal(logits(model.to("cpu"), ids), first)
