"""Configuration of the documentation site: ``nox -s docs``, or ``sphinx-build -W -c docs . site``.

The source folder is the repository, because pages link to files beside the code; ``include_patterns`` says
what belongs to the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CORE = (ROOT / "packages" / "bnb-core" / "pyproject.toml").read_text(encoding="utf-8")

project = "bitsandbytes"
author = "the bitsandbytes contributors"
release = version = re.search(r'^version = "(.+)"', CORE, re.MULTILINE)[1]

extensions = ["myst_parser"]
root_doc = "docs/contents"
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
include_patterns = [
    "docs/**",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "changes/README.md",
    "examples/*/README.md",
    "packages/*/README.md",
    "packages/*/kernels/README.md",
]
# Not even looked into.
exclude_patterns = [".*", "dist", "models", "**/build"]

# Every link to a page, a heading or a file is looked up; `-W` makes a broken one an error.
nitpicky = True
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"bitsandbytes {release}"
html_copy_source = False

REDIRECT = (
    '<!doctype html><meta http-equiv="refresh" content="0; url={page}.html"><link rel="canonical" href="{page}.html">'
)


def write_front_page(app: Any, exception: Exception | None) -> None:
    """Lead from the site's root to its first page, which lies in a folder as its source does."""
    if exception is None and app.builder.format == "html":
        (Path(app.outdir) / "index.html").write_text(REDIRECT.format(page=root_doc), encoding="utf-8")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("build-finished", write_front_page)
