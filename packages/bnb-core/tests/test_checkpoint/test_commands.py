"""The commands: output for people and programs, exit codes."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bitsandbytes.cli.inspect import inspect
from bitsandbytes.cli.quantize import quantize

pytestmark = pytest.mark.usefixtures("no_transformers")


def run(command, *arguments: object):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_quantize_reports_to_people(llama: Path, tmp_path: Path):
    result = run(quantize, llama, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for text in ("nf4", "14 tensors", "relative RMS", "times less"):
        assert text in result.stdout
    assert "transformers is not installed" in result.stderr


def test_quantize_reports_to_programs(llama: Path, tmp_path: Path):
    options = ("--format", "int8", "--threshold", "5", "--skip", "q_proj", "--skip", "k_proj", "--json")
    result = run(quantize, llama, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["format"], report["quantized_tensors"]) == ("int8", 10)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_threshold"] == 5.0


def test_quantize_takes_every_option(llama: Path, tmp_path: Path):
    options = ["--format", "fp4", "--blocksize", "128", "--double-quant", "--compute-dtype", "bf16"]
    options += ["--storage", "fp16", "--dtype", "fp32", "--max-shard-size", "40KB", "--device", "cpu"]
    options += ["--no-resume", "--quiet"]
    result = run(quantize, llama, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    entry = config["quantization_config"]
    assert entry["bnb_4bit_quant_storage"] == "float16"
    assert (entry["bnb_4bit_compute_dtype"], entry["bnb_4bit_use_double_quant"]) == ("bfloat16", True)
    assert config["dtype"] == "float32"
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize("as_json", [False, True])
def test_quantize_fails_with_exit_code_1(tmp_path: Path, as_json: bool):
    result = run(quantize, tmp_path / "nothing", "-o", tmp_path / "out", *(["--json"] if as_json else []))
    assert result.exit_code == 1
    assert "no folder" in (json.loads(result.stdout)["error"] if as_json else result.stderr)


def test_quantize_refuses_to_replace_without_force(llama: Path, tmp_path: Path):
    assert run(quantize, llama, "-o", tmp_path / "out").exit_code == 0
    result = run(quantize, llama, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "--force" in result.stderr
    assert run(quantize, llama, "-o", tmp_path / "out", "--force").exit_code == 0


@pytest.mark.parametrize(
    "wrong",
    [["--format", "int4"], ["--dtype", "fp8"], ["--blocksize", "63"], ["--max-shard-size", "big"], ["--skip", "("]],
)
def test_wrong_usage_has_exit_code_2(llama: Path, tmp_path: Path, wrong: list[str]):
    result = run(quantize, llama, "-o", tmp_path / "out", *wrong)
    assert result.exit_code == 2
    assert wrong[1] in result.stderr


def test_inspect(llama: Path, tmp_path: Path):
    run(quantize, llama, "-o", tmp_path / "out", "--double-quant")
    result = run(inspect, tmp_path / "out", "--tensors")
    assert result.exit_code == 0, result.output
    for text in ("nf4", "nested", "model.layers.0.mlp.up_proj.weight", "96 x 64"):
        assert text in result.stdout
    summary = json.loads(run(inspect, tmp_path / "out", "--json").stdout)
    assert (summary["format"], summary["problems"], "tensors" in summary) == ("nf4", [], False)
    assert json.loads(run(inspect, tmp_path / "out", "--json", "--tensors").stdout)["tensors"]


def test_inspect_of_damaged_checkpoints(llama: Path, tmp_path: Path):
    run(quantize, llama, "-o", tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(path.read_text().replace("nf4", "fp4"))
    result = run(inspect, tmp_path / "out")
    assert result.exit_code == 1
    assert "says fp4" in result.stdout
    assert json.loads(run(inspect, tmp_path / "out", "--json").stdout)["problems"]

    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    result = run(inspect, tmp_path / "out", "--json")
    assert result.exit_code == 1
    assert "cut off" in json.loads(result.stdout)["error"]
