"""``bnb quantize``: a checkpoint folder into a pre-quantized one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from bitsandbytes.cli.output import console, facts, json_option, print_json

_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class DtypeType(click.ParamType):
    """A dtype by its short or its full name."""

    name = "dtype"

    def __init__(self, *more: str):
        self._names = {**_SHORT_DTYPES, **{name: name for name in _SHORT_DTYPES.values()}, **{n: n for n in more}}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The full name."""
        if value not in self._names:
            self.fail(f"{value!r} is none of {', '.join(self._names)}", param, ctx)
        return self._names[value]

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """What help shows."""
        return "|".join(name for name in self._names if name not in _SHORT_DTYPES.values())


class SizeType(click.ParamType):
    """A number of bytes such as 5GB or 512MiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        from bitsandbytes.checkpoint import parse_size
        from bitsandbytes.errors import ArgumentError

        try:
            return parse_size(value)
        except ArgumentError as error:
            self.fail(str(error), param, ctx)


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to be made.")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["nf4", "fp4", "int8"]),
    default="nf4",
    show_default=True,
    help="Data type of quantized weights.",
)
@click.option("--blocksize", type=int, default=64, show_default=True, help="Values per block (4 bit).")
@click.option(
    "--double-quant/--no-double-quant",
    default=False,
    show_default=True,
    help="Quantize the statistics too, which saves about 0.4 bits per parameter (4 bit).",
)
@click.option(
    "--compute-dtype", type=DtypeType(), help="Dtype of matrix products (4 bit).  [default: that of the weights]"
)
@click.option(
    "--storage",
    type=DtypeType("uint8", "int8", "float64"),
    default="uint8",
    show_default=True,
    help="Dtype that packed codes are stored as (4 bit); FSDP wants that of the kept tensors.",
)
@click.option(
    "--threshold", type=float, default=6.0, show_default=True, help="Magnitude of outlier activations (int8)."
)
@click.option(
    "--skip",
    multiple=True,
    metavar="PATTERN",
    help="Module to keep, besides those that are kept anyway; may be given more than once.",
)
@click.option("--dtype", type=DtypeType(), help="Cast all weights to this dtype first.  [default: no cast]")
@click.option("--max-shard-size", type=SizeType(), default="5GB", show_default=True, help="Largest file of weights.")
@click.option("--device", default="cpu", show_default=True, help="Where to quantize, for instance cuda.")
@click.option(
    "--resume/--no-resume", default=True, show_default=True, help="Continue an interrupted run, or start again."
)
@click.option("--force", is_flag=True, help="Replace OUT if it is a checkpoint, once the new one is complete.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress bar and no report; warnings stay.")
def quantize(
    source: Path,
    out: Path,
    format_name: str,
    max_shard_size: int,
    resume: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Quantize the checkpoint folder SOURCE into a new folder that transformers loads.

    SOURCE has config.json and safetensors files, as save_pretrained writes them. Weights are read,
    quantized and written tensor by tensor, so the model need not fit into memory. An interrupted run
    is continued by the same command.

    Exit codes: 0 done, 1 the checkpoint is damaged or cannot be written, 2 wrong arguments.
    """
    from bitsandbytes.checkpoint import CheckpointError, QuantizeOptions, quantize_checkpoint
    from bitsandbytes.errors import ArgumentError

    with _progress_bar(hidden=quiet or as_json) as bar:
        task = bar.add_task("reading", total=None)

        def show(progress: Any) -> None:
            bar.update(task, total=progress.total, completed=progress.done, description=progress.shard)

        try:
            report = quantize_checkpoint(
                source,
                out,
                QuantizeOptions(format=format_name, max_shard_bytes=max_shard_size, **options),
                resume=resume,
                force=force,
                progress=show,
            )
        except ArgumentError as error:
            raise click.UsageError(str(error)) from error
        except CheckpointError as error:
            if as_json:
                print_json({"error": str(error)})
            raise click.ClickException(str(error)) from error
    if as_json:
        print_json(report.to_dict())
        return
    if not quiet:
        console().print(_table(report))
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)


def _progress_bar(hidden: bool) -> ProgressBar:
    terminal = Console(stderr=True)
    return ProgressBar(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=terminal,
        disable=hidden or not terminal.is_terminal,
        transient=True,
    )


def _table(report: Any) -> Table:
    resumed = f", {report.resumed_shards} files from an earlier run" if report.resumed_shards else ""
    rows = {
        "written": report.out,
        "format": f"{report.format}, {report.bits_per_parameter:.2f} bits per quantized parameter",
        "linear layers": f"{report.quantized_tensors} tensors, chosen by {report.rule}",
        "kept": f"{report.kept_tensors} tensors, {report.kept_parameters:,} parameters",
        "size": f"{report.bytes_before / 1e6:,.1f} MB to {report.bytes_after / 1e6:,.1f} MB, "
        f"{report.ratio:.2f} times less",
        "error": f"{report.relative_rms_error:.2%} relative RMS of the quantized weights",
        "time": f"{report.seconds:.1f} s{resumed}",
    }
    if report.left_out:
        rows["left out"] = ", ".join(report.left_out)
    return facts(rows)
