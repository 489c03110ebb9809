"""Reading and writing safetensors files: the bytes of the safetensors package, and hostile input."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bitsandbytes.checkpoint.source import open_source, open_weights
from bitsandbytes.checkpoint.tensorfile import open_tensor_file
from bitsandbytes.checkpoint.tensorwriter import ShardWriter
from bitsandbytes.errors import CheckpointError

SAMPLE = {
    "b.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "a.weight": torch.arange(5, dtype=torch.uint8),
    "größe": torch.tensor(3.5),
    "a.ids": torch.arange(4),
    "a.mask": torch.tensor([True, False, True]),
    "a.half": torch.arange(3, dtype=torch.float16),
    "a.codes": torch.arange(7, dtype=torch.int8),
    "a.wide": torch.arange(3, dtype=torch.float64),
    "empty": torch.empty(0, 4),
    "a.absmax": torch.arange(2.0),
}


def test_writer_gives_the_bytes_of_the_safetensors_package(tmp_path: Path):
    save_file(SAMPLE, tmp_path / "theirs", {"format": "pt"})
    with ShardWriter(tmp_path / "ours") as writer:
        for name, tensor in SAMPLE.items():
            writer.add(name, tensor)
        size = writer.finish()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert size == (tmp_path / "ours").stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_writer_takes_pieces(tmp_path: Path):
    save_file({"x": torch.arange(10.0)}, tmp_path / "theirs", {"format": "pt"})
    with ShardWriter(tmp_path / "ours") as writer:
        writer.begin("x", "F32", (10,))
        writer.write(torch.arange(4.0))
        assert torch.equal(writer.reread(4, 8).view(torch.float32), torch.tensor([1.0, 2.0]))
        writer.write(torch.arange(4.0, 10.0))
        writer.end()
        writer.finish()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_writer_that_does_not_finish_leaves_nothing(tmp_path: Path):
    with ShardWriter(tmp_path / "ours") as writer:
        writer.add("x", torch.zeros(3))
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_reader_reads_ranges(tmp_path: Path):
    save_file(SAMPLE, tmp_path / "file.safetensors")
    file = open_tensor_file(tmp_path / "file.safetensors")
    with safe_open(tmp_path / "file.safetensors", "pt") as theirs:
        assert set(file.tensors) == set(theirs.keys())
        for name, info in file.tensors.items():
            expected = theirs.get_tensor(name)
            assert info.shape == tuple(expected.shape)
            for first in range(info.numel):
                got = file.read(info, first, info.numel - first)
                assert torch.equal(got, expected.reshape(-1)[first:])
    file.close()


def file_of(entries: object, data: bytes = b"", length: int | None = None) -> bytes:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(start: int, stop: int, dtype: str = "U8", shape: object = None) -> dict:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


HOSTILE = {
    "empty": (b"", "no safetensors file"),
    "short": (b"\1\0\0", "no safetensors file"),
    "huge header": (file_of({}, length=2**63), "allows"),
    "header beyond the end": (file_of({}, length=100), "cut off"),
    "no JSON": (file_of(b"{nonsense"), "not valid JSON"),
    "no UTF-8": (file_of(b'{"\xff": 1}'), "not valid JSON"),
    "deep JSON": (file_of(b"[" * 100_000), "not valid JSON"),
    "huge number": (file_of(b'{"a": ' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "a list": (file_of([1, 2]), "expected an object"),
    "twice": (file_of(b'{"a": 1, "a": 2}'), "'a' twice"),
    "metadata": (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
    "no table": (file_of({"a": 3}), "described by"),
    "missing entry": (file_of({"a": {"dtype": "U8", "shape": []}}), "described by"),
    "dtype": (file_of({"a": entry(0, 4, "F33")}, b"1234"), "dtype 'F33'"),
    "dtype of no text": (file_of({"a": {"dtype": [], "shape": [], "data_offsets": [0, 0]}}), "dtype"),
    "negative size": (file_of({"a": entry(0, 4, shape=[-4])}, b"1234"), "shape"),
    "size of no number": (file_of({"a": entry(0, 1, shape=[True])}, b"1"), "shape"),
    "size with a fraction": (file_of({"a": entry(0, 4, shape=[4.0])}, b"1234"), "shape"),
    "offsets": (file_of({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, b"1"), "data_offsets"),
    "reversed offsets": (file_of({"a": entry(4, 0, shape=[4])}, b"1234"), "data_offsets"),
    "wrong length": (file_of({"a": entry(0, 4, "F32", [2])}, b"1234"), "needs 8 bytes"),
    "shape that overflows": (file_of({"a": entry(0, 0, "F32", [2**62, 2**62])}), "needs"),
    "overlap": (file_of({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"), "overlaps"),
    "same place": (file_of({"a": entry(0, 4), "b": entry(0, 4)}, b"1234"), "overlaps"),
    "gap": (file_of({"a": entry(0, 2), "b": entry(3, 4)}, b"1234"), "unused bytes"),
    "cut off": (file_of({"a": entry(0, 4)}, b"12"), "cut off"),
    "more at the end": (file_of({"a": entry(0, 4)}, b"123456"), "does not describe"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name(tmp_path: Path, name: str):
    content, message = HOSTILE[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_tensor_file(path)
    assert str(path) in str(caught.value)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damage_never_gives_another_error(tmp_path: Path, data: st.DataObject):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(4.0), "b": torch.arange(3, dtype=torch.uint8)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        file = open_tensor_file(path)
    except CheckpointError:
        return
    for info in file.tensors.values():
        assert file.read_bytes(info, 0, info.nbytes).numel() == info.nbytes
    file.close()


def test_file_that_shrinks_while_it_is_read(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(100.0)}, path)
    file = open_tensor_file(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="'a'"):
        file.read(file.tensors["a"], 0, 100)
    file.close()


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "C:x.safetensors", "x.bin", "", 3, ".."]
)
def test_index_cannot_lead_out_of_the_folder(tmp_path: Path, name: object):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="plain name"):
        open_weights(folder)


def test_index_and_files_must_agree(make_llama):
    folder = make_llama(shards=3)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    files = sorted(set(weight_map.values()))

    index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": "model-4.safetensors"}}))
    with pytest.raises(CheckpointError, match="missing: model-4"):
        open_source(folder)

    other = next(name for name in files if name != weight_map["model.norm.weight"])
    index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": other}}))
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is missing"):
        open_source(folder)

    index.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(CheckpointError, match="twice"):
        open_source(folder)


def test_tensor_in_two_files(make_llama):
    folder = make_llama(shards=2)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    first, second = sorted(set(weight_map.values()))
    tensors = load_file(folder / second)
    save_file(tensors | {next(iter(load_file(folder / first))): torch.zeros(1)}, folder / second)
    with pytest.raises(CheckpointError, match="two files"):
        open_source(folder)


def test_tensors_outside_of_the_index_are_told(make_llama):
    folder = make_llama(shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    assert any("'model.norm.weight'" in warning for warning in open_source(folder).warnings)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_incomplete_folders(llama: Path, missing: str):
    (llama / missing).unlink()
    (llama / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"config\.json|pytorch_model\.bin"):
        open_source(llama)


def test_unreadable_config(llama: Path):
    (llama / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_source(llama)
