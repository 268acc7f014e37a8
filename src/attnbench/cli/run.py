"""`attnbench run`: the sweep."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from attnbench import api
from attnbench.cli.console import say, show
from attnbench.cli.options import grid_options, measuring_options, request_from
from attnbench.errors import RequestError
from attnbench.report import LAYOUTS
from attnbench.result import Result

UNSTEADY = 0.05
"""The speed of a machine that moved by more than this during a run is told of."""

_NOT_THE_REQUEST = {"out", "resume", "executor", "quiet", "as_json", "layout"}


@click.command("run")
@grid_options
@measuring_options
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="The run directory. Default: a new one under runs/."
)
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@click.option("--executor", metavar="local", default="local", help="Where workers run.")
@click.option(
    "--layout", metavar="|".join(LAYOUTS), default="full", help="Shape of report.md and of what is shown at the end."
)
@click.option("--quiet", is_flag=True, help="Show no progress and no report.")
@click.option("--json", "as_json", is_flag=True, help="Print the run and its records as JSON.")
def command(**options: Any) -> int:
    """The sweep; with no arguments the seed's grid on the best device here."""
    if options["executor"] != "local":
        raise RequestError(
            f"executor {options['executor']!r} is not known; there is: local; for many machines see --shard"
        )
    quiet = options["quiet"]
    for wish in (signal.SIGINT, signal.SIGTERM):  # a polite kill keeps what is done, too
        signal.signal(wish, _stop_once)
    if options["resume"]:
        if options["out"] is None:
            raise RequestError("--resume needs to know which run to go on with: give its directory by --out DIR")
        asked = any(value not in (None, ()) for key, value in options.items() if key not in _NOT_THE_REQUEST)
        result = api.resume_run(
            options["out"], request_from(options) if asked else None, quiet=quiet, layout=options["layout"]
        )
    else:
        request = request_from(options)
        result = api.start_run(
            options["out"] or api.default_directory(request), request, quiet=quiet, layout=options["layout"]
        )
    _show(result, options)
    if above := [record.cell_id for record in result.records if "above_limit" in record.tags]:
        say(
            f"{len(above)} cells are faster than their floor, {above[0]} for one: either something kept the machine busy "
            "when its ceilings were measured, which attnbench calibrate mends, or work was left out"
        )
    return result.exit_code


def _stop_once(*_: object) -> None:
    """Interrupts; whoever loses patience meanwhile must not interrupt the keeping of results."""
    for wish in (signal.SIGINT, signal.SIGTERM):
        signal.signal(wish, signal.SIG_IGN)
    raise KeyboardInterrupt


def _show(result: Result, options: Mapping[str, Any]) -> None:
    if options["as_json"]:
        told = {
            "directory": str(result.directory),
            "run_id": result.header.run_id,
            "counts": result.counts,
            "records": [record.to_dict() for record in result.records],
        }
        show(json.dumps(told))
    elif not options["quiet"]:
        show((result.directory / "report.md").read_text("utf-8"), newline=False)
        if (wander := result.header.wander) and wander > UNSTEADY:
            show(
                f"\nThis machine's own speed moved by ± {100 * wander:.0f} % during the run, whatever was measured; times "
                "that lie no further apart tell nothing. What else runs here? attnbench doctor",
                to="stderr",
            )  # fmt: skip
        where = f"\n{len(result.records)} of {result.header.cells} cells are in {result.directory}"
        show(f"{where}; see them again by: attnbench report {result.directory}", to="stderr")
