"""Interruptions and limits: a killed run, little memory, a full disk, changed sources, two runs."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from bitsandbytes.checkpoint import CheckpointError, Progress, QuantizeOptions, quantize_checkpoint
from bitsandbytes.checkpoint import workspace as workspace_module

pytestmark = [pytest.mark.usefixtures("no_transformers")]

OPTIONS = QuantizeOptions(double_quant=True, max_shard_bytes=30_000)

#: Limits and signals need a process of its own; transformers is not imported there.
PRELUDE = """
import os, resource, signal, sys
sys.modules["transformers"] = None
from bitsandbytes.checkpoint import *
source, out = sys.argv[1:3]
options = QuantizeOptions(double_quant=True, max_shard_bytes=30_000)
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "BNB_BACKENDS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


def partials(folder: Path) -> list[Path]:
    return sorted(folder.glob("out.partial-*"))


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_killed_run_is_continued_to_the_same_bytes(make_llama, checkpoints, tmp_path: Path, fraction: float):
    source = make_llama(layers=4, shards=2)
    quantize_checkpoint(source, tmp_path / "whole", OPTIONS)
    result = run(
        """
        def kill(progress):
            if progress.done > float(sys.argv[3]) * progress.total:
                os.kill(os.getpid(), signal.SIGKILL)
        quantize_checkpoint(source, out, options, progress=kill)
        """,
        source,
        tmp_path / "out",
        fraction,
    )
    assert result.returncode == -9, result.stderr
    assert not (tmp_path / "out").exists()
    assert len(partials(tmp_path)) == 1
    result = run("print(quantize_checkpoint(source, out, options).resumed_shards)", source, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert (int(result.stdout) > 0) == (fraction > 0.3)
    assert checkpoints.contents(tmp_path / "out") == checkpoints.contents(tmp_path / "whole")
    assert not partials(tmp_path)


class InterruptedRunError(Exception):
    pass


def interrupt(progress: Progress) -> None:
    if progress.done > progress.total / 2:
        raise InterruptedRunError


def interrupted_run(source: Path, out: Path, options: QuantizeOptions = OPTIONS) -> None:
    with pytest.raises(InterruptedRunError):
        quantize_checkpoint(source, out, options, progress=interrupt)


def test_damaged_leftovers_are_made_again(make_llama, checkpoints, tmp_path: Path):
    source = make_llama(layers=4)
    quantize_checkpoint(source, tmp_path / "whole", OPTIONS)
    for damage in ("shard", "manifest", "stray"):
        interrupted_run(source, tmp_path / "out")
        (partial,) = partials(tmp_path)
        shards = sorted((partial / "checkpoint").glob("*.safetensors"))
        assert shards
        if damage == "shard":
            shards[0].write_bytes(shards[0].read_bytes()[:-1])
        elif damage == "manifest":
            (partial / "manifest.json").write_text("{")
        else:
            (partial / "checkpoint" / "stray.bin").write_text("x")
        report = quantize_checkpoint(source, tmp_path / "out", OPTIONS)
        assert report.resumed_shards == {"shard": 0, "manifest": 0, "stray": len(shards)}[damage]
        assert checkpoints.contents(tmp_path / "out") == checkpoints.contents(tmp_path / "whole")
        quantize_checkpoint(source, tmp_path / "out2", OPTIONS)
        for path in (tmp_path / "out", tmp_path / "out2"):
            for file in path.iterdir():
                file.unlink()
            path.rmdir()


def test_report_of_a_continued_run_covers_everything(make_llama, tmp_path: Path):
    source = make_llama(layers=4)
    whole = quantize_checkpoint(source, tmp_path / "whole", OPTIONS).to_dict()
    interrupted_run(source, tmp_path / "out")
    continued = quantize_checkpoint(source, tmp_path / "out", OPTIONS).to_dict()
    assert continued.pop("resumed_shards") > 0
    for key in ("out", "seconds", "resumed_shards"):
        whole.pop(key)
        continued.pop(key, None)
    assert continued.pop("relative_rms_error") == pytest.approx(whole.pop("relative_rms_error"))
    assert continued == whole


def test_no_resume_starts_again(make_llama, tmp_path: Path):
    source = make_llama(layers=4)
    interrupted_run(source, tmp_path / "out")
    assert quantize_checkpoint(source, tmp_path / "out", OPTIONS, resume=False).resumed_shards == 0


@pytest.mark.parametrize("change", ["options", "weights", "config"])
def test_other_sources_or_options_are_not_continued(make_llama, tmp_path: Path, change: str):
    source = make_llama(layers=4)
    interrupted_run(source, tmp_path / "out")
    options = OPTIONS
    if change == "options":
        options = QuantizeOptions(max_shard_bytes=30_000)
    elif change == "weights":
        os.utime(source / "model.safetensors", ns=(1, 1))
    else:
        (source / "config.json").write_text((source / "config.json").read_text().replace("50", "51"))
    report = quantize_checkpoint(source, tmp_path / "out", options)
    assert report.resumed_shards == 0
    assert any("interrupted run" in warning for warning in report.warnings)


def test_source_that_changes_under_the_run(make_llama, tmp_path: Path):
    source = make_llama(layers=2)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        quantize_checkpoint(
            source, tmp_path / "out", progress=lambda progress: os.utime(source / "model.safetensors", ns=(1, 1))
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(workspace_module.fcntl is None, reason="needs locks")
def test_two_runs_into_the_same_folder(make_llama, tmp_path: Path):
    source = make_llama(layers=2)

    def second(progress: Progress) -> None:
        with pytest.raises(CheckpointError, match="another run"):
            quantize_checkpoint(source, tmp_path / "out")
        raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        quantize_checkpoint(source, tmp_path / "out", progress=second)


def test_failing_replacement_keeps_the_old_checkpoint(
    llama: Path, checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    quantize_checkpoint(llama, tmp_path / "out")
    before = checkpoints.contents(tmp_path / "out")
    replace = os.replace

    def fail(source: os.PathLike, target: os.PathLike) -> None:
        if Path(target) == tmp_path / "out" and Path(source).name == "checkpoint":
            raise OSError("no luck")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckpointError, match="stays in"):
        quantize_checkpoint(llama, tmp_path / "out", QuantizeOptions(format="int8"), force=True)
    assert checkpoints.contents(tmp_path / "out") == before


@pytest.mark.parametrize("again", [False, True])
def test_kill_between_the_renames_of_a_replacement(
    llama: Path, checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
):
    quantize_checkpoint(llama, tmp_path / "whole", QuantizeOptions(format="int8"))
    quantize_checkpoint(llama, tmp_path / "out")
    replace = os.replace

    def die(source: os.PathLike, target: os.PathLike) -> None:
        if Path(source).name == "checkpoint" or ".old-" in Path(source).name:
            raise InterruptedRunError
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(InterruptedRunError):
            quantize_checkpoint(llama, tmp_path / "out", QuantizeOptions(format="int8"), force=True)
    assert not (tmp_path / "out").exists()
    if again:
        # A user puts another checkpoint there before the run is repeated.
        quantize_checkpoint(llama, tmp_path / "out", QuantizeOptions(format="fp4"))
    report = quantize_checkpoint(llama, tmp_path / "out", QuantizeOptions(format="int8"), force=True)
    assert report.resumed_shards == 1
    assert checkpoints.contents(tmp_path / "out") == checkpoints.contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "out", "whole"]


def test_failure_during_forced_run_keeps_the_old_checkpoint(make_llama, checkpoints, tmp_path: Path):
    source = make_llama(layers=2)
    quantize_checkpoint(source, tmp_path / "out")
    before = checkpoints.contents(tmp_path / "out")
    with pytest.raises(InterruptedRunError):
        quantize_checkpoint(source, tmp_path / "out", OPTIONS, force=True, progress=interrupt)
    assert checkpoints.contents(tmp_path / "out") == before


def test_too_little_space_is_told_at_once(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="1,000 free"):
        quantize_checkpoint(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
def test_write_that_fails_leaves_no_output(make_llama, checkpoints, tmp_path: Path):
    source = make_llama(layers=4)
    # A file of finished weights may grow to 30 kB; the limit stops one in the middle.
    result = run(
        """
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            quantize_checkpoint(source, out, options)
        except CheckpointError as error:
            print(error)
        """,
        source,
        tmp_path / "out",
    )
    assert result.returncode == 0, result.stderr
    assert "cannot be written" in result.stdout
    assert not (tmp_path / "out").exists()
    (partial,) = partials(tmp_path)
    assert all(path.suffix == ".safetensors" for path in (partial / "checkpoint").iterdir())
    quantize_checkpoint(source, tmp_path / "out", OPTIONS)
    assert (tmp_path / "out" / "config.json").is_file()


def test_unreadable_file(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Permissions do not stop a superuser, so the refusal is made here.
    original = Path.open

    def refuse(self: Path, *arguments, **keywords):
        if self.name == "model.safetensors":
            raise PermissionError(13, "Permission denied")
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: .*Permission denied"):
        quantize_checkpoint(llama, tmp_path / "out")


def test_read_error_names_file_and_tensor(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from bitsandbytes.checkpoint.tensorfile import TensorFile

    class Failing:
        def seek(self, position: int) -> None:
            raise OSError(5, "Input/output error")

        def close(self) -> None:
            pass

    monkeypatch.setattr(TensorFile, "_handle", lambda self: Failing())
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: cannot read tensor 'lm_head\.weight': .*Input/output"
    ):
        quantize_checkpoint(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
@pytest.mark.parametrize("format_name", ["nf4", "int8"])
def test_memory_does_not_grow_with_the_model(checkpoints, tmp_path: Path, format_name: str):
    # 4 files of 64 MB, with one matrix of 48 MB in each; 100 MB of address space are left.
    tensors = {}
    for layer in range(4):
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = torch.randn(6144, 4096).bfloat16()
        tensors[f"model.layers.{layer}.mlp.embed.weight"] = torch.randn(2048, 4096).bfloat16()
    source = checkpoints.write(tmp_path / "source", tensors, checkpoints.config, shards=4)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    del tensors
    result = run(
        """
        options = QuantizeOptions(format=sys.argv[3], double_quant=True)
        import torch, bitsandbytes.functional as F
        # Threads and kernels take their own share of address space on first use.
        F.quantize_4bit(torch.randn(64, 64).bfloat16(), compress_statistics=True)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 10**6, used + 100 * 10**6))
        try:
            torch.empty(150 * 10**6, dtype=torch.uint8)
        except RuntimeError:
            print("limited")
        report = quantize_checkpoint(source, out, options, chunk_values=1 << 18)
        print(report.quantized_tensors, report.bytes_before)
        """,
        source,
        tmp_path / "out",
        format_name,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == ["limited", "4", str(size)]
    assert size > 250 * 10**6
