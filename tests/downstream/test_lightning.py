"""lightning's precision plugin, whose layers derive from this package's."""

import pytest
import torch
from lightning.fabric.plugins.precision.bitsandbytes import BitsandbytesPrecision

import bitsandbytes as bnb

MODES = {"nf4": False, "nf4-dq": True, "fp4": False, "fp4-dq": True}


def mlp():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))


@pytest.mark.parametrize("mode", MODES)
def test_four_bit(mode):
    plain, inputs = mlp().half(), torch.randn(4, 128).half()
    expected = plain(inputs).float()
    model = BitsandbytesPrecision(mode, torch.float16).convert_module(plain).to("cpu")
    layer = model[0]
    assert isinstance(layer, bnb.nn.Linear4bit)
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.quant_type == mode[:3]
    assert layer.weight.quant_state.nested is MODES[mode]
    assert layer.compute_dtype == torch.float16
    similarity = torch.nn.functional.cosine_similarity(model(inputs).float(), expected, dim=-1)
    assert similarity.min() > 0.97


def test_eight_bit():
    plain, inputs = mlp().half(), torch.randn(4, 128).half()
    expected = plain(inputs).float()
    model = BitsandbytesPrecision("int8").convert_module(plain).to("cpu")
    assert isinstance(model[2], bnb.nn.Linear8bitLt)
    assert model[2].weight.dtype == torch.int8
    similarity = torch.nn.functional.cosine_similarity(model(inputs).float(), expected, dim=-1)
    assert similarity.min() > 0.995


def test_eight_bit_training():
    model = BitsandbytesPrecision("int8-training").convert_module(mlp().half()).to("cpu")
    inputs, target = torch.randn(64, 128).half(), torch.randn(64, 64).half()
    optimizer = bnb.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.mse_loss(model(inputs).float(), target.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_ignored_modules_stay_plain():
    model = BitsandbytesPrecision("nf4", torch.float16, ignore_modules={"2"}).convert_module(mlp())
    assert isinstance(model[0], bnb.nn.Linear4bit)
    assert type(model[2]) is torch.nn.Linear
