"""`attnbench compare`: two runs, or many."""

from __future__ import annotations

from pathlib import Path

import click

from attnbench.analysis.compare import compare, compare_backends
from attnbench.analysis.history import history
from attnbench.analysis.verdict import DEFAULT_THRESHOLD, parse_threshold
from attnbench.cli.console import show
from attnbench.errors import RequestError
from attnbench.report import comparison
from attnbench.report import history as report_history
from attnbench.result import load


@click.command("compare")
@click.argument("directories", nargs=-1, type=click.Path(path_type=Path), metavar="A B")
@click.option(
    "--backend", "backends", multiple=True, metavar="NAME", help="Twice, of one run: hold the second against the first."
)
@click.option("--history", "series", is_flag=True, help="Of two runs or more: at which run each cell changed.")
@click.option(
    "--threshold",
    metavar="SHARE",
    default=f"{DEFAULT_THRESHOLD:.0%}",
    help=f"A change up to this is of no interest, such as 5% or 0.05. Default: {DEFAULT_THRESHOLD:.0%}.",
)
@click.option("--format", metavar="|".join(comparison.FORMATS), default="markdown", help="Default: markdown.")
def command(
    directories: tuple[Path, ...], backends: tuple[str, ...], series: bool, threshold: str, format: str
) -> int:  # fmt: skip
    """Two runs, cell by cell, with verdicts that know noise; exit code 1 where B is worse than A.

    With --backend OLD --backend NEW, two backends of one run, which were measured in turns: where a machine drifts from run to
    run, that shows more.

    With --history, any number of runs in the order in which they started; exit code 1 where the newest is worse than
    those before it since the last change.
    """
    comparison.check_format(format)
    if backends and (series or len(backends) != 2 or len(directories) != 1):
        raise RequestError(
            f"--backend compares two backends of one run, and was given {len(backends)} of {len(directories)}"
            f"{' with --history' if series else ''}; write: attnbench compare RUN --backend OLD --backend NEW"
        )
    if not series and not backends and len(directories) != 2:
        raise RequestError(
            f"compare takes two runs, A and B, and was given {len(directories)}; for more, add --history, and for two "
            "backends of one run --backend OLD --backend NEW"
        )
    runs = [load(directory) for directory in directories]
    share = parse_threshold(threshold)
    if series:
        found = history(runs, share)
        text, outcome = report_history.render(found, format), report_history.headline(found)
    else:
        found = (
            compare_backends(runs[0], backends[0], backends[1], share) if backends else compare(runs[0], runs[1], share)
        )
        text, outcome = comparison.render(found, format), comparison.headline(found)
    show(text, newline=False)
    show("\n" + "\n".join([*(f"WARNING: {notice}" for notice in found.notices), outcome]), to="stderr")
    return found.exit_code
