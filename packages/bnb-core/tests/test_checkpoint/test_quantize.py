"""Quantizing folders, without transformers: bytes, options, copies, refusals."""

import json
from math import sqrt
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import bitsandbytes.functional as F
from bitsandbytes.autograd.int8 import quantize_weight
from bitsandbytes.checkpoint import CheckpointError, QuantizeOptions, parse_size, quantize_checkpoint
from bitsandbytes.checkpoint.encode import LoadedMatrix, StoredMatrix, TransposedMatrix, write_quantized
from bitsandbytes.checkpoint.report import Tally
from bitsandbytes.checkpoint.structure import matches_skip
from bitsandbytes.checkpoint.tensorfile import open_tensor_file
from bitsandbytes.checkpoint.tensorwriter import ShardWriter
from bitsandbytes.errors import ArgumentError
from bitsandbytes.state import QuantState

pytestmark = pytest.mark.usefixtures("no_transformers")

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def expected_tensors(name: str, weight: torch.Tensor, options: QuantizeOptions) -> dict[str, torch.Tensor]:
    """What one call on the whole weight gives, under the names of a state dict."""
    if not options.four_bit:
        codes, scales = quantize_weight(weight)
        module = name.removesuffix("weight")
        return {name: codes, f"{module}SCB": scales, f"{module}weight_format": torch.tensor(0, dtype=torch.uint8)}
    packed, state = F.quantize_4bit(
        weight,
        blocksize=options.blocksize,
        compress_statistics=options.double_quant,
        quant_type=options.format,
        quant_storage=getattr(torch, options.storage),
    )
    return {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


def assert_same_tensors(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert torch.equal(got[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)) or tensor.dim() == 0, (
            name
        )
        if tensor.dim() == 0:
            assert got[name].item() == tensor.item()


@pytest.mark.parametrize(
    "options",
    [
        QuantizeOptions(),
        QuantizeOptions(format="fp4", blocksize=128),
        QuantizeOptions(double_quant=True, storage="bfloat16"),
        QuantizeOptions(format="int8"),
    ],
    ids=lambda options: f"{options.format}-{options.storage}-{options.double_quant}",
)
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_equal_one_call_per_weight(make_llama, checkpoints, tmp_path: Path, options, shards):
    source = make_llama(shards=shards)
    report = quantize_checkpoint(source, tmp_path / "out", options)
    expected = {}
    for name, tensor in checkpoints.load(source).items():
        linear = name.split(".")[-2] in LINEAR
        expected |= expected_tensors(name, tensor, options) if linear else {name: tensor}
    assert_same_tensors(checkpoints.load(tmp_path / "out"), expected)
    assert (report.quantized_tensors, report.kept_tensors) == (14, 7)
    assert report.bytes_after == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    chunk=st.integers(1, 300),
    format_name=st.sampled_from(["nf4", "fp4", "int8"]),
    double_quant=st.booleans(),
    blocksize=st.sampled_from([16, 64, 256]),
    layout=st.sampled_from(["stored", "transposed", "loaded"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_pieces_give_the_bytes_of_the_whole(
    tmp_path: Path, rows, columns, chunk, format_name, double_quant, blocksize, layout, dtype
):
    options = QuantizeOptions(format=format_name, double_quant=double_quant, blocksize=blocksize)
    weight = torch.randn(rows, columns).to(dtype)
    path = tmp_path / "source.safetensors"
    save_file({"x.weight": weight.t().contiguous() if layout == "transposed" else weight}, path)
    file = open_tensor_file(path)
    info = file.tensors["x.weight"]
    matrix = {
        "stored": lambda: StoredMatrix(file, info, None),
        "transposed": lambda: TransposedMatrix(file, info, None),
        "loaded": lambda: LoadedMatrix(weight),
    }[layout]()
    tally = Tally()
    with ShardWriter(tmp_path / "out.safetensors") as writer:
        write_quantized(writer, "x.weight", matrix, options, tally, chunk)
        writer.finish()
    file.close()
    got = load_file(tmp_path / "out.safetensors")
    assert_same_tensors(got, expected_tensors("x.weight", weight, options))
    assert tally.relative_rms_error == pytest.approx(relative_error(got, weight), rel=1e-3, abs=1e-7)


def relative_error(tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> float:
    """The error of a quantized weight, dequantized here by the formulas in float64."""
    if "x.SCB" in tensors:
        decoded = tensors["x.weight"].double() * tensors["x.SCB"].double()[:, None] / 127
    else:
        parts = {key.removeprefix("x.weight."): value for key, value in tensors.items() if key != "x.weight"}
        state = QuantState.from_dict(parts, "cpu")
        packed = tensors["x.weight"].reshape(-1)
        codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[: weight.numel()].long()
        absmax = state.plain_absmax().double().repeat_interleave(state.blocksize)[: weight.numel()]
        decoded = (state.code.double()[codes] * absmax).reshape(weight.shape)
    return float((decoded - weight.double()).norm() / weight.double().norm())


def test_report_has_the_error_over_all_weights(llama: Path, checkpoints, tmp_path: Path):
    report = quantize_checkpoint(llama, tmp_path / "out", QuantizeOptions(double_quant=True))
    error = norm = 0.0
    out = checkpoints.load(tmp_path / "out")
    for name, weight in checkpoints.load(llama).items():
        if name.split(".")[-2] in LINEAR:
            renamed = {key.replace(name, "x.weight"): out[key] for key in out if key.startswith(name)}
            error += (relative_error(renamed, weight) * float(weight.double().norm())) ** 2
            norm += float(weight.double().norm()) ** 2
    assert report.relative_rms_error == pytest.approx(sqrt(error / norm), rel=1e-3)
    assert 0.08 < report.relative_rms_error < 0.11


def test_configuration_says_what_was_done(llama: Path, tmp_path: Path):
    options = QuantizeOptions(compute_dtype="float16", skip=("mlp.down_proj",))
    quantize_checkpoint(llama, tmp_path / "out", options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    entry = config.pop("quantization_config")
    assert config == json.loads((llama / "config.json").read_text())
    assert (entry["quant_method"], entry["load_in_4bit"], entry["bnb_4bit_quant_type"]) == ("bitsandbytes", True, "nf4")
    assert entry["bnb_4bit_compute_dtype"] == "float16"
    assert {"lm_head", "model.embed_tokens", "model.layers.1.mlp.down_proj"} <= set(entry["llm_int8_skip_modules"])
    assert "model.layers.0.mlp.down_proj.weight.absmax" not in load_file(tmp_path / "out" / "model.safetensors")


def test_compute_dtype_follows_the_weights(make_llama, tmp_path: Path):
    source = make_llama(dtype=torch.float16)
    assert quantize_checkpoint(source, tmp_path / "a").compute_dtype == "float16"
    assert quantize_checkpoint(source, tmp_path / "b", QuantizeOptions(dtype="bfloat16")).compute_dtype == "bfloat16"


def test_cast_comes_first(make_llama, checkpoints, tmp_path: Path):
    source = make_llama(dtype=torch.float32, config={"dtype": "float32"})
    options = QuantizeOptions(dtype="bfloat16")
    quantize_checkpoint(source, tmp_path / "out", options)
    expected = {}
    for name, tensor in checkpoints.load(source).items():
        tensor = tensor.bfloat16()
        expected |= expected_tensors(name, tensor, options) if name.split(".")[-2] in LINEAR else {name: tensor}
    assert_same_tensors(checkpoints.load(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_float64_needs_a_cast(make_llama, tmp_path: Path):
    source = make_llama(dtype=torch.float64)
    with pytest.raises(CheckpointError, match=r"_proj\.weight' is the weight .* F64.*cast"):
        quantize_checkpoint(source, tmp_path / "out")
    quantize_checkpoint(source, tmp_path / "out", QuantizeOptions(dtype="float32"))


def test_integer_and_boolean_tensors_stay(checkpoints, tmp_path: Path):
    tensors = checkpoints.tensors() | {"model.ids": torch.arange(9), "model.mask": torch.tensor([[True, False]])}
    source = checkpoints.write(tmp_path / "source", tensors, checkpoints.config)
    quantize_checkpoint(source, tmp_path / "out", QuantizeOptions(dtype="float16"))
    out = checkpoints.load(tmp_path / "out")
    assert torch.equal(out["model.ids"], tensors["model.ids"])
    assert torch.equal(out["model.mask"], tensors["model.mask"])
    assert out["model.norm.weight"].dtype == torch.float16


def test_config_with_another_dtype_is_told(make_llama, tmp_path: Path):
    source = make_llama(dtype=torch.float32)
    report = quantize_checkpoint(source, tmp_path / "out")
    assert any("bfloat16" in warning and "F32" in warning for warning in report.warnings)


def test_nan_is_told_by_name(checkpoints, tmp_path: Path):
    tensors = checkpoints.tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    source = checkpoints.write(tmp_path / "source", tensors, checkpoints.config)
    report = quantize_checkpoint(source, tmp_path / "out")
    assert any("'model.layers.1.mlp.up_proj.weight' has 1 values" in warning for warning in report.warnings)
    assert report.relative_rms_error == report.relative_rms_error


def test_storage_that_does_not_fit(checkpoints, tmp_path: Path):
    tensors = checkpoints.tensors() | {"model.layers.0.mlp.odd.weight": torch.randn(3, 4)}
    source = checkpoints.write(tmp_path / "source", tensors, checkpoints.config)
    with pytest.raises(CheckpointError, match=r"odd\.weight' packs into 6 bytes"):
        quantize_checkpoint(source, tmp_path / "out", QuantizeOptions(storage="float64"))
    assert not (tmp_path / "out").exists()


def test_shards_keep_companions_together(make_llama, tmp_path: Path):
    source = make_llama(layers=4)
    report = quantize_checkpoint(source, tmp_path / "out", QuantizeOptions(max_shard_bytes=30_000))
    assert len(report.shards) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for key, name in index["weight_map"].items():
        assert key in load_file(tmp_path / "out" / name)
        base = key.partition(".weight.")[0] + ".weight"
        assert index["weight_map"].get(base, name) == name
    for name in report.shards:
        assert (tmp_path / "out" / name).stat().st_size < 40_000
    assert index["metadata"]["total_parameters"] == report.quantized_parameters + report.kept_parameters
    assert not list((tmp_path).glob("*.partial-*"))


def test_other_files_come_along(llama: Path, tmp_path: Path):
    (llama / "tokenizer.json").write_text("{}")
    (llama / "modeling_own.py").write_text("raise SystemExit")
    (llama / "1_Pooling").mkdir()
    (llama / "1_Pooling" / "config.json").write_text("{}")
    (llama / "pytorch_model.bin").write_bytes(b"weights")
    (llama / "original").mkdir()
    (llama / "original" / "consolidated.00.pth").write_bytes(b"weights")
    (llama / ".git").mkdir()
    (llama / ".git" / "HEAD").write_text("ref")
    secret = tmp_path / "secret.txt"
    secret.write_text("private")
    (llama / "notes.txt").symlink_to(secret)
    (llama / "inside.txt").symlink_to(llama / "tokenizer.json")
    report = quantize_checkpoint(llama, tmp_path / "out")
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    copied = {"tokenizer.json", "modeling_own.py", "1_Pooling/config.json", "inside.txt"}
    assert names == copied | {"config.json", "model.safetensors"}
    assert set(report.left_out) == {"pytorch_model.bin", "original/consolidated.00.pth"}
    assert any("notes.txt" in warning for warning in report.warnings)


def test_hub_cache_links_are_followed(llama: Path, tmp_path: Path):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in [*llama.iterdir()]:
        path.rename(blobs / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-{path.name}")
    (blobs / "hash-tok").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/hash-tok")
    quantize_checkpoint(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


def test_quantized_sources_are_refused(llama: Path, checkpoints, tmp_path: Path):
    quantize_checkpoint(llama, tmp_path / "out")
    with pytest.raises(CheckpointError, match="already quantized"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "again")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="already quantized"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_nothing_to_quantize(llama: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="nothing to quantize"):
        quantize_checkpoint(llama, tmp_path / "out", QuantizeOptions(skip=("model",)))


def test_conv1d_architectures_are_transposed(checkpoints, tmp_path: Path):
    weight = torch.randn(32, 96)
    tensors = {"h.0.attn.c_attn.weight": weight, "wte.weight": torch.randn(50, 32), "ln_f.weight": torch.ones(32)}
    source = checkpoints.write(tmp_path / "gpt2", tensors, {"model_type": "gpt2"})
    options = QuantizeOptions()
    quantize_checkpoint(source, tmp_path / "out", options)
    expected = expected_tensors("h.0.attn.c_attn.weight", weight.t().contiguous(), options)
    assert_same_tensors(
        checkpoints.load(tmp_path / "out"),
        expected | {name: tensors[name] for name in ("wte.weight", "ln_f.weight")},
    )


@pytest.mark.parametrize("place", ["same", "inside", "around"])
def test_output_may_not_touch_the_source(llama: Path, place: str):
    out = {"same": llama, "inside": llama / "out", "around": llama.parent}[place]
    with pytest.raises(CheckpointError, match="overlaps"):
        quantize_checkpoint(llama, out, force=True)


def test_existing_output_needs_force(llama: Path, tmp_path: Path, checkpoints):
    out = tmp_path / "out"
    quantize_checkpoint(llama, out)
    before = checkpoints.contents(out)
    with pytest.raises(CheckpointError, match="exists already"):
        quantize_checkpoint(llama, out, QuantizeOptions(format="int8"))
    assert checkpoints.contents(out) == before
    quantize_checkpoint(llama, out, QuantizeOptions(format="int8"), force=True)
    assert checkpoints.contents(out) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "out"]


def test_force_replaces_checkpoints_only(llama: Path, tmp_path: Path):
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        quantize_checkpoint(llama, out, force=True)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(CheckpointError, match="no folder"):
        quantize_checkpoint(llama, file, force=True)
    assert (out / "thesis.tex").read_text() == "years of work"


def test_source_is_not_touched(llama: Path, tmp_path: Path, checkpoints):
    before = checkpoints.contents(llama)
    quantize_checkpoint(llama, tmp_path / "out")
    assert checkpoints.contents(llama) == before


def test_progress_reaches_the_end(make_llama, tmp_path: Path):
    seen = []
    quantize_checkpoint(make_llama(shards=2), tmp_path / "out", progress=seen.append)
    assert seen[-1].done == seen[-1].total
    assert [step.done for step in seen] == sorted(step.done for step in seen)


@pytest.mark.parametrize(
    "wrong",
    [
        {"format": "int4"},
        {"blocksize": 63},
        {"compute_dtype": "int8"},
        {"dtype": "float64"},
        {"storage": "int64"},
        {"threshold": float("nan")},
        {"threshold": -1.0},
        {"max_shard_bytes": 0},
        {"skip": ("(",)},
        {"device": "nowhere"},
    ],
    ids=str,
)
def test_options_are_checked(wrong: dict):
    with pytest.raises(ArgumentError, match=str(next(iter(wrong))).split("_bytes")[0]):
        QuantizeOptions(**wrong)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("512MiB", 2**29), ("1.5kb", 1500), ("7", 7), (" 2 TB ", 2 * 10**12), (9, 9)]
)
def test_sizes(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-1GB", "5 GB more"])
def test_wrong_sizes(text: str):
    with pytest.raises(ArgumentError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("module", "pattern", "matches"),
    [
        ("layer.1.attn", "layer.1", True),
        ("layer.11.attn", "layer.1", False),
        ("layer.11.attn", "layer.*", True),
        ("model.mlp.gate_proj", "mlp.gate", False),
        ("model.decoder.layers.23.fc1", "fc1", True),
        ("model.layers.0.mlp", "a|model.layers", True),
    ],
)
def test_skip_patterns(module: str, pattern: str, matches: bool):
    assert matches_skip(module, [pattern]) is matches
