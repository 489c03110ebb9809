"""Printing helpers under their historical names."""

from __future__ import annotations

import textwrap

HEADER_WIDTH = 60


def print_header(txt: str, width: int = HEADER_WIDTH, filler: str = "=") -> None:
    """Print a text in the middle of a line of fillers."""
    print(f" {txt} ".center(width, filler) if txt else filler * width)


def print_dedented(text: str) -> None:
    """Print a text without its common indentation and blank margins."""
    print("\n".join(textwrap.dedent(text).strip().splitlines()))


def listed(names: list[str], limit: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
