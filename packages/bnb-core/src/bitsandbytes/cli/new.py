"""``bnb plugins new``: the beginning of a backend package."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("name")
@click.option("--device", required=True, metavar="DEV", help="Device type of torch that the backend serves.")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write; by default bnb-NAME here.",
)
def new(name: str, device: str, output: Path | None) -> None:
    """Write a complete backend package.

    It has a native kernel for one op, the conformance kit as its tests, and a file for continuous
    integration. It builds, installs and passes as it is; every other op runs on the reference.
    """
    from bitsandbytes.backends.discovery import installed_entry_points
    from bitsandbytes.backends.scaffold import write_backend
    from bitsandbytes.errors import ArgumentError

    if name in {entry.name for entry in installed_entry_points()}:
        raise click.BadParameter(f"a backend called {name!r} is installed here", param_hint="NAME")
    folder = output or Path(f"bnb-{name.replace('_', '-')}")
    try:
        write_backend(name, device, folder)
    except ArgumentError as error:
        raise click.UsageError(str(error)) from error
    except FileExistsError as error:
        raise click.BadParameter(str(error), param_hint="--output") from error
    click.echo(f"Wrote {folder}. To build it, see it and check it:")
    click.echo(f"    pip install {folder if folder.is_absolute() else f'./{folder}'}")
    click.echo(f"    bnb plugins show {name}")
    click.echo(f"    bnb plugins check {name} --gaps {folder / 'tests' / 'gaps.txt'}")
