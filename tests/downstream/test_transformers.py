"""Unmodified transformers on the real model: load, generate, judge, save, move, copy."""

import copy
import pickle

import measure
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import bitsandbytes as bnb

from .conftest import FORMATS, load, logits, raw

pytestmark = pytest.mark.model

FOUR_BIT = [name for name in FORMATS if not name.startswith("int8")]
EIGHT_BIT = [name for name in FORMATS if name.startswith("int8")]

#: Largest perplexity and checkpoint size that each format may have, as multiples of the bf16 model's.
LIMITS = {
    "nf4-nested": (1.35, 0.42),
    "fp4": (1.6, 0.44),
    "nf4-bf16-storage": (1.35, 0.44),
    "int8": (1.05, 0.61),
    "int8-no-outliers": (1.15, 0.61),
}


def quantized_layers(model):
    return [module for module in model.modules() if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))]


@pytest.mark.parametrize("name", FORMATS)
def test_every_linear_but_the_head_is_quantized(quantized, name):
    model = quantized(name)
    layers = quantized_layers(model)
    assert len(layers) == 7 * model.config.num_hidden_layers
    for layer in layers:
        assert type(layer.weight).__name__ == ("Int8Params" if name in EIGHT_BIT else "Params4bit")
        assert type(layer).__module__.startswith("bitsandbytes")
        assert not layer.weight.requires_grad
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("name", FOUR_BIT)
def test_storage_of_four_bit_weights(quantized, name):
    storage = torch.bfloat16 if name == "nf4-bf16-storage" else torch.uint8
    for layer in quantized_layers(quantized(name)):
        assert layer.weight.dtype == storage
        assert layer.weight.nbytes == layer.in_features * layer.out_features // 2
        assert layer.weight.quant_state.nested == (name == "nf4-nested")
        assert layer.weight.quant_state.dtype == torch.bfloat16


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_storage_of_eight_bit_weights(quantized, name):
    for layer in quantized_layers(quantized(name)):
        assert layer.weight.dtype == torch.int8
        assert layer.weight.SCB.shape == (layer.out_features,)
        assert layer.state.threshold == (6.0 if name == "int8" else 0.0)


@pytest.mark.parametrize("name", FORMATS)
def test_quality_and_size(quantized, reference, text_ids, name):
    perplexity_limit, size_limit = LIMITS[name]
    ids = text_ids[:, :1024]
    ratio = measure.perplexity(quantized(name), ids) / measure.perplexity(reference, ids)
    assert 0.9 < ratio < perplexity_limit
    assert measure.weight_bytes(quantized(name)) < size_limit * measure.weight_bytes(reference)


@pytest.mark.parametrize("name", ["nf4-nested", "int8"])
def test_answers_a_question(quantized, tokenizer, name):
    answer = measure.answer(quantized(name), tokenizer, "What is the capital of France?", tokens=24)
    assert "Paris" in answer


#: Largest relative error of logits, in the norm. The model in bfloat16 makes 0.03, since products of other shapes are
#: summed in another order; outlier columns of int8 are those of the whole batch.
@pytest.mark.parametrize(("name", "limit"), [("nf4-nested", 0.1), ("int8", 0.3)])
def test_batch_with_padding_generates_as_alone(quantized, tokenizer, name, limit):
    texts = ["The capital of France is", "One, two, three, four,"]
    options = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    tokenizer.padding_side = "left"
    together = quantized(name).generate(**tokenizer(texts, return_tensors="pt", padding=True), **options)
    for row, text in enumerate(texts):
        alone = quantized(name).generate(**tokenizer(text, return_tensors="pt"), **options)
        for step in range(4):
            one, two = together.logits[step][row].float(), alone.logits[step][0].float()
            assert (one - two).norm() < limit * two.norm()
            # Where two tokens are as good as each other, either may be chosen; the texts differ from there on.
            if one.argmax() != two.argmax():
                assert two.max() - two[one.argmax()] < 2 * (one - two).abs().max()
                break
            assert together.sequences[row, step - 4] == alone.sequences[0, step - 4]


@pytest.mark.parametrize("name", FORMATS)
def test_save_and_reload_is_bit_identical(quantized, text_ids, tmp_path, name):
    model, ids = quantized(name), text_ids[:, :33]
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(reloaded, ids), logits(model, ids))
    state, reloaded_state = model.state_dict(), reloaded.state_dict()
    assert state.keys() == reloaded_state.keys()
    for key, tensor in state.items():
        assert tensor.dtype == reloaded_state[key].dtype, key
        assert torch.equal(raw(tensor), raw(reloaded_state[key])), key


@pytest.mark.parametrize("name", ["nf4-nested", "int8"])
def test_keys_in_the_checkpoint_file(quantized, tmp_path, name):
    quantized(name).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = {key.partition("layers.0.mlp.up_proj.")[2] for key in file.keys()} - {""}  # noqa: SIM118
    if name == "int8":
        assert {"weight", "SCB"} <= keys <= {"weight", "SCB", "weight_format"}
    else:
        statistics = {"absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4"}
        assert keys == {"weight"} | {f"weight.{key}" for key in statistics}


def test_sharded_checkpoint(quantized, text_ids, tmp_path):
    model, ids = quantized("nf4-nested"), text_ids[:, :17]
    model.save_pretrained(tmp_path, max_shard_size="30MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(logits(reloaded, ids), logits(model, ids))


@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_gives_a_plain_model(tiny_folder, text_ids, name):
    model, ids = load(tiny_folder, name).eval(), text_ids[:, :17]
    expected = logits(model, ids).float()
    plain = model.dequantize()
    assert not quantized_layers(plain)
    # The plain model multiplies with the same weights, rounded to bf16; int8 also rounds its activations.
    similarity = torch.nn.functional.cosine_similarity(logits(plain.bfloat16(), ids).float(), expected, dim=-1)
    assert similarity.min() > (0.98 if name in EIGHT_BIT else 0.998)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
@pytest.mark.parametrize("name", ["nf4-nested", "int8"])
def test_every_device_map_gives_the_same_model(tiny_folder, text_ids, name, device_map):
    ids = text_ids[:, :17]
    expected = logits(load(tiny_folder, name), ids)
    model = load(tiny_folder, name, device_map=device_map)
    if model.device.type == "cpu":
        assert torch.equal(logits(model, ids), expected)
    else:
        torch.testing.assert_close(logits(model, ids.to(model.device)).cpu(), expected, rtol=0.05, atol=0.5)


@pytest.mark.parametrize("name", ["nf4-nested", "int8"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same(tiny_folder, text_ids, name, duplicate):
    model, ids = load(tiny_folder, name).eval(), text_ids[:, :17]
    before = logits(model, ids)
    twin = duplicate(model)
    assert torch.equal(logits(twin, ids), before)
    for layer, other in zip(quantized_layers(model), quantized_layers(twin), strict=True):
        assert type(other.weight) is type(layer.weight)
        assert other.weight.data_ptr() != layer.weight.data_ptr()


@pytest.mark.parametrize("name", ["nf4-nested", "nf4-bf16-storage", "int8"])
def test_moving_a_model_keeps_its_weights(tiny_folder, text_ids, name):
    model, ids = load(tiny_folder, name).eval(), text_ids[:, :17]
    before = logits(model, ids)
    for target in ["cpu", torch.device("cpu")]:
        model.to(target)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("name", ["nf4-nested", "int8"])
def test_casting_a_quantized_model_is_refused(tiny_folder, name):
    with pytest.raises(ValueError, match="cast"):
        load(tiny_folder, name).to(torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["nf4-nested", "int8"])
def test_other_dtypes(tiny_folder, text_ids, name, dtype):
    ids = text_ids[:, :17]
    expected = logits(load(tiny_folder), ids).float()
    output = logits(load(tiny_folder, name, dtype=dtype), ids)
    assert output.dtype == dtype
    similarity = torch.nn.functional.cosine_similarity(output.float(), expected, dim=-1)
    assert similarity.mean() > 0.95


def test_skipped_modules_stay_plain(tiny_folder):
    config = FORMATS["nf4-nested"]()
    config.llm_int8_skip_modules = ["down_proj", "lm_head"]
    model = load(tiny_folder, quantization_config=config)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
