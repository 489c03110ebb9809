"""The C++ headers that ``bnb_native`` ships, and the generator of their tables."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bnb_native
from bitsandbytes.codebooks import FP4, NF4

GENERATOR = Path(__file__).resolve().parents[3] / "tools" / "gen_codebooks.py"
HEADERS = Path(bnb_native.include_dir()) / "bnb"


def macro(name: str) -> list[float]:
    """The numbers of a macro in the generated header."""
    text = (HEADERS / "codebooks.h").read_text().replace("\\\n", " ")
    found = re.search(rf"^#define {name} (.*)$", text, re.MULTILINE)
    assert found, name
    return [float(item.strip().rstrip("f")) for item in found[1].split(",")]


def float32(values: tuple[float, ...] | list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).float()


@pytest.mark.parametrize(("name", "table"), [("NF4", NF4), ("FP4", FP4)])
def test_tables_are_those_of_python(name: str, table: tuple[float, ...]) -> None:
    """Read back from the text, not with the generator's code."""
    values, midpoints, order = (macro(f"BNB_{name}_{part}") for part in ("VALUES", "MIDPOINTS", "ORDER"))
    assert torch.equal(float32(values), float32(table))
    ascending = sorted(range(16), key=lambda code: (table[code], code))
    assert [int(code) for code in order] == ascending
    ordered = float32([table[code] for code in ascending])
    assert torch.equal(float32(midpoints), (ordered[:-1] + ordered[1:]) / 2)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not GENERATOR.exists(), reason="the generator is in the repository only")
def test_generated_header_is_current() -> None:
    result = run(GENERATOR, "--check")
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not GENERATOR.exists(), reason="the generator is in the repository only")
def test_check_notices_a_stale_header(tmp_path: Path) -> None:
    """With a changed header the check fails, names the file and leaves it alone."""
    stale = tmp_path / "codebooks.h"
    stale.write_text((HEADERS / "codebooks.h").read_text().replace("0.0f", "0.5f", 1))
    before = stale.read_text()
    result = run(GENERATOR, "--check", "--header", stale)
    assert result.returncode == 1
    assert str(stale) in result.stderr
    assert stale.read_text() == before
    assert run(GENERATOR, "--header", stale).returncode == 0
    assert stale.read_text() == (HEADERS / "codebooks.h").read_text()


@pytest.mark.parametrize(("option", "file"), [("--include-dir", "bnb/quant.h"), ("--cmake-dir", "bnb-config.cmake")])
def test_command_locates_files(option: str, file: str) -> None:
    result = run("-m", "bnb_native", option)
    assert (Path(result.stdout.strip()) / file).is_file(), result.stderr


def test_command_needs_an_option() -> None:
    result = run("-m", "bnb_native")
    assert result.returncode == 2
    assert "--cmake-dir" in result.stderr


def test_importing_it_imports_no_torch() -> None:
    """A build must not load torch, which its isolated environment does not have."""
    code = "import sys, bnb_native; print(sorted(n for n in sys.modules if n in ('torch', 'numpy', 'bitsandbytes')))"
    assert run("-c", code).stdout.strip() == "[]"


def included_by(header: Path) -> list[str]:
    return re.findall(r"^#include [<\"](.*)[>\"]", header.read_text(), re.MULTILINE)


def test_headers_include_only_themselves_and_the_freestanding_library() -> None:
    """Device compilers read them too: no header of the host's standard library beyond these, nor those for Python."""
    allowed = {"cstdint", "cstring", "math.h"}
    own = {f"bnb/{header.name}" for header in HEADERS.glob("*.h")}
    assert "bnb/quant.h" in own
    for header in HEADERS.glob("*.h"):
        for included in included_by(header):
            assert included in allowed | own, f"{header.name}: {included}"


def test_headers_for_python_modules_are_complete() -> None:
    """Host compilers alone read them: all that they include of ours is shipped, and nothing needs torch or nanobind's
    own headers, which the module includes before."""
    headers = sorted((HEADERS / "python").glob("*.h"))
    assert headers
    for header in headers:
        for included in included_by(header):
            ships_it = (HEADERS.parent / included).is_file()
            assert ships_it if included.startswith("bnb/") else "/" not in included, f"{header.name}: {included}"
