"""``bnb plugins check``: the conformance kit against one backend."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from bitsandbytes.cli.output import console, json_option, print_json, styled, table

if TYPE_CHECKING:
    from bitsandbytes.testing.runner import Conformance, OpReport

#: Failures of one op that are printed in full; the rest is counted.
SHOWN = 5


@click.command()
@click.argument("name")
@json_option
@click.option("--op", "ops", multiple=True, metavar="OP", help="Only this op; may be repeated.")
@click.option(
    "-k", "patterns", multiple=True, metavar="EXPR", help="Only checks whose id this pattern fits; may be repeated."
)
@click.option("--device", help="Device to run on; by default every device type of the backend.")
@click.option(
    "--gaps",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File of declared gaps, one '<pattern>: <reason>' a line.",
)
def check(
    name: str, as_json: bool, ops: tuple[str, ...], patterns: tuple[str, ...], device: str | None, gaps: Path | None
) -> None:
    """Run the conformance kit against one backend.

    The id of a check is <check>-<op>-<case>. EXPR is a part of it, or a pattern with *, ? and [...] for
    all of it, as in the file of gaps. No other backend is loaded. Each run is a process of its own: a
    kernel that crashes fails its check.

    Exit code 0 when every check passes or is a declared gap; 1 when one fails, when a declared gap
    passes, or when the backend cannot serve its device here; 2 when there is no such backend or check.
    """
    from bitsandbytes.errors import BackendError
    from bitsandbytes.testing.runner import check_backend
    from bitsandbytes.testing.selection import Selection

    selection = Selection(ops, patterns)
    devices = _devices(name, device)
    _validate(selection, gaps)
    results = []
    try:
        for place in devices:
            with _progress(f"{name} on {place}", as_json) as told:
                results.append(check_backend(name, place, selection, gaps, told))
    except BackendError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        print_json([result.as_dict() for result in results])
    else:
        for result in results:
            _print(result)
    if not all(result.conforms for result in results):
        raise SystemExit(1)


def _devices(name: str, device: str | None) -> list[str]:
    """Devices to check; the backend must be installed."""
    from bitsandbytes.backends.registry import REGISTRY

    REGISTRY.settle()
    by_name = {plugin.name: plugin for plugin in REGISTRY.plugins}
    if name not in by_name:
        installed = ", ".join(sorted(by_name)) or "none"
        raise click.BadParameter(f"no backend is called {name!r} (installed: {installed})", param_hint="NAME")
    devices = [device] if device else list(by_name[name].devices)
    if not devices:
        plugin = by_name[name]
        reason = plugin.cause or "it has registered no kernel for a device type that torch knows here"
        raise click.ClickException(f"backend {name!r} cannot be checked here: {reason}")
    return devices


def _validate(selection: Any, gaps: Path | None) -> None:
    from bitsandbytes.testing.gaps import Gaps
    from bitsandbytes.testing.selection import checked_ops

    unknown = set(selection.ops) - set(checked_ops())
    if unknown:
        raise click.BadParameter(
            f"no op is called {sorted(unknown)[0]!r}; ops: {', '.join(checked_ops())}", param_hint="--op"
        )
    if next(selection.checks(), None) is None:
        raise click.BadParameter("no check fits", param_hint="-k")
    try:
        Gaps.read(gaps)
    except (ValueError, OSError) as error:
        raise click.BadParameter(str(error), param_hint="--gaps") from error


@contextlib.contextmanager
def _progress(label: str, as_json: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, where that is a terminal."""
    if as_json or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print(result: Conformance) -> None:
    output = console()
    rows = table(
        "Op", "Native", "Passed", "Failed", "Declared gaps", title=f"Backend {result.name!r} on {result.device!r}"
    )
    for op, report in sorted(result.ops.items()):
        rows.add_row(
            op,
            _native(report, result.counts_native),
            str(report.passed),
            styled(str(report.failed), "bad" if report.failed else "plain"),
            styled(str(report.gaps), "poor" if report.gaps else "plain"),
        )
    output.print(rows)
    _print_list("Failures", result.failures, "bad")
    _print_list("Declared gaps", result.gaps, "poor")
    done = sum(report.passed + report.failed + report.gaps for report in result.ops.values())
    if done < result.total:
        output.print(styled(f"Stopped after {done} of {result.total} checks: {result.crashes} processes died", "bad"))
    verdict = "conforms" if result.conforms else "does not conform"
    output.print()
    output.print(styled(f"{result.name} {verdict}: {done} checks", "good" if result.conforms else "bad"))


def _native(report: OpReport, counts_native: bool) -> Text:
    """In how many of the checks that call the op with valid arguments the backend's own kernel ran."""
    if not counts_native:
        return Text("not known")
    if report.native == 0:
        return Text("-")
    return styled(f"{report.native} of {report.calling}", "good" if report.native == report.calling else "poor")


def _print_list(title: str, entries: list[tuple[str, str]], mood: str) -> None:
    if not entries:
        return
    output = console()
    output.print()
    output.print(f"{title}:", style="bold")
    shown: dict[str, int] = {}
    for name, text in entries:
        kind = "-".join(name.split("-")[:2])
        shown[kind] = shown.get(kind, 0) + 1
        if shown[kind] <= SHOWN:
            output.print(styled(f"  {name}", mood), soft_wrap=True)
            output.print(Text(f"    {text}"), soft_wrap=True)
    for kind, count in shown.items():
        if count > SHOWN:
            output.print(Text(f"  {kind}: {count - SHOWN} more; --json lists them"))
