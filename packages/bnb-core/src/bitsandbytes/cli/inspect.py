"""``bnb inspect``: what is in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from bitsandbytes.cli.output import console, facts, json_option, print_json, styled, table


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@json_option
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
            print_json({"error": str(error)})
        raise click.ClickException(str(error)) from error
    if as_json:
        print_json(summary.to_dict(tensors))
    else:
        _print_summary(summary, tensors)
    if summary.problems:
        raise click.exceptions.Exit(1)


def _print_summary(summary: Any, tensors: bool) -> None:
    out = console()
    out.print(_overview(summary))
    out.print()
    out.print(_kinds(summary))
    if tensors:
        out.print()
        out.print(_tensors(summary))
    for problem in summary.problems:
        out.print(styled(f"problem: {problem}", "bad"))


def _overview(summary: Any) -> Table:
    rows = {
        "path": summary.path,
        "format": summary.format,
        "size": f"{summary.nbytes / 1e6:,.1f} MB in {len(summary.files)} file(s)",
        "parameters": f"{summary.parameters:,}, {summary.bits_per_parameter:.2f} bits each",
    }
    if summary.quantized_bits_per_parameter is not None:
        rows["quantized"] = f"{summary.quantized_bits_per_parameter:.2f} bits per parameter"
    if summary.blocksizes:
        nested = {True: "nested", False: "not nested", None: "partly nested"}[summary.nested]
        rows["statistics"] = f"blocks of {', '.join(map(str, summary.blocksizes))}, {nested}"
    if summary.config is not None:
        rows["config.json"] = _config_line(summary.config)
    return facts(rows)


def _config_line(config: dict[str, Any]) -> str:
    keys = ["quant_method", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"]
    if config.get("load_in_8bit"):
        keys = ["quant_method", "llm_int8_threshold"]
    line = ", ".join(f"{key} {config[key]}" for key in keys if key in config)
    skipped = config.get("llm_int8_skip_modules")
    return line + (f", skips {', '.join(map(str, skipped))}" if isinstance(skipped, list) and skipped else "")


def _kinds(summary: Any) -> Table:
    result = table("kind")
    for heading in ("tensors", "parameters", "bytes"):
        result.add_column(heading, justify="right")
    for kind, row in summary.kinds.items():
        result.add_row(kind, f"{row['tensors']:,}", f"{row['parameters']:,}", f"{row['bytes']:,}")
    return result


def _tensors(summary: Any) -> Table:
    result = table("tensor", "kind", "shape", "dtype", "statistics")
    result.add_column("bytes", justify="right")
    for tensor in summary.tensors:
        statistics = ""
        if tensor.blocksize is not None:
            statistics = f"blocks of {tensor.blocksize}{', nested' if tensor.nested else ''}"
        shape = " x ".join(map(str, tensor.shape))
        row = (tensor.name, tensor.kind, shape, tensor.dtype or "", statistics, f"{tensor.nbytes:,}")
        result.add_row(*map(styled, row))
    return result
