"""The metadata-only distribution: what its wheel holds, and what libraries read from it."""

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = Path(__file__).parents[1]
CORE = PROJECT.parent / "bnb-core" / "pyproject.toml"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which the wheel is unpacked, as an installer would."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=PROJECT,
        check=True,
        capture_output=True,
        text=True,
    )
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == "bitsandbytes-0.50.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_version_that_libraries_read(site):
    (distribution,) = metadata.distributions(name="bitsandbytes", path=[str(site)])
    assert distribution.version == "0.50.2"
    assert '\nversion = "0.50.2"\n' in CORE.read_text()


def test_it_owns_no_file_of_the_package(site):
    (distribution,) = metadata.distributions(name="bitsandbytes", path=[str(site)])
    files = [file.as_posix() for file in distribution.files]
    assert files
    assert [file for file in files if not file.startswith("bitsandbytes-0.50.2.dist-info/")] == []
    assert not (site / "bitsandbytes").exists()
    # Without it, `packages_distributions` would call this distribution an owner of the import name.
    assert distribution.read_text("top_level.txt") is None


def test_it_pins_the_core_exactly(site):
    (distribution,) = metadata.distributions(name="bitsandbytes", path=[str(site)])
    required = [Requirement(text) for text in distribution.requires]
    (core,) = [requirement for requirement in required if requirement.marker is None]
    assert (core.name, str(core.specifier)) == ("bnb-core", "==0.50.2")


def test_its_extras_are_those_of_the_core(site):
    (distribution,) = metadata.distributions(name="bitsandbytes", path=[str(site)])
    extras = {Requirement(text).name for text in distribution.requires}
    assert extras == {"bnb-core"}
    backends = [
        name for name in ("cpu", "cuda", "rocm", "xpu", "mps", "hpu") if f'\n{name} = ["bnb-' in CORE.read_text()
    ]
    assert set(distribution.metadata.get_all("Provides-Extra")) == set(backends)


def test_what_is_installed_here_agrees():
    import bitsandbytes

    assert metadata.version("bitsandbytes") == metadata.version("bnb-core") == bitsandbytes.__version__
