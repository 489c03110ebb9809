"""The command line: ``bnb``."""

from bitsandbytes.cli.main import main

__all__ = ["main"]
