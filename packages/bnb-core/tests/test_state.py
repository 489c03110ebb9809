"""QuantState: its list form, equality, moves, and its serialised form against damage."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsandbytes import functional as F
from bitsandbytes.errors import CheckpointError
from bitsandbytes.functional import QuantState

STATES = [(quant_type, nested) for quant_type in ("nf4", "fp4") for nested in (False, True)]


def make_state(quant_type: str = "nf4", nested: bool = True, dtype: torch.dtype = torch.bfloat16) -> QuantState:
    x = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    return F.quantize_4bit(x, quant_type=quant_type, compress_statistics=nested)[1]


@pytest.mark.parametrize(("quant_type", "nested"), STATES)
@pytest.mark.parametrize("packed", [False, True])
def test_dictionary_round_trip(quant_type, nested, packed):
    state = make_state(quant_type, nested)
    entries = state.as_dict(packed=packed)
    assert QuantState.from_dict(dict(entries), torch.device("cpu")) == state
    prefixed = {f"model.layer.weight.{key}": value for key, value in entries.items()}
    if packed:
        assert QuantState.from_dict(prefixed, "cpu") == state


def test_packed_form_is_upstreams():
    entries = make_state().as_dict(packed=True)
    assert list(entries) == [
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "quant_state.bitsandbytes__nf4",
    ]
    description = bytes(entries["quant_state.bitsandbytes__nf4"].tolist()).decode()
    assert description.startswith(
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [96, 64], '
        '"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": '
    )
    assert all(isinstance(value, torch.Tensor) for value in entries.values())


def test_list_form():
    plain, nested = make_state(nested=False), make_state(nested=True)
    assert plain[0] is plain.absmax
    assert plain[1:4] == [plain.shape, plain.dtype, plain.blocksize]
    assert plain[4] is None
    assert nested[4][0] is nested.offset
    assert nested[-2][1] is nested.state2
    assert nested[5] == nested[-1] == "nf4"
    with pytest.raises(IndexError):
        plain[6]


def test_equality():
    state = make_state()
    assert state == copy.deepcopy(state)
    assert state == pickle.loads(pickle.dumps(state))
    assert state != make_state("fp4")
    assert state != make_state(nested=False)
    assert state != "a state"
    for change in ({"blocksize": 128}, {"dtype": torch.float32}, {"shape": (64, 96)}, {"absmax": state.absmax + 1}):
        other = copy.deepcopy(state)
        vars(other).update(change)
        assert state != other


def test_two_states_share_no_codebook():
    first, second = make_state(), make_state()
    assert first.code.data_ptr() != second.code.data_ptr()
    assert first.state2.code.data_ptr() != second.state2.code.data_ptr()


def test_move_reaches_every_tensor():
    state = make_state()
    state.to("meta")
    tensors = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def damaged(change) -> dict:
    entries = make_state().as_dict(packed=True)
    key = "quant_state.bitsandbytes__nf4"
    description = json.loads(bytes(entries[key].tolist()))
    change(entries, description)
    if key in entries and entries[key] is not None:
        entries[key] = torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)
    return entries


def with_blob(data: bytes):
    entries = make_state().as_dict(packed=True)
    entries["quant_state.bitsandbytes__nf4"] = torch.tensor(list(data), dtype=torch.uint8)
    return entries


BAD = {
    "empty": ({}, "quant_state"),
    "no-absmax": (damaged(lambda e, d: e.pop("absmax")), "absmax"),
    "no-table": (damaged(lambda e, d: e.pop("quant_map")), "quant_map"),
    "short-absmax": (damaged(lambda e, d: e.update(absmax=e["absmax"][:3])), "absmax"),
    "short-nested": (damaged(lambda e, d: e.update(nested_absmax=e["nested_absmax"][:0])), "nested_absmax"),
    "long-table": (damaged(lambda e, d: e.update(quant_map=torch.ones(17))), "quant_map"),
    "float-codes": (damaged(lambda e, d: e.update(absmax=e["absmax"].float())), "absmax"),
    "type": (damaged(lambda e, d: d.update(quant_type="nf5")), "nf5"),
    "type-kind": (damaged(lambda e, d: d.update(quant_type=4)), "quant_type"),
    "blocksize-zero": (damaged(lambda e, d: d.update(blocksize=0)), "blocksize"),
    "blocksize-text": (damaged(lambda e, d: d.update(blocksize="64")), "blocksize"),
    "blocksize-bool": (damaged(lambda e, d: d.update(blocksize=True)), "blocksize"),
    "dtype": (damaged(lambda e, d: d.update(dtype="__import__('os')")), "dtype"),
    "shape-negative": (damaged(lambda e, d: d.update(shape=[-96, -64])), "shape"),
    "shape-huge": (damaged(lambda e, d: d.update(shape=[10**9, 10**9])), "absmax"),
    "shape-text": (damaged(lambda e, d: d.update(shape="96,64")), "shape"),
    "offset": (damaged(lambda e, d: d.update(nested_offset="1.0")), "nested_offset"),
    "nested-blocksize": (damaged(lambda e, d: d.update(nested_blocksize=-1)), "nested_blocksize"),
    "two-descriptions": (
        damaged(lambda e, d: e.update({"quant_state.bitsandbytes__fp4": e["quant_state.bitsandbytes__nf4"]})),
        "quant_state",
    ),
    "unknown-entry": (damaged(lambda e, d: e.update(extra=torch.ones(1))), "extra"),
    "redefinition": (damaged(lambda e, d: d.update(absmax=[1.0])), "absmax"),
    "not-json": (with_blob(b"{'quant_type': 'nf4'}"), "JSON"),
    "not-utf8": (with_blob(b"\xff\xfe{}"), "JSON"),
    "not-an-object": (with_blob(b"[1, 2]"), "list"),
    "deep": (with_blob(b"[" * 100_000), "JSON"),
    "truncated": (with_blob(b'{"quant_type": "nf4", "block'), "JSON"),
}


@pytest.mark.parametrize(("entries", "word"), BAD.values(), ids=BAD.keys())
def test_damaged_dictionaries_are_refused(entries, word):
    with pytest.raises(CheckpointError, match=word):
        QuantState.from_dict(entries, "cpu")


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300))
def test_random_blobs_never_do_anything_but_refuse(data):
    with pytest.raises(CheckpointError):
        QuantState.from_dict(with_blob(data), "cpu")


@given(st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers())))
def test_packing_a_dictionary_is_reversible(source):
    packed = F.pack_dict_to_tensor(source)
    assert packed.dtype == torch.uint8
    assert F.unpack_tensor_to_dict(packed) == source


def test_oversized_blob_is_refused():
    with pytest.raises(CheckpointError, match="bytes"):
        F.unpack_tensor_to_dict(torch.zeros(2**20 + 1, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="dtype"):
        F.unpack_tensor_to_dict(torch.zeros(2))
