"""``bnb doctor``: what is installed, whether it works, what mends it."""

from __future__ import annotations

import click

from bitsandbytes.cli.output import console, facts, json_option, print_json, styled, table
from bitsandbytes.diagnostics.report import Report, collect

MOODS = {"error": "bad", "warning": "poor", "info": "plain"}


@click.command()
@json_option
@click.option("--selftest/--no-selftest", default=True, help="Also run the ops on every device (the default).")
def doctor(as_json: bool, selftest: bool) -> None:
    """Check this installation and say what mends it.

    Shows versions, devices and backends, runs a short test of the ops on every device, and looks for
    the common faults: a broken or missing backend, a build of torch that does not fit, distributions
    that have written over each other. Exit code 1 when it finds an error; warnings leave it at 0.
    """
    report = collect(selftest)
    if as_json:
        print_json(report.as_dict())
    else:
        _print(report)
    if not report.healthy:
        raise SystemExit(1)


def _print(report: Report) -> None:
    from bitsandbytes.cli.plugins import plugins_table

    output = console()
    output.print(facts(report.versions, title="Versions"))
    if report.devices:
        output.print()
        output.print(facts({device["type"]: "; ".join(device["names"]) for device in report.devices}, title="Devices"))
    if report.plugins:
        output.print()
        output.print("Backends", style="italic")
        output.print(plugins_table(report.plugins))
    if report.selftest:
        output.print()
        output.print(_selftest_table(report))
    output.print()
    _print_findings(report)


def _selftest_table(report: Report) -> object:
    result = table("Device", "Step", "Result", title="Self-test")
    for device, steps in report.selftest.items():
        for step in steps:
            mood = "good" if step["passed"] else "bad"
            verdict = "passed" if step["passed"] else "failed"
            result.add_row(device, step["name"], styled(f"{verdict}: {step['detail']}", mood))
    return result


def _print_findings(report: Report) -> None:
    output = console()
    for finding in report.findings:
        line = styled(f"{finding.level.value}: ", MOODS[finding.level.value])
        output.print(line.append(finding.text, style="default"), soft_wrap=True)
        if finding.mend:
            output.print(styled(f"    to mend it: {finding.mend}"), soft_wrap=True)
    if not report.findings:
        output.print(styled("Everything is in order.", "good"))
