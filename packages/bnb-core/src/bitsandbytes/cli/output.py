"""Tables for people, JSON for programs."""

from __future__ import annotations

import json
import shutil
import sys
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

#: Width of a table that is written to a file or a pipe; it must not depend on a terminal.
PIPE_WIDTH = 160

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def console() -> Console:
    """Where tables go: standard output, without colours where it is no terminal."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, highlight=False)


def print_json(data: Any) -> None:
    """Print data as JSON; a value that JSON does not know is an error in the command, not a string."""
    click.echo(json.dumps(data, indent=2))


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table in the common style; long cells wrap."""
    result = Table(title=title, title_justify="left", show_edge=False, pad_edge=False, header_style="bold")
    for column in columns:
        result.add_column(column, overflow="fold")
    return result


def facts(rows: dict[str, str], title: str | None = None) -> Table:
    """Names and values, one a line."""
    result = Table(title=title, title_justify="left", show_header=False, show_edge=False, pad_edge=False, box=None)
    result.add_column(style="bold", no_wrap=True)
    result.add_column(overflow="fold")
    for name, value in rows.items():
        result.add_row(name, Text(value))
    return result


#: Colours by what a text says about the state of things.
STYLES = {"good": "green", "bad": "red", "poor": "yellow", "plain": ""}


def styled(text: str, mood: str = "plain") -> Text:
    """A text in the colour of its mood; square brackets in it are no markup."""
    return Text(text, style=STYLES[mood])
