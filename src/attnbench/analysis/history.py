"""A series of runs: at which run each cell changed and by how much, and whether the newest one is worse than before."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from attnbench.analysis.compare import PASSES, PEAKS, pairs, status_verdict
from attnbench.analysis.differences import notices
from attnbench.analysis.segments import Points, Shift, newest_shifts, segmented, trends
from attnbench.analysis.verdict import REGRESSIONS, change, drift, judge_memory
from attnbench.errors import RequestError
from attnbench.record import Record
from attnbench.store import Run


@dataclass(frozen=True)
class Series:
    """The times of one pass of a cell, in ms, a place for each run: None where there is none.

    `shifts` are the runs at which it changed; `trend`, the factor from the first run to the last where it moved steadily,
    in which case there are no shifts. `newest` judges the newest run against what was so before it, where both are known.
    """

    cell_id: str
    backend: str
    what: str
    times_ms: Sequence[float | None]
    shifts: Sequence[Shift] = ()
    trend: float | None = None
    newest: Shift | None = None


@dataclass(frozen=True)
class History:
    """All that changed over some runs, the oldest first. `notices` name the two runs between which something differs."""

    runs: Sequence[str]
    started_at: Sequence[str]
    threshold: float
    notices: Sequence[str]
    series: Sequence[Series]
    outcomes: Sequence[Shift]
    """Changes of status and of memory, from each run to the next."""

    @property
    def regressions(self) -> list[Shift]:
        """Those of the newest run, the worst first: what broke, then by ratio."""
        last = len(self.runs) - 1
        times = [one.newest for one in self.series if one.newest]
        found = [one for one in [*self.outcomes, *times] if one.run == last and one.verdict in REGRESSIONS]
        return sorted(found, key=lambda one: -(one.ratio or math.inf))

    @property
    def shifts(self) -> list[Shift]:
        """All changes in the order of runs."""
        found = [*self.outcomes, *(shift for one in self.series for shift in one.shifts)]
        return sorted(found, key=lambda one: one.run)

    @property
    def exit_code(self) -> int:
        return 1 if self.regressions else 0

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON, with what follows from it first."""
        return {"exit_code": self.exit_code, "regressions": [asdict(one) for one in self.regressions]} | asdict(self)


def history(runs: Sequence[Run], threshold: float) -> History:
    """What changed over `runs`, in the order in which they started; changes up to `threshold` are of no interest.

    Raises:
        RequestError: fewer than two runs, one of them twice, no cell that two of them have, or scipy is missing.
    """
    if len(runs) < 2:
        raise RequestError("a history takes two runs or more, as in: attnbench compare --history runs/*")
    ordered = sorted(runs, key=lambda run: run.header.started_at)
    for before, after in pairwise(ordered):
        if before.header.run_id == after.header.run_id:
            raise RequestError(f"{before.directory} and {after.directory} are the same run; name each run once")
    steps = list(pairwise(ordered))
    if not any(pairs(*step) for step in steps):
        raise RequestError(
            "no cell is in two of these runs, one after the other; take runs of the same cases and backends"
        )
    told = [[f"{a.directory} → {b.directory}: {line}" for line in notices(a, b)] for a, b in steps]
    differs = {
        n + 1: "other machine, software or settings than the run before" for n, lines in enumerate(told) if lines
    }
    points = [Points.of(one, name) for one in _cells(ordered) for name in PASSES]
    known = [one for one in points if len(one.places) > 1]
    device = ordered[-1].header.request["device"]
    between = _between(steps, device)
    moving = trends(known, threshold)
    shifts = segmented(known, between, threshold)
    newest = newest_shifts(known, shifts, between, threshold, len(ordered) - 1)
    series = []
    for one, found, last, trend in zip(known, shifts, newest, moving, strict=True):
        steady = trend is not None and one.better_by_line([shift.run for shift in found])
        shown = () if steady else tuple(replace(shift, note=differs.get(shift.run)) for shift in found)
        told_last = last and replace(last, note=differs.get(last.run))
        series.append(
            Series(one.cell_id, one.backend, one.what, one.times_ms, shown, trend if steady else None, told_last)
        )
    return History(
        [str(run.directory) for run in ordered],
        [run.header.started_at for run in ordered],
        threshold,
        [line for lines in told for line in lines],
        series,
        [replace(one, note=one.note or differs.get(one.run)) for one in _outcomes(steps, threshold)],
    )


def _cells(runs: Sequence[Run]) -> list[list[Record | None]]:
    """The records of each cell, a place for each run."""
    by_run = [{record.cell_id: record for record in run.records} for run in runs]
    ids = dict.fromkeys(cell_id for records in by_run for cell_id in records)
    return [[records.get(cell_id) for records in by_run] for cell_id in ids]


def _between(steps: Sequence[tuple[Run, Run]], device: str) -> float:
    """The standard deviation of a time's logarithm from run to run, beyond what rounds tell: the middle of all steps'."""
    found = []
    for a, b in steps:
        both = [(x, y) for x, y in pairs(a, b) if x.status == y.status == "ok"]
        changes = [one for pair in both for name in PASSES if (one := change(*pair, name))]
        found.append(drift([one.log_ratio for one in changes], device))
    return statistics.median(found) / math.sqrt(2)


def _outcomes(steps: Sequence[tuple[Run, Run]], threshold: float) -> Iterator[Shift]:
    """Changes of status and of memory from each run to the next."""
    for n, step in enumerate(steps, 1):
        for a, b in pairs(*step):
            if verdict := status_verdict(a, b):
                yield Shift(a.cell_id, "status", n, a.outcome, b.outcome, verdict, note=b.reason or a.reason)
            for what, field in PEAKS.items():
                before, after = getattr(a, field), getattr(b, field)
                if before is None or after is None or a.status != "ok" or b.status != "ok":
                    continue
                verdict = judge_memory(before, after, threshold, a.device)
                if verdict != "same":
                    yield Shift(a.cell_id, what, n, before, after, verdict, ratio=after / before if before else None)
