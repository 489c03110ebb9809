"""accelerate: quantizing loads and offloading hooks."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model, set_module_tensor_to_device
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import bitsandbytes as bnb

from .conftest import load, logits

pytestmark = pytest.mark.model

CONFIGS = {
    "nf4-nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bf16",
    },
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_load_and_quantize_model(tiny_folder, text_ids, tmp_path, name):
    # accelerate refuses the string "cpu" for 4-bit weights, and safetensors refuses a torch.device: hence a .bin file.
    ids, file = text_ids[:, :17], tmp_path / "pytorch_model.bin"
    torch.save(load_file(tiny_folder / "model.safetensors"), file)
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_folder), dtype=torch.bfloat16)
    empty.tie_weights()
    config = BnbQuantizationConfig(torch_dtype=torch.bfloat16, skip_modules=["lm_head"], **CONFIGS[name])
    model = load_and_quantize_model(
        empty, config, weights_location=str(file), device_map={"": torch.device("cpu")}
    ).eval()
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
    assert layer.weight.dtype in (torch.uint8, torch.int8)
    expected = logits(load(tiny_folder, name).eval(), ids)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0.02, atol=0.2)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_come_back_for_each_forward(tiny_folder, text_ids, tmp_path, name, where):
    ids = text_ids[:, :17]
    model = load(tiny_folder, name).eval()
    expected = logits(model, ids)
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    for _ in range(2):
        assert torch.equal(logits(model, ids), expected)
        assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    remove_hook_from_submodules(model)


@pytest.mark.parametrize("kind", [bnb.nn.Linear4bit, bnb.nn.Linear8bitLt])
def test_setting_a_weight_quantizes_it(kind):
    torch.manual_seed(0)
    options = {"has_fp16_weights": False} if kind is bnb.nn.Linear8bitLt else {"quant_type": "nf4"}
    weight, inputs = torch.randn(32, 64), torch.randn(4, 64)
    direct = kind(64, 32, bias=False, **options)
    direct.weight.data = weight.clone()
    direct.to("cpu")
    with init_empty_weights():
        layer = kind(64, 32, bias=False, **options)
    set_module_tensor_to_device(layer, "weight", torch.device("cpu"), value=weight)
    assert type(layer.weight) is type(direct.weight)
    torch.testing.assert_close(layer(inputs), direct(inputs), rtol=0.01, atol=0.05)
