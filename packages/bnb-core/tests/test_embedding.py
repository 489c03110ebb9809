"""Embeddings: look-ups equal the dequantized table, saving, optimizer overrides."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

import bitsandbytes.functional as F
from bitsandbytes.nn import Embedding, Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4, StableEmbedding
from bitsandbytes.optim import GlobalOptimManager

INDICES = torch.tensor([[0, 9, 3], [3, 3, 1]])


def table_of(layer):
    weight = layer.weight
    if isinstance(layer, Embedding8bit):
        return F.int8_vectorwise_dequant(weight.data, weight.SCB).to(layer.dtype)
    return F.dequantize_4bit(weight.data, weight.quant_state)


@pytest.mark.parametrize("cls", [Embedding4bit, EmbeddingFP4, EmbeddingNF4, Embedding8bit])
@pytest.mark.parametrize("width", [100, 128, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_look_up(cls, width, dtype):
    layer = cls(10, width, dtype=dtype)
    layer.load_state_dict({"weight": torch.randn(10, width).to(dtype)})
    layer = layer.to("cpu")
    y = layer(INDICES)
    assert y.shape == (2, 3, width) and y.dtype == dtype
    assert torch.equal(y, table_of(layer)[INDICES])
    assert layer(torch.zeros(0, dtype=torch.int64)).shape == (0, width)


@pytest.mark.parametrize("cls", [EmbeddingFP4, EmbeddingNF4, Embedding8bit])
@pytest.mark.parametrize("width", [100, 128])
def test_saving(tmp_path, cls, width):
    layer = cls(10, width).to("cpu")
    safetensors.torch.save_file(layer.state_dict(), tmp_path / "table.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "table.safetensors")
    for other in (cls(10, width), cls(10, width).to("cpu")):
        other.load_state_dict(loaded)
        assert torch.equal(other(INDICES), layer(INDICES))


@pytest.mark.parametrize("cls", [Embedding4bit, Embedding8bit])
def test_index_outside_of_the_table(cls):
    layer = cls(10, 64).to("cpu")
    for index in (10, -1):
        with pytest.raises(IndexError):
            layer(torch.tensor([index]))


@pytest.mark.parametrize("cls", [Embedding4bit, Embedding8bit])
def test_before_quantization(cls):
    layer = cls(10, 64)
    assert torch.equal(layer(INDICES), layer.weight.data[INDICES])


def test_stable_embedding():
    layer = StableEmbedding(10, 16, padding_idx=2)
    assert torch.equal(layer.weight[2], torch.zeros(16))
    bound = (6 / (10 + 16)) ** 0.5
    assert layer.weight.abs().max() <= bound
    rows = layer.weight[INDICES]
    expected = torch.nn.functional.layer_norm(rows, (16,))
    torch.testing.assert_close(layer(INDICES), expected)
    half = StableEmbedding(10, 16, dtype=torch.bfloat16)
    assert half(INDICES).dtype == torch.bfloat16


def test_embedding():
    layer = Embedding(10, 16, padding_idx=2)
    assert torch.equal(layer.weight[2], torch.zeros(16))
    assert torch.equal(layer(INDICES), layer.weight[INDICES])


@pytest.mark.parametrize("cls", [Embedding, StableEmbedding])
def test_optimizer_state_stays_32_bit(cls):
    layer = cls(10, 16)
    overrides = GlobalOptimManager.get_instance().module_weight_config_triple
    assert any(
        module is layer and name == "weight" and config == {"optim_bits": 32} for module, name, config in overrides
    )
