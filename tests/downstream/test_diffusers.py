"""A diffusion transformer quantized by diffusers while it is loaded.

diffusers refuses to quantize on a machine without a GPU before it looks at anything else. Only that check
is switched off here: what follows is its own code on the device that this package supports.
"""

import pytest
import torch
from diffusers import BitsAndBytesConfig, PixArtTransformer2DModel
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer
from diffusers.quantizers.bitsandbytes.utils import dequantize_and_replace

import bitsandbytes as bnb

CONFIGS = {
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "nf4-nested": lambda: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture(autouse=True)
def _without_the_check_for_a_gpu(monkeypatch):
    for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small transformer with random weights, as a checkpoint."""
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=128,
        sample_size=8,
        patch_size=2,
        caption_channels=64,
        use_additional_conditions=False,
        norm_num_groups=1,
    )
    target = tmp_path_factory.mktemp("pixart")
    model.to(torch.bfloat16).save_pretrained(target)
    return target


def load(folder, name=None):
    options = {} if name is None else {"quantization_config": CONFIGS[name](), "device_map": {"": "cpu"}}
    return PixArtTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16, **options).eval()


@torch.inference_mode()
def run(model):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.bfloat16)
    text = torch.randn(1, 6, 64, generator=generator, dtype=torch.bfloat16)
    return model(image, encoder_hidden_states=text, timestep=torch.tensor([10])).sample


@pytest.mark.parametrize("name", CONFIGS)
def test_quantized_while_loading(folder, name):
    model = load(folder, name)
    kind = bnb.nn.Linear8bitLt if name == "int8" else bnb.nn.Linear4bit
    layers = [module for module in model.modules() if isinstance(module, kind)]
    assert len(layers) >= 20
    assert {layer.weight.dtype for layer in layers} == {torch.int8 if name == "int8" else torch.uint8}
    expected, output = run(load(folder)).float(), run(model).float()
    error = (output - expected).norm() / expected.norm()
    assert error < (0.05 if name == "int8" else 0.25)


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_reload_is_bit_identical(folder, tmp_path, name):
    model = load(folder, name)
    expected = run(model)
    model.save_pretrained(tmp_path)
    reloaded = PixArtTransformer2DModel.from_pretrained(
        tmp_path, torch_dtype=torch.bfloat16, device_map={"": "cpu"}
    ).eval()
    assert torch.equal(run(reloaded), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_dequantize_gives_a_plain_model(folder, name):
    model = load(folder, name)
    expected = run(model).float()
    # `model.dequantize()` itself moves 4-bit models to a GPU first.
    plain = dequantize_and_replace(model, modules_to_not_convert=[], quantization_config=CONFIGS[name]())
    assert not [m for m in plain.modules() if isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))]
    output = run(plain).float()
    assert (output - expected).norm() / expected.norm() < 0.05
