"""The command: run both environments, compare, print a table, exit with 1 on what nothing explains."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from tests.compare.case import Case
from tests.compare.cases import codebook_cases, first_round, second_round
from tests.compare.explanation import Difference, Explanation, WrongValueError
from tests.compare.known import explain
from tests.compare.verdict import differences, error_of, summarize

ROOT = Path(__file__).resolve().parents[2]
#: Environment of a worker by the name of the backend.
BACKENDS = {"reference": {"BNB_BACKENDS": ""}, "native": {}}
#: Environments that run at a time; each is one process with one thread.
WORKERS = 2
#: Ops under their names in ``torch.ops``, for cases whose own name is another one.
OPS_OF_CASE = {
    "codebook": (),
    "dequantize_4bit_state": ("dequantize_4bit_nested",),
    "round_trip_4bit": ("quantize_4bit", "dequantize_4bit"),
    "linear4bit_state_dict": ("quantize_4bit",),
    "linear4bit_load": ("dequantize_4bit", "dequantize_4bit_nested"),
    "linear8bit_state_dict": ("int8_vectorwise_quant",),
    "linear8bit_load": ("int8_vectorwise_dequant", "int8_linear"),
    "optimizer_op": ("optimizer_update_32bit", "optimizer_update_8bit_blockwise"),
    "optimizer_state_dict": ("optimizer_step_32bit", "optimizer_step_8bit"),
    "optimizer_load": ("optimizer_step_32bit", "optimizer_step_8bit"),
}
#: Unexplained cases printed per op; the report has all.
SHOWN = 5


@dataclass
class Side:
    """One environment."""

    name: str
    python: str
    environment: dict[str, str] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def run(self, cases: list[Case], folder: Path, label: str) -> dict[str, Any]:
        """Results by case. A case that kills the process counts as an error, and the rest goes on."""
        started = time.monotonic()
        paths = [folder / f"{self.name}-{label}.{suffix}" for suffix in ("cases", "results", "marker")]
        killed: dict[str, Any] = {}
        todo = cases
        while todo:
            torch.save([(case.op, case.id, case.inputs) for case in todo], paths[0])
            death = self.start(*paths)
            done = read_records(paths[1])
            if death is None:
                break
            culprit = paths[2].read_text() if paths[2].exists() else ""
            if not culprit or culprit in done:
                raise click.ClickException(f"{self.name} ({self.python}) could not run: {death}")
            killed[culprit] = {"error": f"process died: {death}"}
            todo = [case for case in todo if case.key not in done and case.key not in killed]
        self.seconds += time.monotonic() - started
        return read_records(paths[1]) | killed

    def start(self, cases: Path, results: Path, marker: Path) -> str | None:
        """Run the worker once; the reason if it did not end well."""
        command = [self.python, "-m", "tests.compare.worker", str(cases), str(results), str(marker)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | self.environment
        process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        for line in process.stdout.splitlines():
            if line.startswith("{"):
                self.about = json.loads(line)
        if process.returncode == 0:
            return None
        last = process.stderr.strip().splitlines()[-1:] or ["no message"]
        return f"exit status {process.returncode}, {last[0]}"


def read_records(path: Path) -> dict[str, Any]:
    """Everything that a worker wrote; a half-written record at the end does not count."""
    records: dict[str, Any] = {}
    if not path.exists():
        return records
    data = path.read_bytes()
    place = 0
    while place + 8 <= len(data):
        (length,) = struct.unpack_from("<q", data, place)
        if place + 8 + length > len(data):
            break
        key, result = torch.load(io.BytesIO(data[place + 8 : place + 8 + length]), weights_only=True)
        records[key] = result
        place += 8 + length
    return records


@dataclass
class Outcome:
    """What became of one case."""

    case: Case
    backend: str
    paths: list[str]
    explanation: Explanation | None = None
    problem: str | None = None

    @property
    def unexplained(self) -> bool:
        """Whether this fails the comparison."""
        return self.problem is not None


def judge(case: Case, backend: str, ours: Any, theirs: Any) -> Outcome:
    """Equal, explained, or neither."""
    if ours is None or theirs is None:
        return Outcome(case, backend, ["missing"], problem="no result from " + ("us" if ours is None else "them"))
    paths = differences(ours, theirs)
    if not paths:
        return Outcome(case, backend, paths)
    try:
        explanation = explain(Difference(case, ours, theirs, paths))
    except WrongValueError as error:
        return Outcome(case, backend, paths, problem=f"our value is not the right one: {error}")
    except Exception as error:
        return Outcome(case, backend, paths, problem=f"cannot be judged: {type(error).__name__}: {error}")
    if explanation is None:
        return Outcome(case, backend, paths, problem=f"{paths[0]}: {summarize(ours, theirs, paths[0])}")
    return Outcome(case, backend, paths, explanation)


def compare_round(
    ours: list[Side], theirs: Side, cases: list[Case], label: str, folder: Path
) -> tuple[list[Outcome], dict[str, dict[str, Any]]]:
    """Outcomes of all cases on all of our backends, and the results by side."""
    sides = (theirs, *ours)
    with ThreadPoolExecutor(max_workers=WORKERS) as pool:
        found = pool.map(lambda side: side.run(cases, folder, label), sides)
    results = dict(zip((side.name for side in sides), found, strict=True))
    outcomes = [
        judge(case, side.name, results[side.name].get(case.key), results[theirs.name].get(case.key))
        for side in ours
        for case in cases
    ]
    return outcomes, results


def tables_of(side: Side, folder: Path) -> dict[str, torch.Tensor]:
    """Codebooks of the release, which the other cases are made with."""
    found = side.run(list(codebook_cases()), folder, "codebooks")
    return {key.partition(" ")[2]: value for key, value in found.items() if error_of(value) is None}


def native_is_installed(python: str) -> bool:
    """Whether the environment has the native CPU backend."""
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('bnb_cpu') is None)"
    return subprocess.run([python, "-c", probe], cwd=ROOT).returncode == 0


def native_ops(python: str) -> set[str]:
    """Ops that have a kernel in the native CPU backend; the others run on the reference."""
    command = [str(Path(python).with_name("bnb")), "plugins", "show", "cpu", "--json"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if shown.returncode:
        last = (shown.stdout or shown.stderr).strip().splitlines()[-1:]
        raise click.ClickException(f"the native backend of {python} is not usable: {' '.join(last)}")
    return {op for op, where in json.loads(shown.stdout)["ops"].items() if where == "native"}


def label_of(op: str, backend: str, native: set[str]) -> str:
    """The backend that really ran a row: a native one may lack the op."""
    ops = set(OPS_OF_CASE.get(op, (op,)))
    if backend != "native" or not ops or native & ops:
        return backend
    return "native lacks it"


def our_sides(python: str, backend: str) -> list[Side]:
    """The backends to compare: those asked for; ``auto`` leaves out a native one that is not installed."""
    names = list(BACKENDS) if backend in ("both", "auto") else [backend]
    if backend == "auto" and not native_is_installed(python):
        names = ["reference"]
    return [Side(name, python, dict(BACKENDS[name])) for name in names]


def print_table(console: Console, outcomes: list[Outcome], native: set[str]) -> None:
    """One row per op and backend."""
    table = Table(title="Compared with the release on PyPI, bit by bit")
    for heading in ("op", "backend"):
        table.add_column(heading)
    for heading in ("cases", "equal", "explained", "UNEXPLAINED"):
        table.add_column(heading, justify="right")
    rows: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        rows[outcome.case.op, outcome.backend].append(outcome)
    for (op, backend), group in rows.items():
        bad = sum(outcome.unexplained for outcome in group)
        explained = sum(outcome.explanation is not None for outcome in group)
        equal = len(group) - bad - explained
        table.add_row(
            op,
            label_of(op, backend, native),
            *map(str, (len(group), equal, explained)),
            f"[bold red]{bad}[/]" if bad else "0",
        )
    console.print(table)


def print_reasons(console: Console, outcomes: list[Outcome]) -> None:
    """Every explanation used and how often."""
    table = Table(title="Explanations")
    table.add_column("op")
    table.add_column("cases", justify="right")
    table.add_column("reason")
    found = [outcome for outcome in outcomes if outcome.explanation is not None]
    count = Counter((outcome.case.op, outcome.explanation.reason) for outcome in found if outcome.explanation)
    for (op, reason), number in sorted(count.items()):
        table.add_row(op, str(number), reason)
    console.print(table)


def print_unexplained(console: Console, outcomes: list[Outcome]) -> None:
    """The first cases of each op that nothing explains."""
    shown: Counter[str] = Counter()
    for outcome in outcomes:
        if not outcome.unexplained:
            continue
        shown[outcome.case.op] += 1
        if shown[outcome.case.op] <= SHOWN:
            console.print(f"[red]{outcome.backend}[/] {outcome.case.key}: ", end="")
            console.print(outcome.problem, markup=False)


def write_report(path: Path, sides: list[Side], outcomes: list[Outcome]) -> None:
    """Everything as JSON, replaced in one go."""
    report = {
        "sides": [{"name": s.name, "python": s.python, "seconds": round(s.seconds, 1), **s.about} for s in sides],
        "cases": [
            {
                "op": outcome.case.op,
                "id": outcome.case.id,
                "backend": outcome.backend,
                "differs": outcome.paths,
                "explanation": outcome.explanation.reason if outcome.explanation else None,
                "problem": outcome.problem,
            }
            for outcome in outcomes
        ],
    }
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps(report, indent=1))
    scratch.replace(path)


@click.command()
@click.option("--ours", required=True, help="Python of an environment with this project.")
@click.option("--theirs", required=True, help="Python of an environment with the release from PyPI.")
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="Write every outcome here, as JSON.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "both", *BACKENDS]),
    default="auto",
    show_default=True,
    help="What runs on our side; auto takes the native backend if it is installed.",
)
@click.option("--op", "only", multiple=True, help="Only these ops (repeatable).")
def main(ours: str, theirs: str, report: Path | None, backend: str, only: tuple[str, ...]) -> None:
    """Compare bytes and numbers of two environments."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    peer, mine = Side("release", theirs), our_sides(ours, backend)
    native = native_ops(ours) if any(side.name == "native" for side in mine) else set()
    with tempfile.TemporaryDirectory(prefix="bnb-compare-") as scratch:
        folder = Path(scratch)
        cases = first_round(tables_of(peer, folder))
        wanted = [case for case in cases if not only or case.op in only or f"{case.op}_load" in only]
        outcomes, results = compare_round(mine, peer, wanted, "first", folder)
        for giver in (peer, *mine):
            loads = second_round(wanted, results[giver.name])
            loads = [Case(case.op, f"{case.id}-saved-by-{giver.name}", case.inputs) for case in loads]
            if loads:
                takers = mine if giver is peer else [giver]
                outcomes += compare_round(takers, peer, loads, f"from-{giver.name}", folder)[0]
    for side in (peer, *mine):
        about = f"bitsandbytes {side.about.get('version')}, torch {side.about.get('torch')}"
        console.print(f"{side.name}: {about}, {side.seconds:.0f} s, {side.about.get('file')}", highlight=False)
    print_table(console, outcomes, native)
    print_reasons(console, outcomes)
    print_unexplained(console, outcomes)
    if report is not None:
        write_report(report, [peer, *mine], outcomes)
    bad = sum(outcome.unexplained for outcome in outcomes)
    if not outcomes or bad:
        console.print(f"[bold red]{bad} of {len(outcomes)} cases differ without an explanation[/]")
        sys.exit(1)
    console.print(f"[green]{len(outcomes)} cases: equal, or different for a known reason[/]")


if __name__ == "__main__":
    main()
