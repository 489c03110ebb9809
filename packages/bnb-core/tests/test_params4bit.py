"""Params4bit and its layers: moves, copies, pickles, splits, state dicts."""

from __future__ import annotations

import copy
import io
import operator
import pickle

import pytest
import safetensors.torch
import torch
from helpers import decode_weight_4bit

import bitsandbytes.functional as F
from bitsandbytes.errors import CheckpointError
from bitsandbytes.nn import Linear4bit, Params4bit

FLAGS = ("bnb_quantized", "quant_type", "blocksize", "quant_storage", "compress_statistics")


def parameter(**arguments):
    return Params4bit(torch.tensor([1.0, 2.0, 3.0, 4.0]), requires_grad=False, **arguments)


def flags(param):
    return {name: getattr(param, name) for name in FLAGS}


@pytest.mark.parametrize("quantize", [False, True])
def test_copies(quantize):
    p = parameter(quant_type="nf4")
    if quantize:
        p = p.to("cpu")
    shallow, deep = copy.copy(p), copy.deepcopy(p)
    pickled = pickle.loads(pickle.dumps(p))
    for other in (shallow, deep, pickled):
        assert type(other) is Params4bit
        assert torch.equal(other.data, p.data) and flags(other) == flags(p)
        assert other.quant_state == p.quant_state
    assert shallow.data_ptr() == p.data_ptr() and shallow.quant_state is p.quant_state
    assert deep.data_ptr() != p.data_ptr()
    if quantize:
        assert deep.quant_state is not p.quant_state
        assert deep.quant_state.absmax.data_ptr() != p.quant_state.absmax.data_ptr()


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_layer_copies(quantize, way):
    layer = Linear4bit(32, 16, quant_type="nf4")
    if quantize:
        layer = layer.to("cpu")
    if way == "deepcopy":
        other = copy.deepcopy(layer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert type(other.weight) is Params4bit and other.weight.module is other
    assert other.weight.data_ptr() != layer.weight.data_ptr()
    assert flags(other.weight) == flags(layer.weight)
    if quantize:
        assert other.quant_state is other.weight.quant_state is not layer.quant_state
    x = torch.randn(2, 32)
    assert torch.equal(other.to("cpu")(x), layer.to("cpu")(x))


def test_replayed_dictionary_with_strangers():
    p = parameter().to("cpu")
    p._is_hf_initialized = True
    p.source_cls = torch.nn.Linear
    again = Params4bit(p.data, requires_grad=False, **p.__dict__)
    assert again.quant_state is p.quant_state and flags(again) == flags(p)


def test_attributes_resolve_like_state_dict_keys():
    layer = Linear4bit(64, 64, compress_statistics=True)
    for name in ("absmax", "quant_map", "nested_absmax", "offset", "state2"):
        assert not hasattr(layer.weight, name)
    layer = layer.to("cpu")
    for key, value in layer.state_dict().items():
        target = layer
        for part in key.split("."):
            target = getattr(target, part)
        assert torch.equal(target, value), key
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        operator.attrgetter("nonsense")(layer.weight)
    with pytest.raises(AttributeError):
        operator.attrgetter("bitsandbytes__nf4")(layer.weight.quant_state)
    plain = Linear4bit(64, 64, compress_statistics=False).to("cpu")
    assert hasattr(plain.weight, "absmax") and not hasattr(plain.weight, "nested_absmax")


def test_chunk_and_split_keep_the_class():
    packed, state = F.quantize_4bit(torch.ones(4), quant_type="fp4", blocksize=64, compress_statistics=True)
    b = Params4bit.from_prequantized(packed, state.as_dict(packed=True))
    assert b.data.tolist() == [[51], [51]]
    for pieces in (torch.chunk(b, 2, dim=0), torch.split(b, 1), b.chunk(2), b.split(1)):
        assert isinstance(pieces, tuple) and len(pieces) == 2
        for piece in pieces:
            assert type(piece) is Params4bit and piece.shape == (1, 1)
            assert piece.quant_state is b.quant_state and flags(piece) == flags(b)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
def test_storage_dtype_survives_reload_and_conversion(storage, nested):
    layer = Linear4bit(128, 64, quant_type="nf4", quant_storage=storage, compress_statistics=nested).to("cpu")
    weight = layer.weight
    assert weight.dtype == storage and weight.numel() == 128 * 64 // 2 // storage.itemsize
    state_dict = layer.state_dict()
    statistics = {key: value for key, value in state_dict.items() if key.startswith("weight.")}
    again = Params4bit.from_prequantized(state_dict["weight"], statistics)
    assert again.dtype == again.quant_storage == storage
    raw = weight.data.view(torch.uint8).clone()
    values = decode_weight_4bit(weight, weight.quant_state)
    for convert in (
        lambda: layer.to(torch.float16),
        lambda: layer.to("cpu", torch.bfloat16),
        layer.half,
        layer.bfloat16,
        layer.float,
        layer.double,
        lambda: layer.type(torch.float32),
    ):
        convert()
        assert layer.weight.dtype == storage and type(layer.weight) is Params4bit
        assert torch.equal(layer.weight.data.view(torch.uint8), raw)
        assert torch.equal(decode_weight_4bit(layer.weight, layer.weight.quant_state), values)
        assert layer.weight.quant_state.absmax.dtype == (torch.uint8 if nested else torch.float32)


def test_conversion_before_quantization_applies():
    layer = Linear4bit(64, 16).to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and not layer.weight.bnb_quantized
    assert layer.to("cpu").weight.quant_state.dtype == torch.bfloat16
    both = Linear4bit(64, 16).to("cpu", torch.float16)
    assert both.weight.quant_state.dtype == torch.float16 and both.weight.dtype == torch.uint8


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("target", ["fresh", "quantized", "meta", "assign"])
def test_state_dict_round_trip(tmp_path, nested, target):
    torch.manual_seed(3)
    layer = Linear4bit(64, 32, quant_type="nf4", compress_statistics=nested).to("cpu")
    safetensors.torch.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    state_dict = safetensors.torch.load_file(tmp_path / "layer.safetensors")
    device = "meta" if target in ("meta", "assign") else None
    other = Linear4bit(64, 32, quant_type="nf4", device=device)
    if target == "quantized":
        other = other.to("cpu")
    if target == "meta":
        other = other.to_empty(device="cpu")
    result = other.load_state_dict(state_dict, assign=target == "assign")
    assert not result.missing_keys and not result.unexpected_keys
    assert type(other.weight) is Params4bit and other.weight.module is other
    assert other.weight.quant_state == layer.weight.quant_state
    x = torch.randn(3, 64)
    assert torch.equal(other(x), layer(x))
    # The layer owns its memory: the dictionary may be reused.
    if target != "assign":
        state_dict["weight"].zero_()
        assert torch.equal(other(x), layer(x))


def test_loading_into_a_model_with_other_layers():
    def build():
        return torch.nn.Sequential(Linear4bit(16, 16), torch.nn.Linear(16, 16), torch.nn.Sequential(Linear4bit(16, 4)))

    model, other = build().to("cpu"), build().to("cpu")
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 16)
    assert torch.equal(model(x), other(x))
    extra = {**model.state_dict(), "0.weight.nonsense": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"0\.weight\.nonsense"):
        other.load_state_dict(extra)


def test_unquantized_checkpoint_into_quantized_layer():
    weight = torch.randn(32, 64)
    layer = Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu")
    layer.load_state_dict({"weight": weight})
    expected, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(layer.weight.data, expected) and layer.weight.quant_state == state
    assert layer.quant_state is layer.weight.quant_state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("weight.absmax"), "absmax"),
        (lambda d: d.pop("weight.quant_state.bitsandbytes__nf4"), "quant_state"),
        (lambda d: d.update({"weight.absmax": d["weight.absmax"][:-1]}), "absmax has"),
        (lambda d: d.update({"weight.quant_map": d["weight.quant_map"][:3]}), "quant_map"),
    ],
)
def test_damaged_state_dict_is_refused(change, message):
    layer = Linear4bit(64, 32, quant_type="nf4").to("cpu")
    before = layer(torch.ones(1, 64))
    state_dict = layer.state_dict()
    change(state_dict)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state_dict)
    assert torch.equal(layer(torch.ones(1, 64)), before)


def test_weight_of_another_shape_is_refused():
    layer = Linear4bit(64, 32).to("cpu")
    with pytest.raises(RuntimeError, match="the weight of this layer has shape"):
        layer.load_state_dict(Linear4bit(32, 64, bias=False).to("cpu").state_dict(), strict=False)


def test_from_prequantized_refuses_damage():
    packed, state = F.quantize_4bit(torch.randn(64))
    statistics = state.as_dict(packed=True)
    statistics["quant_state.bitsandbytes__fp4"] = statistics["quant_state.bitsandbytes__fp4"][:-3]
    with pytest.raises(CheckpointError):
        Params4bit.from_prequantized(packed, statistics)


def test_meta_move_keeps_the_statistics():
    # Offloading hooks park a weight on the meta device and replay its attributes later.
    layer = Linear4bit(64, 32).to("cpu")
    packed = layer.weight.data.clone()
    parked = layer.weight.to("meta")
    assert parked.device.type == "meta" and parked.quant_state.absmax.device.type == "cpu"
    back = Params4bit(packed, requires_grad=False, **parked.__dict__).to("cpu")
    assert torch.equal(decode_weight_4bit(back, back.quant_state), decode_weight_4bit(packed, layer.quant_state))


def test_weights_only_load_of_state_dict(tmp_path):
    layer = Linear4bit(64, 32).to("cpu")
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = Linear4bit(64, 32).to("cpu")
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(other.weight.data, layer.weight.data)
