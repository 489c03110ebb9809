"""What inspection tells of sound checkpoints, and what it finds in damaged ones."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitsandbytes.checkpoint import CheckpointError, QuantizeOptions, inspect_checkpoint, quantize_checkpoint
from bitsandbytes.functional import pack_dict_to_tensor, unpack_tensor_to_dict

pytestmark = pytest.mark.usefixtures("no_transformers")

PARAMETERS = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        (QuantizeOptions(), 4.5),
        (QuantizeOptions(format="fp4", blocksize=128, double_quant=True), 4.0 + 8 / 128),
        (QuantizeOptions(format="int8"), 8.0),
    ],
    ids=lambda value: getattr(value, "format", ""),
)
def test_sound_checkpoints(make_llama, tmp_path: Path, options: QuantizeOptions, bits: float):
    source = make_llama()
    quantize_checkpoint(source, tmp_path / "out", options)
    summary = inspect_checkpoint(tmp_path / "out")
    assert summary.problems == []
    assert summary.format == options.format
    assert summary.kinds[options.format]["tensors"] == 14
    assert summary.kinds[options.format]["parameters"] == PARAMETERS
    assert summary.kinds["BF16"]["tensors"] == 7
    assert summary.parameters == inspect_checkpoint(source).parameters
    assert summary.nested is (options.double_quant if options.four_bit else None)
    assert summary.blocksizes == ([options.blocksize] if options.four_bit else [])
    # Small tensors carry a large share of descriptions and tables.
    assert bits < summary.quantized_bits_per_parameter < bits + 4
    assert sum(row["bytes"] for row in summary.kinds.values()) == sum(
        tensor.nbytes for file in (tmp_path / "out").glob("*.safetensors") for tensor in load_file(file).values()
    )
    up = next(tensor for tensor in summary.tensors if tensor.name == "model.layers.0.mlp.up_proj.weight")
    assert (up.shape, up.kind) == ((96, 64), options.format)
    assert up.dtype == ("bfloat16" if options.four_bit else None)
    json.dumps(summary.to_dict(tensors=True))


def test_unquantized_checkpoint_and_single_file(llama: Path):
    for path in (llama, llama / "model.safetensors"):
        summary = inspect_checkpoint(path)
        assert (summary.format, summary.problems, summary.config) == ("none", [], None)
        assert summary.bits_per_parameter == 16


def test_no_weights_are_read(make_llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from bitsandbytes.checkpoint.tensorfile import TensorFile

    quantize_checkpoint(make_llama(), tmp_path / "out")
    read, original = [], TensorFile.read_bytes

    def record(self, info, first, count):
        read.append(count)
        return original(self, info, first, count)

    monkeypatch.setattr(TensorFile, "read_bytes", record)
    inspect_checkpoint(tmp_path / "out")
    assert max(read) < 300


W = "model.layers.1.mlp.up_proj.weight"
BLOB = f"{W}.quant_state.bitsandbytes__nf4"


def redescribe(tensors: dict[str, torch.Tensor], **changes) -> None:
    tensors[BLOB] = pack_dict_to_tensor(unpack_tensor_to_dict(tensors[BLOB]) | changes)


DAMAGES = {
    "blob is no JSON": (lambda t: t.update({BLOB: torch.zeros(9, dtype=torch.uint8)}), "not valid JSON"),
    "blob is no object": (lambda t: t.update({BLOB: torch.tensor(list(b"[1]"), dtype=torch.uint8)}), "list"),
    "blob of another dtype": (lambda t: t.update({BLOB: torch.zeros(9)}), "description is F32"),
    "huge blob": (lambda t: t.update({BLOB: torch.zeros(2 << 20, dtype=torch.uint8)}), "description is U8 of"),
    "other shape": (lambda t: redescribe(t, shape=[96, 65]), "absmax has"),
    "other block size": (lambda t: redescribe(t, blocksize=128), "absmax has"),
    "block size zero": (lambda t: redescribe(t, blocksize=0), "blocksize is 0"),
    "unknown type": (lambda t: redescribe(t, quant_type="nf5"), "nf5"),
    "other type": (lambda t: redescribe(t, quant_type="fp4"), "named nf4"),
    "unknown dtype": (lambda t: redescribe(t, dtype="float8"), "float8"),
    "no absmax": (lambda t: t.pop(f"{W}.absmax"), "absmax"),
    "no codebook": (lambda t: t.pop(f"{W}.quant_map"), "quant_map"),
    "other codebook": (lambda t: t.update({f"{W}.quant_map": torch.arange(16.0)}), "not the table"),
    "long codebook": (lambda t: t.update({f"{W}.quant_map": torch.zeros(17)}), "17 values"),
    "no codes": (lambda t: t.pop(W), "codes are missing"),
    "short codes": (lambda t: t.update({W: t[W][:-1]}), "bytes of codes"),
    "no description": (lambda t: t.pop(BLOB), "without its description"),
    "smuggled tensors": (lambda t: redescribe(t, absmax=[1.0]), "redefines"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_to_4bit_tensors_is_found(make_llama, tmp_path: Path, name: str):
    quantize_checkpoint(make_llama(), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    damage, message = DAMAGES[name]
    damage(tensors)
    save_file(tensors, path)
    problems = inspect_checkpoint(tmp_path / "out").problems
    assert len(problems) == 1
    assert W in problems[0]
    assert message in problems[0]


S = "model.layers.0.self_attn.q_proj."
INT8_DAMAGES = {
    "scales": (lambda t: t.update({f"{S}SCB": torch.zeros(3)}), "SCB is F32 of 3"),
    "dtype": (lambda t: t.update({f"{S}weight": torch.zeros(64, 64)}), "codes are F32"),
    "layout": (lambda t: t.update({f"{S}weight_format": torch.tensor(2, dtype=torch.uint8)}), "weight_format"),
    "no codes": (lambda t: t.pop(f"{S}weight"), "codes are missing"),
}


@pytest.mark.parametrize("name", INT8_DAMAGES)
def test_damage_to_int8_tensors_is_found(make_llama, tmp_path: Path, name: str):
    quantize_checkpoint(make_llama(), tmp_path / "out", QuantizeOptions(format="int8"))
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    damage, message = INT8_DAMAGES[name]
    damage(tensors)
    save_file(tensors, path)
    (problem,) = inspect_checkpoint(tmp_path / "out").problems
    assert f"{S}weight" in problem
    assert message in problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "says fp4, but there are nf4"),
        ({"load_in_8bit": True}, "says int8, but there are nf4"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "says storage bfloat16"),
        ({"quant_method": "gptq"}, "has no quantization_config of bitsandbytes"),
    ],
    ids=str,
)
def test_contradictions_with_the_configuration(make_llama, tmp_path: Path, changes: dict, message: str):
    quantize_checkpoint(make_llama(), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))
    assert any(message in problem for problem in inspect_checkpoint(tmp_path / "out").problems)


def test_configuration_without_quantized_tensors(llama: Path):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    assert inspect_checkpoint(llama).problems == ["config.json says bitsandbytes, but no tensor is quantized"]


def test_nothing_there(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such file"):
        inspect_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="neither"):
        inspect_checkpoint(tmp_path)
