"""``bnb plugins``: the installed backends; ``check`` and ``new`` have modules of their own."""

from __future__ import annotations

from typing import Any

import click
from rich.text import Text

from bitsandbytes.cli.check import check
from bitsandbytes.cli.new import new
from bitsandbytes.cli.output import console, facts, json_option, print_json, styled, table


@click.group()
def plugins() -> None:
    """Show, check and write backends.

    Backends are found through the entry-point group `bitsandbytes.backends`. BNB_BACKENDS and
    BNB_DISABLE_BACKENDS (comma-separated names) choose which are loaded; BNB_BACKENDS_STRICT=1 makes
    every problem an error.
    """


plugins.add_command(check)
plugins.add_command(new)


@plugins.command("list")
@json_option
def list_plugins(as_json: bool) -> None:
    """List every installed backend and what it serves.

    Exit code 1 when one of them is broken or incompatible.
    """
    from bitsandbytes.diagnostics.plugins import describe_plugins, is_failed

    described = describe_plugins()
    if as_json:
        print_json(described)
    elif described:
        console().print(plugins_table(described))
        print_reasons(described)
    else:
        click.echo("No backend is installed; every op runs on the PyTorch reference.")
        click.echo("To install one: pip install 'bnb-core[cpu]', 'bnb-core[cuda]', 'bnb-core[rocm]', ...")
    if any(is_failed(plugin) for plugin in described):
        raise SystemExit(1)


@plugins.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show one backend, op by op.

    Exit code 1 when it is broken or incompatible, 2 when there is none of this name.
    """
    from bitsandbytes.diagnostics.plugins import describe_plugins, is_failed

    by_name = {plugin["name"]: plugin for plugin in describe_plugins()}
    if name not in by_name:
        installed = ", ".join(by_name) or "none"
        raise click.BadParameter(f"no backend is called {name!r} (installed: {installed})", param_hint="NAME")
    plugin = by_name[name]
    if as_json:
        print_json(plugin)
    else:
        _print_plugin(plugin)
    if is_failed(plugin):
        raise SystemExit(1)


def plugins_table(described: list[dict[str, Any]]) -> Any:
    """The table of ``bnb plugins list``."""
    result = table("Name", "Distribution", "Devices", "State", "Native ops", "Op API")
    for plugin in described:
        result.add_row(
            plugin["name"],
            f"{plugin['distribution']} {plugin['version']}",
            ", ".join(plugin["devices"]) or "-",
            state_of(plugin),
            _coverage_of(plugin),
            _api_of(plugin),
        )
    return result


def state_of(plugin: dict[str, Any]) -> Text:
    """State of a described plugin in a word or two."""
    if plugin["available"]:
        return styled("available", "good")
    if plugin["status"] in ("broken", "incompatible"):
        return styled(plugin["status"], "bad")
    declined = plugin["status"] in ("registered", "called")
    return styled("not available", "poor") if declined else styled(plugin["status"])


def print_reasons(described: list[dict[str, Any]]) -> None:
    """Why plugins are not in use, each on a line of its own: a command must not wrap."""
    output = console()
    for plugin in described:
        if plugin["reason"]:
            output.print()
            output.print(Text(f"{plugin['name']}: {plugin['reason']}"), soft_wrap=True)
        if plugin["mend"]:
            output.print(Text(f"    to mend it: {plugin['mend']}"), soft_wrap=True)


def _coverage_of(plugin: dict[str, Any]) -> str:
    if plugin["ops"] is None:
        return "-"
    native = sum(kind == "native" for kind in plugin["ops"].values())
    return f"{native} of {len(plugin['ops'])}"


def _api_of(plugin: dict[str, Any]) -> str:
    if plugin["op_api"] is None:
        return "-"
    lowest, highest = plugin["op_api"]
    return str(lowest) if lowest == highest else f"{lowest} to {highest}"


def _print_plugin(plugin: dict[str, Any]) -> None:
    output = console()
    output.print(
        facts(
            {
                "Name": plugin["name"],
                "Distribution": f"{plugin['distribution']} {plugin['version']}",
                "Entry point": plugin["target"],
                "Devices": ", ".join(plugin["devices"]) or "-",
                "State": state_of(plugin).plain,
                "Priority": "-" if plugin["priority"] is None else str(plugin["priority"]),
                "Op API": f"{_api_of(plugin)} (core: {plugin['core_op_api']})",
                "Native ops": _coverage_of(plugin),
                **({"Unknown ops": ", ".join(plugin["unknown_ops"])} if plugin["unknown_ops"] else {}),
            }
        )
    )
    if plugin["ops"] is not None:
        ops = table("Op", "Runs on")
        for name, kind in plugin["ops"].items():
            ops.add_row(name, styled(kind, "good" if kind == "native" else "plain"))
        output.print()
        output.print(ops)
    print_reasons([plugin])
