"""`attnbench report`: a run as a document, a table or a chart."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from attnbench.cli.console import show
from attnbench.cli.options import selecting_options, selection_from
from attnbench.errors import RequestError
from attnbench.report import FORMATS, LAYOUTS, render, write
from attnbench.report.charts import CHARTS, PASSES
from attnbench.report.figures import FORMATS as PICTURES
from attnbench.report.figures import Figure, draw
from attnbench.result import load


@click.command("report")
@click.argument("directory", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--format", metavar="|".join((*FORMATS, *PICTURES)), default="markdown", help="Default: markdown.")
@click.option("--layout", metavar="|".join(LAYOUTS), default="full", help="Default: full.")
@click.option("--chart", metavar="|".join(CHARTS), help="What svg and png show.")
@click.option("--pass", "timed", metavar="|".join(PASSES), help="The pass that a chart is of. Default: forward.")
@click.option("--backend", metavar="NAME", help="Only this one.")
@selecting_options
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write to a file, not to standard output.")
def command(
    directory: Path, format: str, layout: str, chart: str | None, timed: str | None, backend: str | None,
    out: Path | None, **selected: Any,
) -> None:  # fmt: skip
    """A run directory as a document, as a table, or as a chart."""
    selection = selection_from(selected)
    if format in PICTURES:
        figure = Figure.of(format, chart, timed, selection)
        if format == "png" and out is None and sys.stdout.isatty():
            raise RequestError("a png is nothing for a terminal; give --out FILE, or send standard output elsewhere")
        _put(draw(load(directory), figure, format, selection.where, backend), out)
        return
    for option, value in (("--chart", chart), ("--pass", timed)):
        if value is not None:
            raise RequestError(
                f"{option} {value} goes with --format {' or '.join(PICTURES)}, and the format is {format}"
            )
    run = load(directory)
    if out is None:
        show(render(run, format, layout, backend, selection), newline=False)
    else:
        write(run, out, format, layout, backend, selection)


def _put(picture: bytes, out: Path | None) -> None:
    """Writes a picture to a file or, as it is, to standard output."""
    try:
        if out is not None:
            out.write_bytes(picture)
        else:
            sys.stdout.buffer.write(picture)
            sys.stdout.buffer.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise RequestError(f"{out or 'standard output'} cannot be written: {error.strerror}") from None
