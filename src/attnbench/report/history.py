"""The history of some runs: what the newest one made worse, at which run each cell changed, and every time."""

from __future__ import annotations

import json
from collections.abc import Sequence

from attnbench.analysis.history import History, Series
from attnbench.analysis.segments import Shift
from attnbench.errors import printable
from attnbench.report.comparison import check_format, folded, number, percent, warnings
from attnbench.report.tables import Table, markdown_table

MARKS = {"slower": "▲", "faster": "▼"}
"""Beside the time of a run at which a cell changed."""


def render(history: History, format: str = "markdown") -> str:  # noqa: A002
    """A history as a document. Raises `RequestError` for an unknown format."""
    check_format(format)
    if format == "json":
        return json.dumps(history.to_dict(), indent=1, allow_nan=False) + "\n"
    return document(history)


def document(history: History) -> str:
    """In what the runs differ, the outcome, the newest run's regressions, all changes; then, folded, every time."""
    parts = [f"# {len(history.runs)} runs, one after the other", *warnings(history.notices), f"**{headline(history)}**"]
    rows = [[n, run, at] for n, (run, at) in enumerate(zip(history.runs, history.started_at, strict=True))]
    parts.append(markdown_table(Table(["no.", "run", "started"], rows)))
    if history.regressions:
        parts += ["## Regressions of the newest run", _shifts(history.regressions)]
    if history.shifts:
        parts += ["## What changed, and at which run", _shifts(history.shifts)]
    if moving := [one for one in history.series if one.trend]:
        rows = [[one.cell_id, one.what, f"{one.trend:.4g}"] for one in moving]
        parts += ["## What moved steadily", markdown_table(Table(["cell", "what", "last / first"], rows))]
    newest = [one.newest for one in history.series if one.newest]
    if unclear := [one for one in newest if one.verdict == "unclear"]:
        parts.append(folded(f"Unclear in the newest run ({len(unclear)})", _shifts(unclear)))
    if history.series:
        parts.append(folded(f"Every time, in ms ({len(history.series)})", _times(history.series, len(history.runs))))
    return "\n\n".join(parts) + "\n"


def headline(history: History) -> str:
    """The outcome in a line."""
    found, shifts = len(history.regressions), len(history.shifts)
    moving = sum(one.trend is not None for one in history.series)
    return (
        f"{found or 'No'} regression{'' if found == 1 else 's'} in the newest run, {history.runs[-1]}; over all "
        f"{len(history.runs)} runs {shifts} change{'' if shifts == 1 else 's'} of more than "
        f"{percent(history.threshold)}, and {moving} of {len(history.series)} times moved steadily."
    )


def _shifts(shifts: Sequence[Shift]) -> str:
    rows = [
        [
            *(one.run, one.cell_id, one.what, number(one.before), number(one.after)),
            f"{one.ratio:.4g}" if one.ratio else None,
            percent(one.uncertainty) if one.uncertainty is not None else None,
            f"{one.p:.2g}" if one.p is not None else None,
            one.verdict,
            printable(one.note or ""),
        ]
        for one in shifts
    ]
    headers = ["run", "cell", "what", "before", "from then on", "ratio", "±", "p", "verdict", "note"]
    return markdown_table(Table(headers, rows).without_empty_columns())


def _times(series: Sequence[Series], runs: int) -> str:
    rows = []
    for one in series:
        marks = {shift.run: MARKS.get(shift.verdict, "") for shift in one.shifts}
        times = [
            f"{ms:.4g}{marks.get(n, '')}" if ms is not None else None for n, ms in enumerate(one.times_ms)
        ]  # fmt: skip
        rows.append([one.cell_id, one.what, *times])
    return markdown_table(Table(["cell", "what", *map(str, range(runs))], rows))
