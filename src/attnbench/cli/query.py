"""`attnbench query`: SQL over runs."""

from __future__ import annotations

from pathlib import Path

import click

from attnbench.analysis.sql import ask
from attnbench.cli.console import show
from attnbench.errors import unknown
from attnbench.report.tables import DATA
from attnbench.result import load

FORMATS = ("markdown", "csv", "json")


@click.command("query")
@click.argument("question", metavar="SQL")
@click.argument("directories", type=click.Path(path_type=Path), metavar="RUN...", nargs=-1, required=True)
@click.option("--format", metavar="|".join(FORMATS), default="markdown", help="Default: markdown.")
def command(question: str, directories: tuple[Path, ...], format: str) -> None:
    """The answer to a SELECT over the tables `records` and `runs` of one run or many."""
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    show(DATA[format](ask([load(directory) for directory in directories], question)), newline=False)
