"""``bnb plugins new``: what it writes builds, installs, is listed and passes as it is."""

import json
import os
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from bitsandbytes.backends import scaffold
from bitsandbytes.contract import OP_API_VERSION
from bitsandbytes.errors import ArgumentError

REFUSED = {
    "": "not usable",
    "Abacus": "not usable",
    "a--b": "not usable",
    "9lives": "not usable",
    "a/b": "not usable",
    "cuda": "taken by a backend of this project",
}


def pip(*arguments, **options):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)


def has_build_tools():
    probe = "import hatchling, scikit_build_core, nanobind"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not has_build_tools(), reason="hatchling, scikit-build-core and nanobind are not installed")
def test_a_new_package_builds_is_listed_and_conforms(plugin_site, tmp_path):
    written = plugin_site.bnb("plugins", "new", "abacus-2", "--device", "cpu", "-o", str(tmp_path / "project"))
    assert written.returncode == 0, written.stderr
    # Nothing of this environment's core may be needed for the headers.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BNB_")}
    built = pip(
        "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path / "wheels", tmp_path / "project", env=environment
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tmp_path / "wheels").glob("bnb_abacus_2-*.whl")
    installed = pip("install", "--no-deps", "--target", plugin_site.path, wheel)
    assert installed.returncode == 0, installed.stderr

    (listed,) = [
        plugin
        for plugin in json.loads(plugin_site.bnb("plugins", "list", "--json").stdout)
        if plugin["name"] == "abacus-2"
    ]
    assert listed["available"], listed
    assert listed["distribution"] == "bnb-abacus-2"
    native = [op for op, kind in listed["ops"].items() if kind == "native"]
    assert native == ["dequantize_4bit", "dequantize_4bit.out"]

    gaps = tmp_path / "project" / "tests" / "gaps.txt"
    checked = plugin_site.bnb("plugins", "check", "abacus-2", "--json", "--gaps", str(gaps), "-k", "4bit")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    (report,) = json.loads(checked.stdout)
    assert report["conforms"]
    op = report["ops"]["dequantize_4bit"]
    assert op["native"] == op["calling"] > 80

    conform = plugin_site.run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-k", "dequantize_4bit",
        str(tmp_path / "project" / "tests"),
        BNB_BACKENDS="abacus-2", BNB_DISABLE_BACKENDS=None, BNB_BACKENDS_STRICT="1",
    )  # fmt: skip
    assert conform.returncode == 0, conform.stdout
    assert " passed" in conform.stdout


@pytest.mark.slow
def test_a_new_package_in_a_fresh_environment(tmp_path):
    """What a stranger does: an environment with the core, and pip, which gets the build tools by itself."""
    venv.create(tmp_path / "fresh", with_pip=True)
    scripts = tmp_path / "fresh" / ("Scripts" if sys.platform == "win32" else "bin")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("BNB_", "PYTHON", "PIP_"))}
    environment["BNB_BACKENDS"] = "abacus"

    def run(*command):
        command = [str(scripts / "python"), *map(str, command)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path)

    packages = Path(run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    # torch and the core are those of this environment: fetching them again would take a gigabyte.
    (packages / "inherited.pth").write_text(
        "".join(f"import site; site.addsitedir({folder!r})\n" for folder in site.getsitepackages())
    )
    bnb = ("-m", "bitsandbytes.cli", "plugins")
    written = run(*bnb, "new", "abacus", "--device", "cpu", "-o", tmp_path / "project")
    assert written.returncode == 0, written.stderr
    installed = run("-m", "pip", "install", "--no-deps", "--disable-pip-version-check", tmp_path / "project")
    if "No matching distribution found for" in installed.stderr or "ConnectionError" in installed.stderr:
        pytest.skip("pip cannot fetch the build tools here")
    assert installed.returncode == 0, installed.stdout + installed.stderr
    assert (packages / "bnb_abacus").is_dir()

    listed = run(*bnb, "list")
    assert listed.returncode == 0, listed.stdout + listed.stderr
    assert "available" in next(line for line in listed.stdout.splitlines() if line.startswith("abacus"))
    gaps = tmp_path / "project" / "tests" / "gaps.txt"
    checked = run(*bnb, "check", "abacus", "--gaps", gaps, "--op", "dequantize_4bit")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "abacus conforms" in checked.stdout


def test_a_device_that_is_not_here_is_declined_with_a_reason(plugin_site, tmp_path):
    scaffold.write_backend("chip", "chip9", tmp_path / "project")
    # The description alone: what is native is not needed to decline.
    plugin_site.record("bnb-chip", "0.1.0", [], "[bitsandbytes.backends]\nchip = bnb_chip:backend\n")
    variables = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "project" / "src"), str(plugin_site.path)])}
    result = plugin_site.bnb("plugins", "show", "chip", "--json", **variables)
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    assert (shown["available"], shown["devices"]) == (False, ["chip9"])
    assert "torch has no usable device of type 'chip9' here" in shown["reason"]


@pytest.mark.parametrize("device", ["cpu", "chip9"])
def test_what_is_written(tmp_path, device):
    root = scaffold.write_backend("my_chip", device, tmp_path / "package")
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert {
        "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", ".gitignore", ".github/workflows/test.yml",
        "kernels/bind.cpp", "src/bnb_my_chip/__init__.py", "src/bnb_my_chip/ops.py", "src/bnb_my_chip/_C.pyi",
        "tests/test_conform.py", "tests/gaps.txt", "bnb_native/include/bnb/quant.h",
        "bnb_native/cmake/bnb-config.cmake",
    } <= files  # fmt: skip
    project = (root / "pyproject.toml").read_text()
    assert 'name = "bnb-my-chip"' in project
    assert '[project.entry-points."bitsandbytes.backends"]\n"my_chip" = "bnb_my_chip:backend"' in project
    for path in root.rglob("*.py"):
        compile(path.read_text(), str(path), "exec")
    for path in root.rglob("*"):
        assert path.is_dir() or "%%" not in path.read_text(), path
    assert f"op_api=({OP_API_VERSION}, {OP_API_VERSION})" in (root / "src/bnb_my_chip/__init__.py").read_text()
    assert ("A.cpu()" in (root / "src/bnb_my_chip/ops.py").read_text()) == (device != "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


@pytest.mark.parametrize(("name", "text"), REFUSED.items())
def test_a_name_that_is_not_usable(tmp_path, name, text):
    with pytest.raises(ArgumentError, match=text):
        scaffold.write_backend(name, "cpu", tmp_path / "package")
    assert not (tmp_path / "package").exists()


@pytest.mark.parametrize("device", ["", "cuda:0", "CPU", "../x"])
def test_a_device_that_is_no_device_type(tmp_path, device):
    with pytest.raises(ArgumentError, match="no device type"):
        scaffold.write_backend("chip", device, tmp_path / "package")


def test_nothing_is_written_over(plugin_site, tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "mine.txt").write_text("mine")
    result = plugin_site.bnb("plugins", "new", "chip", "--device", "cpu", "-o", str(tmp_path / "package"))
    assert result.returncode == 2
    assert "is not an empty folder" in result.stderr
    assert [path.name for path in (tmp_path / "package").iterdir()] == ["mine.txt"]
    plugin_site.install("chip", "backend = None")
    result = plugin_site.bnb("plugins", "new", "chip", "--device", "cpu", "-o", str(tmp_path / "other"))
    assert result.returncode == 2
    assert "a backend called 'chip' is installed here" in result.stderr


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "package").mkdir()
    assert (scaffold.write_backend("chip", "cpu", tmp_path / "package") / "pyproject.toml").exists()


def test_headers_are_copied_and_nothing_else_is_replaced(tmp_path):
    import bnb_native

    copied = Path(bnb_native.copy_to(tmp_path))
    (copied / "include" / "bnb" / "quant.h").write_text("old")
    assert Path(bnb_native.copy_to(tmp_path)) == copied
    original = Path(bnb_native.include_dir()) / "bnb" / "quant.h"
    assert (copied / "include" / "bnb" / "quant.h").read_text() == original.read_text()
    (tmp_path / "other" / "bnb_native").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="holds something else"):
        bnb_native.copy_to(tmp_path / "other")
