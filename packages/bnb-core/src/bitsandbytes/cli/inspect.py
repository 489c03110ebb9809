"""``bnb inspect``: what is in a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, tensors: bool, as_json: bool) -> None:
    """Tell what the checkpoint folder or safetensors file PATH holds, without reading its weights.

    The description of every quantized tensor is checked as loading would check it.

    Exit codes: 0 sound, 1 damaged or contradictory, 2 wrong arguments.
    """
    from bitsandbytes.checkpoint import CheckpointError, inspect_checkpoint

    try:
        summary = inspect_checkpoint(path)
    except CheckpointError as error:
        if as_json:
            click.echo(json.dumps({"error": str(error)}))
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(summary.to_dict(tensors), indent=2))
    else:
        _print_summary(summary, tensors)
    if summary.problems:
        raise click.exceptions.Exit(1)


def _print_summary(summary: Any, tensors: bool) -> None:
    console = Console(soft_wrap=True)
    console.print(_overview(summary))
    console.print(_kinds(summary))
    if tensors:
        console.print(_tensors(summary))
    for problem in summary.problems:
        console.print(f"[red]problem:[/] {escape(problem)}", highlight=False)


def _overview(summary: Any) -> Table:
    table = Table(show_header=False, box=None)
    table.add_row("path", escape(summary.path))
    table.add_row("format", summary.format)
    table.add_row("size", f"{summary.nbytes / 1e6:,.1f} MB in {len(summary.files)} file(s)")
    table.add_row("parameters", f"{summary.parameters:,}, {summary.bits_per_parameter:.2f} bits each")
    if summary.quantized_bits_per_parameter is not None:
        table.add_row("quantized", f"{summary.quantized_bits_per_parameter:.2f} bits per parameter")
    if summary.blocksizes:
        nested = {True: "nested", False: "not nested", None: "partly nested"}[summary.nested]
        table.add_row("statistics", f"blocks of {', '.join(map(str, summary.blocksizes))}, {nested}")
    if summary.config is not None:
        table.add_row("config.json", escape(_config_line(summary.config)))
    return table


def _config_line(config: dict[str, Any]) -> str:
    keys = ("quant_method", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "llm_int8_threshold")
    line = ", ".join(f"{key} {config[key]}" for key in keys if key in config)
    skipped = config.get("llm_int8_skip_modules")
    return line + (f", skips {', '.join(map(str, skipped))}" if skipped else "")


def _kinds(summary: Any) -> Table:
    table = Table("kind", box=None)
    for heading in ("tensors", "parameters", "bytes"):
        table.add_column(heading, justify="right")
    for kind, row in summary.kinds.items():
        table.add_row(kind, f"{row['tensors']:,}", f"{row['parameters']:,}", f"{row['bytes']:,}")
    return table


def _tensors(summary: Any) -> Table:
    table = Table("tensor", "kind", "shape", "dtype", "statistics", box=None)
    table.add_column("bytes", justify="right")
    for tensor in summary.tensors:
        statistics = ""
        if tensor.blocksize is not None:
            statistics = f"blocks of {tensor.blocksize}{', nested' if tensor.nested else ''}"
        shape = " x ".join(map(str, tensor.shape))
        table.add_row(escape(tensor.name), tensor.kind, shape, tensor.dtype or "", statistics, f"{tensor.nbytes:,}")
    return table
