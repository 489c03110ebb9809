"""Every distribution carries the license, in its source archive and in its wheel."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LICENSE = (ROOT / "LICENSE").read_bytes()
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
#: Wheels of the others need a compiler; they take the same list of files from their metadata.
PURE = ("bitsandbytes", "bnb-core")


def build(package, kind, folder):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    result = subprocess.run(command, cwd=package, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    (archive,) = folder.iterdir()
    return archive


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_source_archives(package, tmp_path):
    with tarfile.open(build(package, "sdist", tmp_path)) as archive:
        root = archive.getnames()[0].partition("/")[0]
        assert archive.extractfile(f"{root}/LICENSE").read() == LICENSE
        metadata = archive.extractfile(f"{root}/PKG-INFO").read().decode()
    assert "License-Expression: MIT\n" in metadata
    assert "License-File: LICENSE\n" in metadata


@pytest.mark.parametrize("name", PURE)
def test_wheels(name, tmp_path):
    with zipfile.ZipFile(build(ROOT / "packages" / name, "wheel", tmp_path)) as archive:
        (license_file,) = [name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
        assert archive.read(license_file) == LICENSE
