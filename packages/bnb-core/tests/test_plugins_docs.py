"""The backend that the documentation builds is a backend that works."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "plugins.md"


def files_of_the_page():
    """Path -> text of each code block that follows a line with nothing but a path."""
    return dict(re.findall(r"^`([\w./]+)`\n\n```\w+\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))


@pytest.fixture
def project(tmp_path):
    root = tmp_path / "bnb-tally"
    for name, text in files_of_the_page().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_example_builds_is_listed_serves_its_op_and_conforms(project, plugin_site):
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel"], cwd=project, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = (project / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(plugin_site.path)

    result = plugin_site.bnb("plugins", "show", "tally", "--json")
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    assert shown["available"] is True
    assert [op for op, kind in shown["ops"].items() if kind == "native"] == ["int8_linear_matmul"]

    out = plugin_site.python(
        """
        import torch, bitsandbytes, bnb_tally.kernels
        taken = []
        run = bnb_tally.kernels.int8_linear_matmul
        bnb_tally.kernels.int8_linear_matmul = lambda A, B: taken.append(A.shape[-1]) or run(A, B)
        for columns in (1024, 1025):
            a = torch.full((2, columns), -128, dtype=torch.int8)
            assert torch.ops.bitsandbytes.int8_linear_matmul(a, a)[0, 0].item() == columns * 128 * 128
        print(taken)
        """
    )
    assert out.split() == ["[1024]"]

    conform = plugin_site.run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-k", "int8_linear_matmul",
        str(project / "tests"), BNB_BACKENDS="tally", BNB_DISABLE_BACKENDS=None, BNB_BACKENDS_STRICT="1",
    )  # fmt: skip
    assert conform.returncode == 0, conform.stdout
    assert " passed" in conform.stdout
