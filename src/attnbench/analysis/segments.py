"""Where a series of times changed.

A series of times is parted at its clearest change, and each part again, as long as the two sides differ by the test that
two runs are compared with (`attnbench.analysis.verdict`): recursive binary segmentation. Series of runs are short, each of
their points has an uncertainty of its own, and there are hundreds of them: a penalty for change points, as packages for
one long signal ask for, could not say how many of those that are found are chance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from attnbench.analysis.verdict import (
    FALSE_DISCOVERIES,
    Change,
    Verdict,
    adjusted,
    chances,
    judge_time,
    resolution_ms,
    statistics_library,
    variance,
)
from attnbench.record import Record

LONG_ENOUGH = 5
"""Runs from which a steady trend can be told from chance."""


@dataclass(frozen=True)
class Shift:
    """What changed at a run, against what was so since the change before it: a time in ms, a peak in MiB or a status.

    `run` counts the runs of the history from 0. `uncertainty` is that of `ratio`, `p` the probability of as much by
    chance, adjusted for all that was tested. `note` tells what else differs from the run before.
    """

    cell_id: str
    what: str
    run: int
    before: float | str
    after: float | str
    verdict: Verdict
    ratio: float | None = None
    uncertainty: float | None = None
    p: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Points:
    """What is known of one pass of a cell: the `places` of the runs that timed it, and the records there."""

    cell_id: str
    backend: str
    what: str
    times_ms: tuple[float | None, ...]
    places: tuple[int, ...]
    records: tuple[Record, ...]
    logs: tuple[float, ...]
    variances: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, records: Sequence[Record | None], name: str) -> Points:
        times = tuple((getattr(one, f"{name}_ms") or None) if one and one.status == "ok" else None for one in records)
        known = [(n, one, ms) for n, (one, ms) in enumerate(zip(records, times, strict=True)) if one and ms]
        some = next(one for one in records if one)
        return cls(
            some.cell_id,
            some.backend,
            name,
            times,
            tuple(n for n, _, _ in known),
            tuple(one for _, one, _ in known),
            tuple(math.log(ms) for _, _, ms in known),
            tuple(variance(one, name) for _, one, _ in known),
        )

    @property
    def scatter(self) -> float:
        """The standard deviation of a point, by how far it is from the next: the middle of that, which steps do not move."""
        apart = [abs(after - before) for before, after in pairwise(self.logs)]
        middle = statistics.median_low(apart) if len(apart) > 2 else 0.0
        return middle / (math.sqrt(2) * statistics.NormalDist().inv_cdf(0.75))

    def change(self, start: int, middle: int, end: int, between: float) -> Change:
        """From the points `start` … `middle` − 1 to those from `middle` to `end` − 1, of which each counts alike."""
        sides = (range(start, middle), range(middle, end))
        clocks = [[self.records[n].sm_clock_MHz for n in side] for side in sides]
        before, after = (statistics.median(clock for clock in side if clock) if all(side) else 0.0 for side in clocks)
        logs = [[self.logs[n] for n in side] for side in sides]
        least_ms = math.exp(min(map(statistics.fmean, logs)))
        drifting = max(between, self.scatter) * math.sqrt(sum(1 / len(side) for side in sides))
        own = [_mean_variance([self.variances[n] for n in side]) for side in sides]
        samples = [
            [ms for n in side for ms in getattr(self.records[n], f"{self.what}_samples_ms")] for side in sides
        ]  # fmt: skip
        return Change(
            self.cell_id,
            self.what,
            statistics.fmean(logs[1]) - statistics.fmean(logs[0]),
            (own[0], own[1]),
            (samples[0], samples[1]),
            clock=math.expm1(abs(math.log(after / before))) if before and after else 0.0,
            resolution=resolution_ms(*(self.records[n] for n in range(start, end))) / least_ms,
            drift=drifting,
        )

    def better_by_line(self, shifts: Sequence[int]) -> bool:
        """Whether a straight line is nearer to the points than steps at `shifts` are."""
        line = statistics.linear_regression(self.places, self.logs)
        off = sum((y - line.intercept - line.slope * x) ** 2 for x, y in zip(self.places, self.logs, strict=True))
        bounds = [0, *(self.places.index(run) for run in shifts), len(self.places)]
        parts = [self.logs[low:high] for low, high in pairwise(bounds)]
        return off < sum((y - statistics.fmean(part)) ** 2 for part in parts for y in part)


def _mean_variance(variances: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The variance of the mean of independent values, and its degrees of freedom."""
    own = sum(one for one, _ in variances) / len(variances) ** 2
    parts = sum((one / len(variances) ** 2) ** 2 / freedom for one, freedom in variances)
    return own, own**2 / parts if parts else math.inf


def _shift(one: Change, p: float, points: Points, start: int, middle: int, end: int, threshold: float) -> Shift:
    before, after = (
        math.exp(statistics.fmean(points.logs[low:high])) for low, high in ((start, middle), (middle, end))
    )
    verdict = judge_time(replace(one, p=p), threshold)
    ratio = math.exp(one.log_ratio)
    return Shift(
        one.cell_id, one.what, points.places[middle], before, after, verdict, ratio=ratio, uncertainty=one.uncertainty, p=p
    )  # fmt: skip


# --- all series -------------------------------------------------------------------------------------------------------


def segmented(known: Sequence[Points], between: float, threshold: float) -> list[list[Shift]]:
    """The shifts of each series. All tests that were made on the way are adjusted for together."""
    trees = [_split(one, 0, len(one.places), between, threshold) for one in known]
    values = iter(adjusted([p for tree in trees for _, p in tree]))
    found = []
    for one, tree in zip(known, trees, strict=True):
        bounds = sorted(
            middle for middle, p in [(middle, next(values)) for middle, _ in tree] if p <= FALSE_DISCOVERIES
        )
        found.append(_shifts(one, bounds, between, threshold))
    return found


def _split(one: Points, start: int, end: int, between: float, threshold: float) -> list[tuple[int, float]]:
    """The clearest place to part a stretch of a series, and its p-value for the choice of so many; then those within."""
    middles = range(start + 1, end)
    if not middles:
        return []
    changes = [one.change(start, middle, end, between) for middle in middles]
    best = max(range(len(changes)), key=lambda n: abs(changes[n].log_ratio) / (changes[n].uncertainty or 1e-12))
    p = min(1.0, chances([changes[best]])[0] * len(changes))
    found = [(middles[best], p)]
    if p <= FALSE_DISCOVERIES and changes[best].excess > threshold:
        found += _split(one, start, middles[best], between, threshold)
        found += _split(one, middles[best], end, between, threshold)
    return found


def _shifts(one: Points, bounds: list[int], between: float, threshold: float) -> list[Shift]:
    """The changes at `bounds`, each against its neighbours; those that come to no change of interest are taken out."""
    while True:
        edges = [0, *bounds, len(one.places)]
        steps = list(zip(edges, edges[1:], edges[2:], strict=False))
        changes = [one.change(*step, between) for step in steps]
        values = chances(changes) if changes else []
        shifts = [
            _shift(change, p, one, *step, threshold) for change, p, step in zip(changes, values, steps, strict=True)
        ]
        kept = [bound for bound, shift in zip(bounds, shifts, strict=True) if shift.verdict in ("slower", "faster")]
        if kept == bounds:
            return shifts
        bounds = kept


def newest_shifts(
    known: Sequence[Points], shifts: Sequence[Sequence[Shift]], between: float, threshold: float, last: int
) -> list[Shift | None]:
    """The newest run of each series against the stretch before it."""
    steps: list[tuple[int, int, int] | None] = []
    for one, found in zip(known, shifts, strict=True):
        earlier = [one.places.index(shift.run) for shift in found if shift.run < last]
        end = len(one.places)
        steps.append((max(earlier, default=0), end - 1, end) if one.places[-1] == last else None)
    changes = [one.change(*step, between) if step else None for one, step in zip(known, steps, strict=True)]
    values = iter(adjusted(chances([one for one in changes if one]))) if any(changes) else iter(())
    return [
        _shift(change, next(values), one, *step, threshold) if change and step else None
        for one, change, step in zip(known, changes, steps, strict=True)
    ]


def trends(known: Sequence[Points], threshold: float) -> list[float | None]:
    """The factor by which each series moved in all, if steadily: by Kendall's test, and Theil's and Sen's slope."""
    stats = statistics_library()
    long = [one for one in known if len(one.places) >= LONG_ENOUGH]
    values = adjusted([float(stats.kendalltau(one.places, one.logs).pvalue) for one in long])
    found: dict[tuple[str, str], float] = {}
    for one, p in zip(long, values, strict=True):
        moved = float(stats.theilslopes(one.logs, one.places).slope) * (one.places[-1] - one.places[0])
        if p <= FALSE_DISCOVERIES and math.expm1(abs(moved)) > threshold:
            found[one.cell_id, one.what] = math.exp(moved)
    return [found.get((one.cell_id, one.what)) for one in known]
