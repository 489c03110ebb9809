"""The group ``bnb`` and its subcommands, each imported when it is called.

Exit codes, for every command:

* 0: done, and nothing needs to be mended.
* 1: done, but something that was looked at is broken; or the command failed.
* 2: wrong usage: an unknown command, option, name or value.
"""

from __future__ import annotations

import importlib

import click

#: Command -> the function that click calls, as ``module:attribute``, and its line in the overview.
#: The line stands here so that ``bnb --help`` imports no command.
COMMANDS = {
    "doctor": ("bitsandbytes.cli.doctor:doctor", "Check this installation and say what mends it."),
    "inspect": ("bitsandbytes.cli.inspect:inspect", "Show what is in a (quantized) checkpoint."),
    "plugins": ("bitsandbytes.cli.plugins:plugins", "Show, check and write backends."),
    "quantize": ("bitsandbytes.cli.quantize:quantize", "Quantize a checkpoint folder."),
}


class LazyGroup(click.Group):
    """A group that imports a subcommand when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the subcommands."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a subcommand."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{module}:{attribute} is no click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the overview without importing the subcommands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    import torch

    import bitsandbytes

    click.echo(f"bnb-core {bitsandbytes.__version__}, torch {torch.__version__}")
    ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the versions of bnb-core and torch and exit.",
)
def main() -> None:
    """Quantize models, look into checkpoints, and see which backends serve this machine.

    Every command that shows something takes --json. Exit codes: 0 all is well, 1 something is broken
    or the command failed, 2 wrong usage.
    """
