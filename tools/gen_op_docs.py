"""Write the reference of the ops, ``docs/ops``, from their contracts: one page per op and an index.

Everything on a page comes from the code: the schema, arguments, results and formula from the contract; the
errors from calls that break it, which are made here; who implements the op from the backends' lists of
kernels, which are read and not imported, since most need hardware.

``--check`` writes nothing and fails when a page is out of date.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ROOT / "packages"
DOCS = ROOT / "docs" / "ops"
# The reference alone makes the calls.
os.environ["BNB_BACKENDS"] = ""
sys.path.insert(0, str(PACKAGES / "bnb-core" / "src"))

from bitsandbytes.contract import OP_API_VERSION, OPS, Op  # noqa: E402
from bitsandbytes.errors import ArgumentError  # noqa: E402
from bitsandbytes.testing.case import Case  # noqa: E402
from bitsandbytes.testing.checks import CHECKS  # noqa: E402

NOTICE = "<!-- Written by tools/gen_op_docs.py from the contracts; change those instead. -->\n"


@dataclass
class Docstring:
    """A docstring in Google's style, taken apart."""

    summary: str = ""
    #: The rest of the text before the first section, by paragraph.
    text: list[str] = field(default_factory=list)
    #: Name or names of arguments, and what is said of them.
    arguments: list[tuple[str, str]] = field(default_factory=list)
    returns: str = ""
    raises: list[tuple[str, str]] = field(default_factory=list)


def parse(doc: str) -> Docstring:
    """Take a docstring apart."""
    parts = re.split(r"^(Args|Returns|Raises):$", doc, flags=re.MULTILINE)
    paragraphs = [flat(paragraph) for paragraph in parts[0].strip().split("\n\n")]
    sections = {name: textwrap.dedent(body).strip("\n") for name, body in zip(parts[1::2], parts[2::2], strict=True)}
    return Docstring(
        paragraphs[0],
        paragraphs[1:],
        list(entries(sections.get("Args", ""))),
        flat(sections.get("Returns", "")),
        list(entries(sections.get("Raises", ""))),
    )


def entries(section: str) -> Iterator[tuple[str, str]]:
    """The entries ``name, name: text`` of a section; a line that is indented goes on."""
    for entry in re.split(r"\n(?=\S)", section) if section.strip() else ():
        names, _colon, text = flat(entry).partition(": ")
        yield names, text


def flat(text: str) -> str:
    """One line, with inline code in Markdown's form."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"``\1``", text)
    return re.sub(r"\s+", " ", text).strip().replace("``", "`")


def kernels() -> dict[str, list[tuple[str, str, str]]]:
    """Op -> the in-tree backends that have a kernel: distribution, function, and the function that accepts calls."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for package in sorted(PACKAGES.glob("bnb-*")):
        for path in sorted((package / "src").rglob("*.py")) if package.name != "bnb-core" else ():
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Kernel"):
                    continue
                given = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "accepts")]
                if isinstance(given[0], ast.Constant):
                    accepts = ast.unparse(given[2]) if len(given) > 2 else ""
                    found.setdefault(str(given[0].value), []).append((package.name, ast.unparse(given[1]), accepts))
    return found


def anchor(name: str) -> str:
    """File of an op's page."""
    return f"{name}.md"


def page(op: Op, implementations: dict[str, list[tuple[str, str, str]]]) -> str:
    """The page of one op, its ``.out`` overload included."""
    doc = parse(op.doc)
    variant = OPS.get(f"{op.name}.out")
    schemas = [op.schema, *([variant.schema] if variant else [])]
    blocks = [
        f"# `{op.name}`",
        NOTICE.strip(),
        *(linked(text, op.name) for text in (doc.summary, *doc.text)),
        "## Schema",
        "\n".join(["```text", *(f"bitsandbytes::{schema}" for schema in schemas), "```"]),
        "Called as `torch.ops.bitsandbytes."
        + (f"{op.name}`; `.out` writes into its last argument and returns nothing." if variant else f"{op.name}`."),
        "## Arguments",
        argument_table(op, doc),
        "## Result",
        linked(doc.returns, op.name) or "Nothing: it works in place on the arguments that the schema marks with `!`.",
        "## Format and formula",
        *format_of(op),
        "## Errors",
        *errors(op, doc),
        "## Who implements it",
        implementation_table(op, variant, implementations),
        "## How it is checked",
        judgement(op),
    ]
    return "\n\n".join(blocks) + "\n"


def argument_table(op: Op, doc: Docstring) -> str:
    """Name, type, default and description of each argument."""
    texts = {}
    for names, text in doc.arguments:
        first, *others = (name.strip() for name in names.split(","))
        texts |= {first: linked(text, op.name), **dict.fromkeys(others, f"as `{first}`")}
    rows = ["| argument | type | default | |", "| --- | --- | --- | --- |"]
    for argument in op.overload._schema.arguments:
        if argument.name not in texts:
            raise SystemExit(f"{op.name}: its docstring does not describe {argument.name!r}")
        kind = re.search(rf"(?:[(,] ?)([^,()]*(?:\([^)]*\)[^,()]*)?) {argument.name}\b", op.schema)
        default = f"`{argument.default_value!r}`" if argument.has_default_value() else ""
        assert kind is not None, (op.schema, argument.name)
        rows.append(f"| `{argument.name}` | `{kind[1].strip()}` | {default} | {cell(texts[argument.name])} |")
    return "\n".join(rows)


def linked(text: str, own: str) -> str:
    """A text with links from the names of other ops to their pages."""
    others = [name for name in OPS if name != own and "." not in name]
    return re.sub(rf"`({'|'.join(others)})`", lambda found: f"[{found[0]}]({anchor(found[1])})", text)


def cell(text: str) -> str:
    """A text that does not end a cell of a table."""
    return text.replace("|", "\\|")


def format_of(op: Op) -> list[str]:
    """What the module of the reference says about its ops: layout, formulas, sources."""
    module = inspect.getdoc(inspect.getmodule(inspect.unwrap(op.reference))) or ""
    more = ["[Optimizers](../optimizers.md) has the formulas of the rules."] if op.name.startswith("optimizer_") else []
    return [*map(flat, module.split("\n\n")), "What is stored how, is in [Formats](../formats.md).", *more]


def errors(op: Op, doc: Docstring) -> list[str]:
    """The errors that the contract's check raises, each from a real call."""
    rows = ["| when | error |", "| --- | --- |"]
    for refusal in CHECKS["refuses"].items:
        if refusal.op != op.name:
            continue
        try:
            op.check(*refusal.make())
        except ArgumentError as error:
            text = str(error).removeprefix(f"bitsandbytes::{op.name}: ")
            rows.append(f"| {refusal.id.replace('-', ' ')} | `{type(error).__name__}`: {cell(text)} |")
        else:
            raise SystemExit(f"{op.name}: the call {refusal.id!r} is not refused")
    lines = [f"- `{name}`: {text}" for name, text in doc.raises]
    return [
        "Checked before any implementation runs, on every device; for instance:",
        "\n".join(rows),
        *(["Raised by the implementation:", "\n".join(lines)] if lines else []),
    ]


def implementation_table(op: Op, variant: Op | None, implementations: dict[str, list[tuple[str, str, str]]]) -> str:
    """Backends of this repository with a kernel; the reference serves the rest."""
    rows = ["| | kernel | takes |", "| --- | --- | --- |"]
    for name in (op.name, *([variant.name] if variant else [])):
        for package, function, accepts in implementations.get(name, ()):
            takes = f"what `{accepts}` accepts" if accepts else "every call"
            rows.append(f"| {package} | `{name}`: `{function}` | {takes} |")
    reference = inspect.unwrap(op.reference)
    rows.append(f"| reference | `{reference.__module__}.{reference.__name__}` | every call, on every device |")
    return "\n".join(rows)


def judgement(op: Op) -> str:
    """How the conformance kit judges results."""
    cases = [case for case in CHECKS["values"].items if case.op == op.name and isinstance(case, Case)]
    total = sum(item.op == op.name for check in CHECKS.values() for item in check.items)
    bounds = sorted({case.tolerance for case in cases if case.tolerance is not None})
    if any(case.judge is not None for case in cases):
        how = "One step is compared with the same step in float64, codes of 8-bit states up to their neighbour."
    elif bounds:
        listed = ", ".join(f"{bound:.2g}" for bound in bounds)
        how = (
            f"The relative error to the product in float64 is at most {listed}, by the dtype of the result; why, "
            "says `bitsandbytes.testing.tolerances`."
        )
    else:
        how = "Results are the bits of the reference."
    return f"{how} The conformance kit makes {total} checks of this op, {len(cases)} of them of values."


def index(ops: list[Op], implementations: dict[str, list[tuple[str, str, str]]]) -> str:
    """The list of all ops."""
    packages = sorted({package for entries in implementations.values() for package, *_rest in entries})
    rows = [f"| op | | {' | '.join(packages)} |", f"| --- | --- |{' --- |' * len(packages)}"]
    for op in ops:
        have = {package: accepts for package, _function, accepts in implementations.get(op.name, ())}
        marks = ["" if package not in have else "in part" if have[package] else "yes" for package in packages]
        rows.append(f"| [`{op.name}`]({anchor(op.name)}) | {parse(op.doc).summary} | {' | '.join(marks)} |")
    return (
        "\n\n".join(
            [
                "# Ops",
                NOTICE.strip(),
                f"The contracts of all ops, op API {OP_API_VERSION}. The last columns say which backend of this "
                "repository has a kernel of its own; *in part* means that it declines some calls. The reference serves "
                "what is left. [Versions](../op-api.md) says what may change, and when.",
                "\n".join(rows),
            ]
        )
        + "\n"
    )


def pages() -> dict[str, str]:
    """Every file by its name."""
    implementations = kernels()
    ops = [op for name, op in OPS.items() if not name.endswith(".out")]
    unknown = implementations.keys() - OPS.keys()
    if unknown:
        raise SystemExit(f"kernels for ops without a contract: {', '.join(sorted(unknown))}")
    return {"README.md": index(ops, implementations)} | {anchor(op.name): page(op, implementations) for op in ops}


def main() -> int:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--folder", type=Path, default=DOCS, help="where the pages lie, by default docs/ops")
    arguments = parser.parse_args()
    folder, wanted = arguments.folder, pages()
    there = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    if arguments.check:
        stale = sorted(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name))
        if stale:
            print(f"out of date in {folder}: {', '.join(stale)}; run: python tools/gen_op_docs.py", file=sys.stderr)
        return 1 if stale else 0
    folder.mkdir(parents=True, exist_ok=True)
    for name in there.keys() - wanted.keys():
        (folder / name).unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
