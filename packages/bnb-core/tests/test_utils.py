"""Helpers around models."""

from __future__ import annotations

import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, OutlierAwareLinear, Params4bit
from bitsandbytes.utils import OutlierTracer, execute_and_return, find_outlier_dims, replace_linear


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.block = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8, bias=False))
        self.lm_head = torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.lm_head(self.block(x))


@pytest.mark.parametrize(("cls", "parameter"), [(Linear4bit, Params4bit), (Linear8bitLt, Int8Params)])
def test_replace_linear(cls, parameter):
    model = Model()
    weight = model.block[0].weight.detach().clone()
    assert replace_linear(model, cls, copy_weights=True) is model
    assert isinstance(model.block[0], cls) and isinstance(model.block[2], cls)
    assert type(model.lm_head) is torch.nn.Linear
    assert type(model.block[0].weight) is parameter and torch.equal(model.block[0].weight.data, weight)
    assert model.block[2].bias is None
    assert model.to("cpu")(torch.randn(2, 8)).shape == (2, 4)


def test_replace_linear_calls_the_method():
    class Marked(torch.nn.Linear):
        marked = False

        def mark(self):
            self.marked = True

    model = replace_linear(Model(), Marked, skip_modules=(), post_processing_function="mark")
    assert model.block[0].marked and model.lm_head.marked


def test_find_outlier_dims():
    torch.manual_seed(0)
    weight = torch.randn(64, 100)
    weight[:, 17] *= 30
    assert find_outlier_dims(weight).tolist() == [17]
    assert find_outlier_dims(weight, topk=1).tolist() == [17]
    drawn = find_outlier_dims(weight, topk=5, rdm=True)
    assert drawn.shape == (5,) and drawn.max() < 100
    with pytest.raises(ValueError, match="topk"):
        find_outlier_dims(weight, rdm=True)


def test_outlier_tracer_and_layer():
    class Doubled(OutlierAwareLinear):
        def forward_with_outliers(self, x, outlier_idx):
            self.columns = outlier_idx
            return torch.nn.functional.linear(x, self.weight, self.bias)

        def quantize_weight(self, w, outlier_idx):
            return 2 * w

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    with torch.no_grad():
        model[1].weight[:, 9] *= 40
    tracer = OutlierTracer.get_instance()
    tracer.initialize(model)
    x = torch.randn(16, 32)
    x[0, 3] = 12.0
    model(x)
    assert 3 in tracer.get_outliers(model[0].weight).tolist()
    assert tracer.get_outliers(model[1].weight).tolist() == [9]
    assert tracer.get_outliers(torch.nn.Parameter(torch.zeros(2, 2))) is None
    model(x)
    assert not model[0]._forward_pre_hooks, "the hooks remove themselves after one pass"

    layer = Doubled(32, 32)
    layer.weight = model[1].weight
    before = layer.weight.detach().clone()
    layer(x)
    layer(x)
    assert torch.equal(layer.weight, 2 * before), "quantized once"
    assert layer.columns.tolist() == [9]
    with pytest.raises(NotImplementedError):
        OutlierAwareLinear(2, 2).forward_with_outliers(x, None)
    with pytest.raises(RuntimeError, match="get_instance"):
        OutlierTracer()


def test_execute_and_return():
    assert execute_and_return("echo one two") == ("one two", "")


def test_top_level_names():
    assert "multi_backend" in bnb.features and "cpu" in bnb.supported_torch_devices
    assert bnb.nn.Linear4bit is bnb.nn.modules.Linear4bit is bnb.modules.Linear4bit
    assert bnb.nn.Linear4bit.__module__.startswith("bitsandbytes")
