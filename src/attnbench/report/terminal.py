"""A run on a terminal, for someone who looks at it over ssh: what is fastest, by how much, and how far each got."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from rich.console import Console, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from attnbench.analysis.recommend import Recommendation, recommend
from attnbench.analysis.table import Table
from attnbench.analysis.wish import PASSES, SEED_PASSES, Pass, Wish
from attnbench.case import Case
from attnbench.errors import RequestError, printable
from attnbench.record import FAILURES, Record
from attnbench.report.full import frontier
from attnbench.report.groups import groups
from attnbench.store import Run, require

NARROWEST = 60
"""Columns below which lines are left to break."""

CHART_COLUMN = 16
"""Characters that a column of the chart takes at the least: a bar, and how many times the fastest's time."""

BLOCKS = " ▏▎▍▌▋▊▉█"


def text(run: Run, width: int = 80, *, colour: bool = False) -> str:
    """A run in lines of at most `width` characters, with ANSI colours or without any escape at all.

    Raises:
        RequestError: the run's header lacks what is to be told.
    """
    require(run.directory, run.header)
    file = io.StringIO()
    console = Console(
        file=file, width=max(width, NARROWEST), highlight=False, emoji=False, markup=False, legacy_windows=False,
        force_terminal=colour, color_system="standard" if colour else None,
    )  # fmt: skip
    for part in _parts(run, console):
        console.print(part)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def _parts(run: Run, console: Console) -> Iterator[RenderableType]:
    header = run.header
    gpus = ", ".join(dict.fromkeys(str(gpu.get("name")) for gpu in header.machine["gpus"]))
    on_gpu = header.request["device"] != "cpu"
    driver = f", driver {header.machine.get('driver')}" if on_gpu else ""
    torch = header.machine["packages"].get("torch")
    yield Text(printable(str(run.directory)), style="bold")
    facts = f"{gpus if on_gpu else header.machine['cpu']}{driver}, torch {torch}, protocol {header.request['protocol']}"
    yield Text(printable(f"{facts}, {header.started_at}"))
    yield _counts(run)
    order = {name: index for index, name in enumerate(header.request["backends"])}
    ordered = sorted(run.records, key=lambda record: order.get(record.backend, len(order)))
    for name, records in groups(ordered).items():
        yield Text(f"\n{name}", style="bold underline")
        passes = _timed(run, records)
        if passes:
            yield from _fastest(run, records, passes)
            yield from _chart(records, passes, console.width)
        else:
            yield Text("Nothing is right and timed here.", style="yellow")
        yield from _frontier(records)


def _timed(run: Run, records: Sequence[Record]) -> dict[str, Pass]:
    """Passes that some backend has a time of, and is right."""
    known = SEED_PASSES if run.header.request["protocol"] == "seed" else PASSES
    return {name: timed for name, timed in known.items() if any(timed.ms(record) for record in records)}


def _counts(run: Run) -> Text:
    told = Text(f"{len(run.records)} of {run.header.cells} cells:")
    for index, (status, count) in enumerate(sorted(run.counts.items(), key=lambda item: -item[1])):
        told.append("," * (index > 0) + " ").append(f"{count} {status}", style=_style(status))
    return told if run.records else told.append(" none finished", style="yellow")


def _style(status: str) -> str:
    return "green" if status == "ok" else "bold red" if status in FAILURES else "yellow"


# --- the fastest ------------------------------------------------------------------------------------------------------


def _fastest(run: Run, records: Sequence[Record], passes: Mapping[str, Pass]) -> Iterator[RenderableType]:
    """For each shape and pass the fastest backend that is right, how well its time is known, and the next one."""
    grid = _grid(
        [("seq_len", "right"), ("d_model", "right"), ("pass", "left"), ("fastest", "left"), ("ms", "right"),
         ("±", "right"), ("next", "right"), ("", "left")]
    )  # fmt: skip
    by_case: dict[Case, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.seq_len, record.d_model)):
        by_case.setdefault(record.case, []).append(record)
    for case, own in by_case.items():
        shape = (str(case.seq_len), str(case.d_model))
        for what in [name for name in passes if name != "step" or "backward" not in passes]:
            grid.add_row(*shape, what, *_standing(replace(run, records=own), case, what))
            shape = ("", "")
    yield grid
    yield Text("≈: too close to call, by the noise of the two", style="dim")


def _standing(run: Run, case: Case, what: str) -> list[Text]:
    try:
        told = recommend(run, Wish(**case.to_dict(), what=what))
    except RequestError:
        return [Text("none", style="yellow")]
    first = told.winner
    noise = f"{100 * first.noise:.1f}%" if first.noise is not None else "?"
    best = [Text(printable(first.backend), style="bold green"), Text(f"{first.ms:.4g}"), Text(noise, style="dim")]
    return [*best, *_next(told)]


def _next(told: Recommendation) -> list[Text]:
    second = told.runner_up
    if second is None:
        return []
    style = "yellow" if told.too_close(second) else ""
    margin = 100 * told.margin(second)
    shown = f"{margin:.0f}%" if margin >= 100 else f"{margin:.2g}%"
    return [
        Text(f"{'≈' if told.too_close(second) else '+'}{shown}", style=style),
        Text(printable(second.backend), style=style),
    ]


# --- the chart --------------------------------------------------------------------------------------------------------


def _chart(records: Sequence[Record], passes: Mapping[str, Pass], width: int) -> Iterator[RenderableType]:
    """The speed of each backend relative to the fastest, for every d_model at the largest seq_len that ran."""
    name = "step" if "step" in passes else next(iter(passes))
    timed = passes[name]
    longest = max(record.seq_len for record in records if timed.ms(record))
    shown = [record for record in records if record.seq_len == longest]
    best = {
        d_model: min(ms for record in shown if record.d_model == d_model and (ms := timed.ms(record)))
        for d_model in sorted({record.d_model for record in shown if timed.ms(record)})
    }
    names = list(dict.fromkeys(record.backend for record in shown))
    yield Text(f"\nSpeed of a {name} at seq_len {longest}, by d_model; ×: times as long as the fastest")
    label = min(max(len(name) for name in names), 24)
    at_once = max(1, (width - label) // CHART_COLUMN)
    by_cell = {(record.backend, record.d_model): record for record in shown}
    for start in range(0, len(best), at_once):
        some = list(best)[start : start + at_once]
        bar = min(20, (width - label) // len(some) - 8)
        grid = _grid([("", "left"), *((f"{d_model} ({best[d_model]:.4g} ms)", "left") for d_model in some)])
        for backend in names:
            cells = [by_cell.get((backend, d_model)) for d_model in some]
            values = [record and (timed.ms(record) or record.outcome) for record in cells]
            bars = [_bar(value, best[d_model], bar) for value, d_model in zip(values, some, strict=True)]
            grid.add_row(printable(backend), *bars)
        yield grid


def _bar(value: float | str | None, best: float, width: int) -> Text:
    """A bar of `width` characters for the fastest, in eighths of one; a failure in words."""
    if value is None or isinstance(value, str):
        return Text(value or "", style="red")
    eighths, ratio = max(1, round(8 * width * best / value)), value / best
    bar = BLOCKS[8] * (eighths // 8) + BLOCKS[eighths % 8].strip()
    fastest = value == best
    shown = f"{ratio:.0f}×" if ratio >= 100 else f"{ratio:.3g}×"
    return Text(bar, style="green" if fastest else "cyan").append(f" {shown}", style="bold" if fastest else "")


# --- how far each got -------------------------------------------------------------------------------------------------


def _frontier(records: Sequence[Record]) -> Iterator[RenderableType]:
    """The largest seq_len that ran, of the backends that did not get to the end."""
    whole = frontier(records)
    short = Table(
        whole.headers, [row for row in whole.rows if not all(str(cell).endswith("(all)") for cell in row[1:])]
    )
    if not short.rows:
        yield Text("\nEvery backend got to the largest seq_len.", style="dim")
        return
    yield Text("\nLargest seq_len that ran, by d_model, where that is not the largest of all:")
    grid = _grid([(header, "left") for header in short.headers])
    for row in short.rows:
        grid.add_row(
            *(Text(printable(str(cell or "")), style="" if "(all)" in str(cell) else "yellow") for cell in row)
        )
    yield grid


def _grid(columns: Sequence[tuple[str, Literal["left", "right"]]]) -> Grid:
    grid = Grid(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for header, side in columns:
        grid.add_column(header, justify=side, overflow="fold")
    return grid
