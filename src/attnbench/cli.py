"""The command line. Every command reads: make the request, carry it out, show what came of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from attnbench import api, calibration, machine
from attnbench import backends as registry
from attnbench.analysis.compare import compare
from attnbench.analysis.recommend import recommend
from attnbench.analysis.sql import ask
from attnbench.analysis.verdict import default_threshold, parse_threshold
from attnbench.analysis.wish import PASSES as RECOMMENDED
from attnbench.analysis.wish import Wish
from attnbench.case import PRECISIONS
from attnbench.doctor import diagnose
from attnbench.errors import RequestError, printable, unknown
from attnbench.executors.local import LocalExecutor
from attnbench.grid import Grid, presets
from attnbench.options import grid_options, measuring_options, request_from, selecting_options, selection_from
from attnbench.plan import describe, make_plan
from attnbench.report import FORMATS, LAYOUTS, comparison, recommendation, render, write
from attnbench.report.charts import CHARTS
from attnbench.report.charts import PASSES as DRAWN
from attnbench.report.figures import FORMATS as PICTURES
from attnbench.report.figures import Figure, draw
from attnbench.report.tables import DATA
from attnbench.request import PASSES, Request, expand_backends, parse_bytes, parse_case, parse_device
from attnbench.result import Result, load
from attnbench.show import backend_facts, backends_text, ceilings_text, doctor_text, plan_text
from attnbench.store import DiskFull

WRONG_REQUEST, INTERRUPTED = 2, 130
QUERY_FORMATS = ("markdown", "csv", "json")


def main() -> None:
    """Entry point. Whatever is wrong with a request ends in one line on standard error and exit code 2."""
    _open_closed_streams()
    try:
        sys.exit(cli.main(standalone_mode=False, prog_name="attnbench"))
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except (click.ClickException, RequestError) as error:
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        _say(text)
        sys.exit(WRONG_REQUEST)
    except DiskFull as error:
        _say(f"{error}; the cells before it are safe; then go on with --resume")
        sys.exit(WRONG_REQUEST)
    except (KeyboardInterrupt, click.Abort) as stop:
        if isinstance(stop.__cause__, api.Interrupted):  # click makes an Abort of every KeyboardInterrupt
            _say(str(stop.__cause__))
            sys.exit(INTERRUPTED)
        _say("interrupted before any cell was measured")
        sys.exit(INTERRUPTED)


def _open_closed_streams() -> None:
    """Daemons close the standard streams; a pipe that took such a number would be mistaken for one."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115 - as long as the process


def _print(text: str, *, newline: bool = True, to: str = "stdout") -> None:
    """Prints a document. A reader that has had enough of it, as `head`, is no failure."""
    stream = getattr(sys, to)
    whole = text + "\n" * newline
    try:
        try:
            stream.write(whole)
        except UnicodeEncodeError:  # a stream that has no ± or ×
            stream.write(whole.encode(stream.encoding, "replace").decode(stream.encoding))
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(text: str) -> None:
    """One line on standard error."""
    _print(f"attnbench: {printable(text)}", to="stderr")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, no_args_is_help=False)
@click.version_option(package_name="attnbench")
def cli() -> None:
    """Measures attention implementations: speed, memory, correctness and status, over a grid of shapes."""


_NOT_THE_REQUEST = {"out", "resume", "executor", "quiet", "as_json", "layout"}


# --- commands ---------------------------------------------------------------------------------------------------------


@cli.command()
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
def run(**options: Any) -> int:
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
        _say(
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
        _print(json.dumps({
            "directory": str(result.directory),
            "run_id": result.header.run_id,
            "counts": result.counts,
            "records": [record.to_dict() for record in result.records],
        }))  # fmt: skip
    elif not options["quiet"]:
        _print((result.directory / "report.md").read_text("utf-8"), newline=False)
        where = f"\n{len(result.records)} of {result.header.cells} cells are in {result.directory}"
        _print(f"{where}; see them again by: attnbench report {result.directory}", to="stderr")


@cli.command()
@grid_options
@measuring_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(as_json: bool, **options: Any) -> None:
    """What `run` would do: its cells, forecasts of memory and time, and what cannot run. Runs nothing."""
    request = request_from(options)
    with LocalExecutor(request) as executor:
        planned = make_plan(request, executor)
    _print(json.dumps(planned.to_dict(), indent=1) if as_json else plan_text(planned))


@cli.command()
@click.option("--backend", "names", multiple=True, metavar="NAME", help="Only these. Default: all.")
@click.option(
    "--case",
    "cases",
    multiple=True,
    metavar="NAME=VALUE,…",
    help="A case to ask each about, such as d_model=16,dtype=float32; repeatable.",
)
@click.option(
    "--pass",
    "passes",
    metavar="|".join(PASSES),
    default="backward",
    help="Ask about the forward alone, or about both (default).",
)
@click.option("--device", metavar="cpu|cuda|cuda:N", help="Default: the best one here.")
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
def backends(names: tuple[str, ...], cases: tuple[str, ...], passes: str, device: str | None, as_json: bool) -> None:
    """Every backend: what it is, whether it is available here or why not, and which cases it takes."""
    device = parse_device(device) if device is not None else machine.best_device()
    asked = {text: parse_case(text) for text in cases}
    wanted = expand_backends(names or registry.every())
    request = Request(Grid(), "backends", wanted, {}, device, passes=passes)
    with LocalExecutor(request) as executor:
        told = describe(executor, wanted, {}, list(asked.values()), request.timeout_s)["backends"]
    shown = [{"device": device} | backend_facts(backend, asked) for backend in told]
    _print(json.dumps(shown, indent=1) if as_json else backends_text(shown, device))
    for name, reason in registry.refused_plugins().items():
        _say(f"backend {name!r} {reason}")


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--format", metavar="|".join((*FORMATS, *PICTURES)), default="markdown", help="Default: markdown.")
@click.option("--layout", metavar="|".join(LAYOUTS), default="full", help="Default: full.")
@click.option("--chart", metavar="|".join(CHARTS), help="What svg and png show.")
@click.option("--pass", "timed", metavar="|".join(DRAWN), help="The pass that a chart is of. Default: forward.")
@click.option("--backend", metavar="NAME", help="Only this one.")
@selecting_options
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write to a file, not to standard output.")
def report(
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
        _print(render(run, format, layout, backend, selection), newline=False)
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


@cli.command()
@click.option("--device", metavar="cpu|cuda|cuda:N", help="Default: the best one here.")
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
def calibrate(device: str | None, as_json: bool) -> None:
    """Measures this device's ceilings anew: memory, matrix products, exponentials, a launch. Runs use them from then on."""
    device = parse_device(device) if device is not None else machine.best_device()
    found = calibration.ceilings(device, anew=True)
    _print(json.dumps({"device": device} | found, indent=1) if as_json else ceilings_text(found, device))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print facts and troubles as JSON.")
def doctor(as_json: bool) -> None:
    """What about this machine would spoil a benchmark, and how to mend it. Changes nothing."""
    facts = machine.fingerprint()
    troubles = diagnose(facts)
    told = {"facts": facts, "troubles": [asdict(trouble) for trouble in troubles]}
    _print(json.dumps(told, indent=1) if as_json else doctor_text(facts, troubles))


@cli.command("compare")
@click.argument("directories", nargs=-1, type=click.Path(path_type=Path), metavar="A B")
@click.option("--history", "series", is_flag=True, help="Of two runs or more: at which run each cell changed.")
@click.option(
    "--threshold",
    metavar="SHARE",
    help="A change up to this is of no interest, such as 2% or 0.02. Default: 2% on a GPU, 10% on a CPU.",
)
@click.option("--format", metavar="|".join(comparison.FORMATS), default="markdown", help="Default: markdown.")
def compare_runs(directories: tuple[Path, ...], series: bool, threshold: str | None, format: str) -> int:
    """Two runs, cell by cell, with verdicts that know noise; exit code 1 where B is worse than A.

    With --history, any number of runs in the order in which they started; exit code 1 where the newest is worse than
    those before it since the last change.
    """
    comparison.check_format(format)
    if not series and len(directories) != 2:
        raise RequestError(
            f"compare takes two runs, A and B, and was given {len(directories)}; for more, add --history"
        )
    runs = [load(directory) for directory in directories]
    share = parse_threshold(threshold) if threshold is not None else default_threshold(runs[0]) if runs else 0.0
    if series:
        from attnbench.analysis.history import history  # here, so that other commands start without it
        from attnbench.report import history as report_history

        of_all = history(runs, share)
        text, notices, outcome = report_history.render(of_all, format), of_all.notices, report_history.headline(of_all)
        exit_code = of_all.exit_code
    else:
        found = compare(runs[0], runs[1], share)
        text, notices, outcome = comparison.render(found, format), found.notices, comparison.headline(found)
        exit_code = found.exit_code
    _print(text, newline=False)
    _print("\n" + "\n".join([*(f"WARNING: {notice}" for notice in notices), outcome]), to="stderr")
    return exit_code


@cli.command("recommend")
@click.argument("directory", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--seq-len", type=int, metavar="N", help="Number of queries.")
@click.option("--d-model", type=int, metavar="N", help="Head dimension.")
@click.option("--kv-len", type=int, metavar="N", help="Number of keys. Default: the same as seq_len.")
@click.option("--batch", type=int, metavar="N", help="Batch size.")
@click.option("--heads", type=int, metavar="N", help="Query heads.")
@click.option("--kv-heads", type=int, metavar="N", help="Key heads.")
@click.option("--dtype", metavar="NAME", help="Element type, such as bfloat16.")
@click.option("--precision", metavar="|".join(PRECISIONS), help="Products of float32.")
@click.option("--causal/--no-causal", "causal", default=None, help="With or without the causal mask.")
@click.option("--pass", "what", metavar="|".join(RECOMMENDED), help="What has to be fast. Default: step, both passes.")
@click.option("--memory", metavar="SIZE", help="What the backend may hold, such as 16GiB.")
@click.option("--deterministic", is_flag=True, help="Only backends whose gradients are the same each time.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def recommend_backend(directory: Path, memory: str | None, as_json: bool, **wished: Any) -> None:
    """From a run: the fastest right backend for a shape, and the code that calls it.

    What is not given is the run's own, where it has one value only. Shapes between those measured are estimated.
    """
    wish = Wish(**wished, memory_bytes=parse_bytes(memory) if memory is not None else None)
    found = recommend(load(directory), wish)
    _print(json.dumps(found.to_dict(), indent=1, allow_nan=False) if as_json else recommendation.text(found))


@cli.command("show")
@click.argument("directory", type=click.Path(path_type=Path), metavar="RUN")
def show_run(directory: Path) -> None:
    """A run on this terminal: the fastest backends, by how much, statuses, and how far each got."""
    from attnbench.report import terminal

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    width = shutil.get_terminal_size().columns
    _print(terminal.text(load(directory), width, colour=colour), newline=False)


@cli.command()
@click.argument("question", metavar="SQL")
@click.argument("directories", type=click.Path(path_type=Path), metavar="RUN...", nargs=-1, required=True)
@click.option("--format", metavar="|".join(QUERY_FORMATS), default="markdown", help="Default: markdown.")
def query(question: str, directories: tuple[Path, ...], format: str) -> None:
    """The answer to a SELECT over the tables `records` and `runs` of one run or many."""
    if format not in QUERY_FORMATS:
        raise unknown("format", format, QUERY_FORMATS)
    _print(DATA[format](ask([load(directory) for directory in directories], question)), newline=False)


@cli.command("presets")
def list_presets() -> None:
    """The grids that ship with attnbench."""
    for name, spec in presets().items():
        _print(f"{name:14} {spec.about} ({len(spec.grid.cases())} cases)")
