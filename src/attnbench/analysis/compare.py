"""Two runs, cell by cell: what got slower, faster, broken or mended, and what is no more than noise."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from attnbench.analysis.differences import notices
from attnbench.analysis.verdict import (
    REGRESSIONS,
    VERDICTS,
    Change,
    Verdict,
    change,
    change_in_rounds,
    drift,
    judge_error,
    judge_memory,
    judge_time,
    mean_interval,
    with_certainty,
)
from attnbench.errors import RequestError, unknown
from attnbench.record import PASSES as TIMES
from attnbench.record import Record, cell_id
from attnbench.store import Run

PASSES = ("forward", "backward")
"""Passes that a verdict is given on. A whole step is both over again: it is compared, and not judged."""

PEAKS = {"forward peak": "forward_peak_MiB", "backward peak": "backward_peak_MiB"}

ERRORS = {f"error of {name}": f"error_{name}" for name in ("out", "dq", "dk", "dv")}

MEASURED = {name: f"{name}_ms" for name in PASSES} | PEAKS
"""All that is judged in a cell that is right in both. A number that one of them lacks must not pass for the same."""

FRACTIONS = (0.005, 0.01, 0.015, 0.02, 0.05)
"""How far apart two medians may be, for the shares that `agreement` tells."""


@dataclass(frozen=True)
class Finding:
    """What one quantity of a cell was and is: the time of a pass in ms, a peak of memory in MiB, an error, or the status.

    All relative: `uncertainty` is that of `ratio`, `resolution` the least difference that the device can tell, `clock`
    how much of a difference the SM clock explains. `p` is the probability of as large a change of a time by chance,
    adjusted for the number of cells. `verdict` is None for what is shown and not judged.
    """

    cell_id: str
    backend: str
    what: str
    before: float | str | None
    after: float | str | None
    verdict: Verdict | None
    ratio: float | None = None
    uncertainty: float | None = None
    resolution: float = 0.0
    clock: float = 0.0
    p: float | None = None
    note: str | None = None

    @property
    def excess(self) -> float:
        """By how much the larger is above the smaller, relatively: the same for a factor of two up and down."""
        return math.expm1(abs(math.log(self.ratio))) if self.ratio else 0.0


@dataclass(frozen=True)
class Mean:
    """The geometric mean of ratios of one pass, over the cells that both runs timed, and the extremes.

    `backend` is None for all of them together. `interval` is that of 95 % confidence, None for a lone cell.
    """

    backend: str | None
    what: str
    cells: int
    ratio: float
    least: float
    greatest: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Agreement:
    """How well two runs repeat each other: the share of medians above a floor that lie within each fraction."""

    floor_ms: float
    medians: int
    within: Mapping[float, float]
    worst: Finding | None


@dataclass(frozen=True)
class Comparison:
    """Everything found between two runs. `notices` are what stands in the way of comparing them at all.

    `drift` is how far times move from one run to the other by themselves, relatively; `wander` how far the machine's own
    speed moved during each, where that is known. `failed_alike` counts outcomes
    other than `ok` and `unsupported` that are the same in both. Cells of one run alone are named by backend. `in_rounds` tells
    that these are two backends of one run, whose rounds went in turns.
    """

    before: str
    after: str
    threshold: float
    drift: float
    wander: tuple[float | None, float | None]
    notices: Sequence[str]
    findings: Sequence[Finding]
    failed_alike: Mapping[str, int]
    only_before: Mapping[str, Sequence[str]]
    only_after: Mapping[str, Sequence[str]]
    agreement: Agreement
    in_rounds: bool = False

    @property
    def regressions(self) -> list[Finding]:
        """The worst first: what broke, then by ratio."""
        found = [finding for finding in self.findings if finding.verdict in REGRESSIONS]
        return sorted(found, key=lambda finding: -(finding.ratio or math.inf))

    @property
    def exit_code(self) -> int:
        return 1 if self.regressions else 0

    @property
    def counts(self) -> dict[Verdict, int]:
        """How many findings have each verdict; those that none has are left out."""
        found = Counter(finding.verdict for finding in self.findings)
        return {verdict: found[verdict] for verdict in VERDICTS if found[verdict]}

    @property
    def worst(self) -> Finding | None:
        """The pass that grew the most: of those that are slower, else of all."""
        timed = [finding for finding in self.findings if finding.what in PASSES and finding.ratio]
        return max(timed, key=lambda finding: (finding.verdict == "slower", finding.ratio), default=None)

    @property
    def means(self) -> list[Mean]:
        """Of each backend and pass, and before them, where there are several backends, of all in a pass."""
        timed = [finding for finding in self.findings if finding.what in TIMES and finding.ratio]
        backends = dict.fromkeys(finding.backend for finding in timed)
        told: list[Mean] = []
        for backend in [*([None] if len(backends) > 1 else []), *backends]:
            for what in TIMES:
                ratios = [
                    one.ratio for one in timed if one.what == what and backend in (None, one.backend) and one.ratio
                ]
                if ratios:
                    told.append(_mean(backend, what, ratios, self.drift))
        return told

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON, with what follows from it first."""
        return {
            "before": self.before,
            "after": self.after,
            "threshold": self.threshold,
            "drift": self.drift,
            "in_rounds": self.in_rounds,
            "wander": self.wander,
            "exit_code": self.exit_code,
            "notices": list(self.notices),
            "counts": self.counts,
            "regressions": [asdict(finding) for finding in self.regressions],
            "worst": self.worst and asdict(self.worst),
            "agreement": asdict(self.agreement),
            "means": [asdict(mean) for mean in self.means],
            "findings": [asdict(finding) for finding in self.findings],
            "failed_alike": dict(self.failed_alike),
            "only_before": self.only_before,
            "only_after": self.only_after,
        }


def compare(a: Run, b: Run, threshold: float) -> Comparison:
    """What changed from `a` to `b`, where a change up to `threshold`, a fraction, is of no interest.

    Raises:
        RequestError: they have no cell in common, or scipy is not installed.
    """
    if not pairs(a, b):
        raise RequestError(
            f"{a.directory} and {b.directory} have no cell in common; compare runs of the same cases and backends"
        )
    return _compared(a, b, threshold, in_rounds=False)


def compare_backends(run: Run, before: str, after: str, threshold: float) -> Comparison:
    """What changes where the backend `after` takes the place of `before`, in one run: as `compare`, round by round.

    A machine may drift from run to run by more than there is to see; its rounds go in turns.

    Raises:
        RequestError: the run has none of one of them, or they are the same, or scipy is not installed.
    """
    there = list(dict.fromkeys(record.backend for record in run.records))
    for name in (before, after):
        if name not in there:
            raise unknown(f"backend in {run.directory}", name, there)
    if before == after:
        raise RequestError(f"backend {before} is the same as itself; name two of {', '.join(there)}")
    label = f"{before} → {after}"
    a, b = (_alias(run, name, label) for name in (before, after))
    if not pairs(a, b):
        raise RequestError(f"{before} and {after} have no case in common in {run.directory}")
    named = {"before": f"{before} in {run.directory}", "after": f"{after} there"}
    return replace(_compared(a, b, threshold, in_rounds=True), **named, notices=list(dict.fromkeys(notices(run, run))))


def _alias(run: Run, backend: str, label: str) -> Run:
    """The cells of one backend, by another name."""
    own = (record for record in run.records if record.backend == backend)
    return replace(run, records=[one.but(backend=label, cell_id=cell_id(one.case, label)) for one in own])


def _compared(a: Run, b: Run, threshold: float, *, in_rounds: bool) -> Comparison:
    both = pairs(a, b)
    device = both[0][0].device
    changed = change_in_rounds if in_rounds else change
    found = [found for pair in both if _both_ok(*pair) for name in PASSES if (found := changed(*pair, name))]
    between = 0.0 if in_rounds else drift([one.log_ratio for one in found], device)
    changes = {(one.cell_id, one.what): one for one in with_certainty(found, between)}
    shared = {before.cell_id for before, _ in both}
    alike = [before.outcome for before, after in both if before.outcome == after.outcome]
    return Comparison(
        str(a.directory),
        str(b.directory),
        threshold,
        between,
        (a.header.wander, b.header.wander),
        list(notices(a, b)),
        [finding for pair in both for finding in _findings(*pair, changes, threshold)],
        Counter(outcome for outcome in alike if outcome not in ("ok", "unsupported")),
        _alone(a, shared),
        _alone(b, shared),
        agreement(a, b),
        in_rounds,
    )


def agreement(a: Run, b: Run, floor_ms: float = 0.1) -> Agreement:
    """How far apart the medians of both passes are in cells that are right in both, where both are above `floor_ms`.

    Shorter times are left out: launches, and the resolution of the events, are too large a part of them.
    """
    both = [pair for pair in pairs(a, b) if _both_ok(*pair)]
    timed = [time for pair in both for name in PASSES if (time := _time(*pair, name, None))]
    found = [time for time in timed if min(float(time.before or 0), float(time.after or 0)) > floor_ms]
    shares = {
        fraction: sum(finding.excess <= fraction for finding in found) / len(found) if found else 0.0
        for fraction in FRACTIONS
    }
    return Agreement(floor_ms, len(found), shares, max(found, key=lambda finding: finding.excess, default=None))


# --- one cell ---------------------------------------------------------------------------------------------------------

Changes = Mapping[tuple[str, str], Change]
"""By cell and pass."""


def pairs(a: Run, b: Run) -> list[tuple[Record, Record]]:
    """The records of each cell that both runs have, in the order of `a`."""
    found = {record.cell_id: record for record in b.records}
    return [(record, found[record.cell_id]) for record in a.records if record.cell_id in found]


def _alone(run: Run, shared: Collection[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for record in run.records:
        if record.cell_id not in shared:
            found.setdefault(record.backend, []).append(record.cell_id)
    return found


def _both_ok(a: Record, b: Record) -> bool:
    return a.status == b.status == "ok"


def status_verdict(a: Record, b: Record) -> Verdict | None:
    """What a status that changed means; None for one that did not."""
    if a.outcome == b.outcome:
        return None
    return "broke" if a.status == "ok" else "mended" if b.status == "ok" else "changed"


def _findings(a: Record, b: Record, changes: Changes, threshold: float) -> Iterator[Finding]:
    if verdict := status_verdict(a, b):
        yield Finding(a.cell_id, a.backend, "status", a.outcome, b.outcome, verdict, note=b.reason or a.reason)
    if not _both_ok(a, b):
        return
    for name in TIMES:
        if time := _time(a, b, name, changes.get((a.cell_id, name)), threshold):
            yield time
    for what, field in PEAKS.items():
        before, after = getattr(a, field), getattr(b, field)
        if before is not None and after is not None:
            verdict = judge_memory(before, after, threshold, a.device)
            ratio = after / before if before else None
            yield Finding(a.cell_id, a.backend, what, before, after, verdict, ratio=ratio)
    for what, field in MEASURED.items():
        before, after = getattr(a, field), getattr(b, field)
        if (before is None) != (after is None):
            where = "A" if before is None else "B"
            yield Finding(a.cell_id, a.backend, what, before, after, "unclear", note=f"not measured in {where}")
    for what, field in ERRORS.items():
        before, after = getattr(a, field), getattr(b, field)
        if before and after and (verdict := judge_error(before, after)) != "same":
            note = "both within the tolerance"
            yield Finding(a.cell_id, a.backend, what, before, after, verdict, ratio=after / before, note=note)


def _time(a: Record, b: Record, name: str, judged: Change | None, threshold: float = math.inf) -> Finding | None:
    """One pass, and the verdict on its change if one is to be given; None unless both runs timed it."""
    one = judged or change(a, b, name)
    if one is None:
        return None
    before, after = getattr(a, f"{name}_ms"), getattr(b, f"{name}_ms")
    notes = [f"SM clock {a.sm_clock_MHz:.6g} → {b.sm_clock_MHz:.6g} MHz"] if one.clock else []
    if threshold < one.excess <= one.resolution:
        notes.append(f"{one.resolution * min(before, after):.3g} ms cannot be told apart")
    return Finding(
        *(a.cell_id, a.backend, name, before, after, judge_time(judged, threshold) if judged else None),
        ratio=math.exp(one.log_ratio),
        uncertainty=one.uncertainty,
        resolution=one.resolution,
        clock=one.clock,
        p=judged and judged.p,
        note="; ".join(notes) or None,
    )


def _mean(backend: str | None, what: str, ratios: Sequence[float], drift: float) -> Mean:
    interval = mean_interval([math.log(ratio) for ratio in ratios], drift)
    return Mean(backend, what, len(ratios), statistics.geometric_mean(ratios), min(ratios), max(ratios), interval)
