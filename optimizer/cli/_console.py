"""Where commands print their tables."""

import sys

from rich.console import Console

__all__ = ["open_console"]

_NATURAL = 10_000
"""Columns, more than any table has."""


def open_console() -> Console:
    """Standard output, as wide as the terminal; without one nothing is cut or folded: another program reads it."""
    width = None if sys.stdout.isatty() else _NATURAL
    return Console(highlight=False, markup=False, emoji=False, width=width)
