"""Links and commands in the documentation lead somewhere."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "changes", "docs", "examples", "packages")
PAGES = sorted(
    page.relative_to(ROOT)
    for pattern in (
        "*.md",
        "changes/*.md",
        "docs/**/*.md",
        "examples/**/*.md",
        "benchmarks/**/*.md",
        "packages/**/*.md",
    )
    for page in ROOT.glob(pattern)
    if not {"build", "dist", ".pytest_cache"}.intersection(page.relative_to(ROOT).parts)
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SESSION = re.compile(r"\bnox -s ([a-z0-9_]+)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def anchors(page):
    """The names that headings of a page can be linked by."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub(lambda code: code[0].strip("`"), page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files(page):
    broken = []
    for link in LINK.findall(CODE.sub("", (ROOT / page).read_text())):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page.parent / path).resolve() if path else ROOT / page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_sessions_exist(page):
    sessions = set(re.findall(r"^@nox\.session\ndef (\w+)", (ROOT / "noxfile.py").read_text(), re.MULTILINE))
    assert {"demo", "tests"} <= sessions
    assert set(SESSION.findall((ROOT / page).read_text())) <= sessions


def test_every_page_of_the_documentation_is_in_the_index_of_its_folder():
    pages = [page for page in PAGES if page.parts[0] == "docs" and page.name != "README.md"]
    missing = [page for page in pages if f"({page.name})" not in (ROOT / page.parent / "README.md").read_text()]
    assert not list(map(str, missing))


def test_the_reference_of_the_ops_is_that_of_the_contracts():
    command = [sys.executable, str(ROOT / "tools" / "gen_op_docs.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_a_stale_reference_is_noticed(tmp_path):
    shutil.copytree(ROOT / "docs" / "ops", tmp_path / "ops")
    with (tmp_path / "ops" / "gemm_4bit.md").open("a") as page:
        page.write("More.\n")
    (tmp_path / "ops" / "gone.md").write_text("# gone\n")
    command = [sys.executable, str(ROOT / "tools" / "gen_op_docs.py"), "--check", "--folder", str(tmp_path / "ops")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert "gemm_4bit.md, gone.md; run: python tools/gen_op_docs.py" in result.stderr


def runnable_blocks():
    """Python examples, except those that need a model, and those about a backend of the reader's own."""
    for page in PAGES:
        if page.stem in {"backends", "plugins"}:
            continue
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)):
            if "path/to" not in block:
                yield pytest.param(block, id=f"{page}-{number}")


@pytest.mark.parametrize("block", list(runnable_blocks()))
def test_examples_run(block):
    exec(compile(block, "example", "exec"), {"__name__": "example"})
