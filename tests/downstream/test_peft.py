"""QLoRA and LoRA on 8-bit weights through peft, on the real model."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

import bitsandbytes as bnb

from .conftest import load, logits

pytestmark = pytest.mark.model

FORMATS = ["nf4-nested", "int8"]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(folder, name, **options):
    """A quantized model with LoRA adapters on every linear layer."""
    torch.manual_seed(0)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ALL_LINEAR, "task_type": "CAUSAL_LM", **options}
    return get_peft_model(load(folder, name), LoraConfig(**settings))


def train(model, ids, steps, lr=2e-3):
    """Losses of ``steps`` steps of AdamW8bit on one batch."""
    optimizer = bnb.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def base_bytes(model):
    """Copies of every weight that training must not touch."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("name", FORMATS)
def test_adapter_layers_are_the_quantized_kind(tiny_folder, name):
    model = adapted(tiny_folder, name)
    kind = type(model.base_model.model.model.layers[0].mlp.up_proj)
    assert kind.__module__ == "peft.tuners.lora.bnb"
    assert kind.__name__ == ("Linear8bitLt" if name == "int8" else "Linear4bit")


@pytest.mark.parametrize("name", FORMATS)
def test_real_model_learns_the_text(model_folder, text_ids, name):
    model = adapted(model_folder, name)
    frozen = base_bytes(model)
    losses = train(model, text_ids[:, :96], steps=4)
    assert losses[-1] < losses[0] - 0.5
    for parameter_name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in parameter_name)
    for parameter_name, before in frozen.items():
        assert torch.equal(before, model.get_parameter(parameter_name)), parameter_name


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_reach_the_adapters_only(tiny_folder, text_ids, name):
    model = adapted(tiny_folder, name)
    model(input_ids=text_ids[:, :32], labels=text_ids[:, :32]).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            assert parameter.grad.abs().sum() > 0, parameter_name
        elif "lora_A" not in parameter_name:
            assert parameter.grad is None, parameter_name


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_gradient_checkpointing_changes_no_gradient(tiny_folder, text_ids, name, reentrant):
    ids = text_ids[:, :48]
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = prepare_model_for_kbit_training(
            load(tiny_folder, name),
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if "lora_B" in n})
    for parameter_name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter_name], expected, rtol=1e-3, atol=1e-5)


def test_preparation_casts_the_plain_weights_only(tiny_folder):
    model = prepare_model_for_kbit_training(load(tiny_folder, "nf4-nested"))
    for parameter in model.parameters():
        if isinstance(parameter, bnb.nn.Params4bit):
            assert parameter.dtype == torch.uint8
        else:
            assert parameter.dtype == torch.float32
        assert not parameter.requires_grad


@pytest.mark.parametrize("name", FORMATS)
def test_adapter_save_and_reload(tiny_folder, text_ids, tmp_path, name):
    ids = text_ids[:, :32]
    model = adapted(tiny_folder, name)
    train(model, ids, steps=2)
    model.eval().save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(load(tiny_folder, name), tmp_path).eval()
    assert torch.equal(logits(reloaded, ids), logits(model, ids))


def merged_weight(layer):
    """What the weight below an adapter is in floating point, the adapter included."""
    weight, delta = layer.base_layer.weight, layer.get_delta_weight("default")
    if isinstance(weight, bnb.nn.Params4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).to(delta.dtype) + delta
    return bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB).to(delta.dtype) + delta


@pytest.mark.parametrize("name", FORMATS)
def test_merging_quantizes_the_sum(tiny_folder, name):
    model = adapted(tiny_folder, name, init_lora_weights=False)
    adapter = model.base_model.model.model.layers[1].mlp.up_proj
    expected, before = merged_weight(adapter), adapter.base_layer.weight.data.clone()
    layer = model.eval().merge_and_unload().model.layers[1].mlp.up_proj
    assert type(layer) is (bnb.nn.Linear8bitLt if name == "int8" else bnb.nn.Linear4bit)
    assert not torch.equal(layer.weight.data, before)
    if name == "int8":
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(expected.half())
        assert torch.equal(layer.weight.data, codes)
        assert torch.equal(layer.weight.SCB, scales)
    else:
        packed, state = bnb.functional.quantize_4bit(expected, quant_type="nf4", compress_statistics=True)
        assert torch.equal(layer.weight.data, packed)
        assert torch.equal(layer.weight.quant_state.absmax, state.absmax)


def test_merged_int8_model_keeps_what_was_learned(tiny_folder, text_ids):
    """Not so in 4 bit, whose steps are larger than what a few updates change."""
    ids = text_ids[:, :32]
    model = adapted(tiny_folder, "int8")
    untrained = logits(model.eval(), ids).float()
    train(model.train(), ids, steps=6)
    trained = logits(model.eval(), ids).float()
    distance = (logits(model.merge_and_unload(), ids).float() - trained).norm()
    assert distance < 0.5 * (untrained - trained).norm()


@pytest.mark.parametrize("name", FORMATS)
def test_merge_and_unmerge(tiny_folder, text_ids, name):
    ids = text_ids[:, :32]
    model = adapted(tiny_folder, name)
    train(model, ids, steps=3)
    trained = logits(model.eval(), ids).float()
    model.merge_adapter()
    model.unmerge_adapter()
    similarity = torch.nn.functional.cosine_similarity(logits(model, ids).float(), trained, dim=-1)
    assert similarity.mean() > 0.95


def test_dora_on_four_bit(tiny_folder, text_ids):
    model = adapted(tiny_folder, "nf4-nested", use_dora=True, target_modules=["q_proj", "v_proj"])
    losses = train(model, text_ids[:, :32], steps=3)
    assert losses[-1] < losses[0]
