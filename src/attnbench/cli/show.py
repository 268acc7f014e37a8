"""`attnbench show`: a run in the terminal."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import click

from attnbench.cli import console
from attnbench.report import terminal
from attnbench.result import load


@click.command("show")
@click.argument("directory", type=click.Path(path_type=Path), metavar="RUN")
def command(directory: Path) -> None:
    """A run on this terminal: the fastest backends, by how much, statuses, and how far each got."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    width = shutil.get_terminal_size().columns
    console.show(terminal.text(load(directory), width, colour=colour), newline=False)
