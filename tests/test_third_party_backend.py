"""The example of a third-party backend, built as a wheel, installed, and used through the public door."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "third_party_backend"

pytestmark = pytest.mark.slow


def run(*command, **options):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=900, **options)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the installed wheel; the environment of this test has torch and the core."""
    pytest.importorskip("setuptools")
    pytest.importorskip("ninja")
    folder = tmp_path_factory.mktemp("third-party")
    source = folder / "source"
    # Nothing is built inside the checkout.
    copied = ("pyproject.toml", "setup.py", "README.md", "csrc", "src")
    source.mkdir()
    for name in copied:
        run("cp", "-r", EXAMPLE / name, source / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    built = run(*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", folder / "wheels", source)
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    (wheel,) = (folder / "wheels").glob("bnb_mydev-*.whl")
    installed = run(*pip, "install", "--no-deps", "--target", folder / "site", wheel)
    assert installed.returncode == 0, installed.stderr
    return folder / "site"


@pytest.fixture
def environment(site):
    """Variables of a process that sees the wheel, and no other backend."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BNB_")}
    path = os.pathsep.join(filter(None, [str(site), inherited.get("PYTHONPATH")]))
    return inherited | {"PYTHONPATH": path, "BNB_BACKENDS": "mydev", "BNB_BACKENDS_STRICT": "1"}


def test_layers_and_an_optimizer_run_on_the_device(environment):
    result = run(sys.executable, "-W", "error::UserWarning", EXAMPLE / "run.py", env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    for text in ("Linear4bit, torch.float32", "Linear4bit, torch.bfloat16", "Linear8bitLt, threshold 6", "AdamW8bit"):
        assert text in result.stdout


def test_layers_move_to_the_device_and_back_and_into_a_checkpoint(environment):
    code = """
        import io, torch, torch_mydev, bitsandbytes as bnb
        torch.manual_seed(0)
        for make in (
            lambda: bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4"),
            lambda: bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False),
        ):
            # The CPU trains int8 layers on the decoded weight.
            layer = make().eval()
            assert list(layer.state_dict())[:2] == ["weight", "bias"]
            layer = layer.to("mydev")
            kind, names = type(layer.weight), list(layer.state_dict())
            x = torch.randn(3, 64)
            there = layer(x.to("mydev")).cpu()
            file = io.BytesIO()
            torch.save({name: value.cpu() for name, value in layer.state_dict().items()}, file)
            file.seek(0)
            layer = layer.to("cpu")
            assert type(layer.weight) is kind and list(layer.state_dict()) == names, names
            torch.testing.assert_close(layer(x), there, rtol=1e-4, atol=1e-4)
            fresh = make().eval().to("mydev")
            fresh.load_state_dict(torch.load(file))
            torch.testing.assert_close(fresh(x.to("mydev")).cpu(), there, rtol=0, atol=0)
            print(kind.__name__, names[:2])
    """
    result = run(sys.executable, "-c", "\n".join(line[8:] for line in code.splitlines()), env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["Params4bit ['weight', 'bias']", "Int8Params ['weight', 'bias']"]


def test_it_is_listed_and_conforms(environment):
    bnb = (sys.executable, "-m", "bitsandbytes.cli", "plugins")
    shown = json.loads(run(*bnb, "show", "mydev", "--json", env=environment).stdout)
    assert (shown["available"], shown["devices"]) == (True, ["mydev"])
    native = [op for op, kind in shown["ops"].items() if kind == "native"]
    assert native == ["dequantize_4bit", "gemm_4bit", "int8_linear_matmul", "int8_linear"]
    result = run(*bnb, "check", "mydev", "--json", "--gaps", EXAMPLE / "tests" / "gaps.txt", env=environment)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr
    (report,) = json.loads(result.stdout)
    assert report["device"] == "mydev"
    assert (report["conforms"], report["crashes"]) == (True, 0)
    assert report["ops"]["gemm_4bit"]["native"] > 50
