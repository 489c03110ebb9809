"""4-bit quantization of arbitrary parameters."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import parametrize

import bitsandbytes.functional as F
from bitsandbytes.nn.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized


class Experts(torch.nn.Module):
    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(4, 64, 128, dtype=dtype))
        self.seen = []

    def forward(self, x):
        self.seen = [self.w, self.w]
        return x @ self.w[0].to(x.dtype)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_replace(nested, quant_type):
    torch.manual_seed(0)
    module = Experts()
    original = module.w.detach().clone()
    replace_parameter_4bit(module, "w", compress_statistics=nested, quant_type=quant_type, blocksize=64)
    packed, state = F.quantize_4bit(original, blocksize=64, compress_statistics=nested, quant_type=quant_type)
    assert module.w.shape == (4, 64, 128) and module.w.dtype == torch.bfloat16 and not module.w.requires_grad
    assert torch.equal(module.w, F.dequantize_4bit(packed, state))
    if quant_type == "nf4":
        error = (module.w.float() - original.float()).abs().mean()
        assert abs(error - 0.073) < 0.003
    keys = {"w", "w.absmax", "w.quant_map", f"w.quant_state.bitsandbytes__{quant_type}"}
    if nested:
        keys |= {"w.nested_absmax", "w.nested_quant_map"}
    state_dict = module.state_dict()
    assert set(state_dict) == keys
    assert state_dict["w"].numel() == 4 * 64 * 128 // 2


def test_reload_both_ways():
    module = torch.nn.Sequential(Experts())
    replace_parameter_4bit(module[0], "w", compress_statistics=True)
    state_dict = module.state_dict()
    fresh = Experts()
    fresh.w = torch.nn.Parameter(state_dict["0.w"], requires_grad=False)
    replace_parameter_4bit_prequantized(fresh, "w", state_dict, torch.device("cpu"))
    assert torch.equal(fresh.w, module[0].w)
    other = torch.nn.Sequential(Experts())
    replace_parameter_4bit(other[0], "w", compress_statistics=True)
    assert not torch.equal(other[0].w, module[0].w)
    other.load_state_dict(state_dict)
    assert torch.equal(other[0].w, module[0].w)


def test_forward_dequantizes_once():
    module = Experts()
    replace_parameter_4bit(module, "w")
    module(torch.randn(2, 64))
    assert module.seen[0] is module.seen[1]
    assert parametrize._cache_enabled == 0 and not parametrize._cache
    with pytest.raises(RuntimeError):
        module(torch.randn(2, 63))
    assert parametrize._cache_enabled == 0


def test_moves():
    module = Experts()
    replace_parameter_4bit(module, "w")
    before = module.w.clone()
    for convert in (module.half, module.float, lambda: module.to("cpu")):
        convert()
        assert torch.equal(module.w, before) and module.w.dtype == before.dtype


def test_errors():
    module = Experts()
    with pytest.raises(AttributeError, match="does not have parameter 'nope'"):
        replace_parameter_4bit(module, "nope")
    with pytest.raises(TypeError, match=r"'seen' is not an instance of nn\.Parameter"):
        replace_parameter_4bit(module, "seen")
    replace_parameter_4bit(module, "w")
    with pytest.raises(TypeError, match="parametrized already"):
        replace_parameter_4bit(module, "w")
