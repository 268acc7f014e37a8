"""Two runs, cell by cell: what got slower, faster, broken or mended, and what is no more than noise."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from attnbench import machine
from attnbench.errors import RequestError
from attnbench.noise import relative_error
from attnbench.record import PASSES as TIMES
from attnbench.record import Record
from attnbench.store import Run

Verdict = Literal[
    "slower", "broke", "more memory", "faster", "mended", "less memory", "changed", "unclear", "same"
]  # fmt: skip
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
REGRESSIONS, IMPROVEMENTS = VERDICTS[:3], VERDICTS[3:6]

DEFAULT_THRESHOLD = {"cuda": 0.02, "cpu": 0.1}
"""By device. A shared CPU drifts by as much from one run to the next, and neither run can tell."""

PASSES = ("forward", "backward")
"""Passes that a verdict is given on. A whole step is both over again: it is compared, and not judged."""

PEAKS = {"forward peak": "forward_peak_MiB", "backward peak": "backward_peak_MiB"}

MEASURED = {name: f"{name}_ms" for name in PASSES} | PEAKS
"""All that is judged in a cell that is right in both. A number that one of them lacks must not pass for the same."""

SETTINGS = (
    "device", "passes", "protocol", "clock", "warm_cache", "budget_s", "timeout_s", "memory_limit_bytes", "seed",
)  # fmt: skip
"""What of a request bears on its cells' outcomes."""

SOFTWARE = ("attnbench", "driver", "software", "threads", "environment")
"""What bears on them besides and is no part of a machine's identity."""

RESOLUTION_MS = {"cuda": 0.002, "cpu": 0.0}
"""Differences below this tell nothing, by device: CUDA events resolve a microsecond or so, and launches jitter."""

LAUNCHES_MS = 0.005
"""The same of cells that are `launch_bound`: the gaps between their kernels differ by as much from process to process."""

CERTAIN, LIKELY = 3.0, 2.0
"""How many uncertainties a change must exceed to be one, and how many an unchanged time must leave room for."""

ROOM = 1.5
"""How many times the least change of interest may lie between two times that are called the same, noise included."""

LONE_NOISE = {"cpu": 0.05, "cuda": 0.01}
"""What is taken for the relative uncertainty of a single sample, by device, and 1/n of it for that of n: a few samples
that happen to lie together do not show how far apart they could lie. On an H200, 97 % of the cells above 10 ms scatter
by less."""

LEAST_MEMORY, LEAST_MEMORY_MIB = 0.01, {"cuda": 1.0, "cpu": 4.0}
"""By how much a peak must have moved at the least, relatively and in all: allocators round up, and the peak of a
resident set, two huge pages of which are 4 MiB, was seen to differ by 1.5 MiB from one run to the next."""

FRACTIONS = (0.005, 0.01, 0.015, 0.02, 0.05)
"""How far apart two medians may be, for the shares that `agreement` tells."""


@dataclass(frozen=True)
class Finding:
    """What one quantity of a cell was and is: the time of a pass in ms, a peak of memory in MiB, or the status.

    All relative: `uncertainty` is that of `ratio`, `resolution` the least difference that the device can tell, `clock`
    how much of a difference the SM clock explains. `verdict` is None for what is shown and not judged.
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
    note: str | None = None

    @property
    def excess(self) -> float:
        """By how much the larger is above the smaller, relatively: the same for a factor of two up and down."""
        return _excess(self.ratio) if self.ratio else 0.0


@dataclass(frozen=True)
class Mean:
    """The geometric mean of a backend's ratios in one pass, over the cells that both runs timed, and the extremes."""

    backend: str
    what: str
    cells: int
    ratio: float
    least: float
    greatest: float


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

    `failed_alike` counts outcomes other than `ok` and `unsupported` that are the same in both. Cells of one run alone
    are named by backend.
    """

    before: str
    after: str
    threshold: float
    notices: Sequence[str]
    findings: Sequence[Finding]
    failed_alike: Mapping[str, int]
    only_before: Mapping[str, Sequence[str]]
    only_after: Mapping[str, Sequence[str]]
    agreement: Agreement

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
        ratios: dict[tuple[str, str], list[float]] = {}
        for finding in self.findings:
            if finding.what in TIMES and finding.ratio:
                ratios.setdefault((finding.backend, finding.what), []).append(finding.ratio)
        return [
            Mean(*key, len(found), statistics.geometric_mean(found), min(found), max(found))
            for key, found in ratios.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON, with what follows from it first."""
        return {
            "before": self.before,
            "after": self.after,
            "threshold": self.threshold,
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


def default_threshold(run: Run) -> float:
    """The least change of interest on the device of a run."""
    return DEFAULT_THRESHOLD[_kind(run.header.request["device"])]


def parse_threshold(text: str) -> float:
    """`2%` or `0.02`, as a fraction. Raises `RequestError` for anything that is not above 0 and below 1."""
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})\s*(%?)\s*", text)
    fraction = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < fraction < 1:
        raise RequestError(f"threshold {text!r} is not a change above 0 and below 100 %; write it like 2% or 0.02")
    return fraction


def compare(a: Run, b: Run, threshold: float) -> Comparison:
    """What changed from `a` to `b`, where a change up to `threshold`, a fraction, is of no interest.

    Raises:
        RequestError: they have no cell in common.
    """
    pairs = _pairs(a, b)
    if not pairs:
        raise RequestError(
            f"{a.directory} and {b.directory} have no cell in common; compare runs of the same cases and backends"
        )
    shared = {before.cell_id for before, _ in pairs}
    alike = [before.outcome for before, after in pairs if before.outcome == after.outcome]
    return Comparison(
        str(a.directory),
        str(b.directory),
        threshold,
        list(_notices(a, b)),
        [finding for before, after in pairs for finding in _findings(before, after, threshold)],
        Counter(outcome for outcome in alike if outcome not in ("ok", "unsupported")),
        _alone(a, shared),
        _alone(b, shared),
        agreement(a, b),
    )


def agreement(a: Run, b: Run, floor_ms: float = 0.1) -> Agreement:
    """How far apart the medians of both passes are in cells that are right in both, where both are above `floor_ms`.

    Shorter times are left out: launches, and the resolution of the events, are too large a part of them.
    """
    pairs = [pair for pair in _pairs(a, b) if _both_ok(*pair)]
    timed = [_time(*pair, name) for pair in pairs for name in PASSES if _longer(*pair, name, floor_ms)]
    found = [time for time in timed if time]
    shares = {
        fraction: sum(finding.excess <= fraction for finding in found) / len(found) if found else 0.0
        for fraction in FRACTIONS
    }
    return Agreement(floor_ms, len(found), shares, max(found, key=lambda finding: finding.excess, default=None))


def noise_of(record: Record, name: str) -> float:
    """Relative uncertainty of a pass's median.

    What the record says; where it says nothing, the standard error of the median. Never less than so many samples can
    tell.
    """
    told, samples = getattr(record, f"{name}_noise"), getattr(record, f"{name}_samples_ms")
    lone = LONE_NOISE[_kind(record.device)]
    if told is None:
        told = relative_error(samples) if samples else lone
    return max(told, lone / len(samples)) if samples else told


# --- one cell ---------------------------------------------------------------------------------------------------------


def _pairs(a: Run, b: Run) -> list[tuple[Record, Record]]:
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


def _findings(a: Record, b: Record, threshold: float) -> Iterator[Finding]:
    if a.outcome != b.outcome:
        verdict: Verdict = "broke" if a.status == "ok" else "mended" if b.status == "ok" else "changed"
        yield Finding(a.cell_id, a.backend, "status", a.outcome, b.outcome, verdict, note=b.reason or a.reason)
    if not _both_ok(a, b):
        return
    for name in TIMES:
        if time := _time(a, b, name):
            yield replace(time, verdict=_judge(time, threshold)) if name in PASSES else time
    for what in PEAKS:
        if peak := _peak(a, b, what, threshold):
            yield peak
    for what, field in MEASURED.items():
        before, after = getattr(a, field), getattr(b, field)
        if (before is None) != (after is None):
            where = "A" if before is None else "B"
            yield Finding(a.cell_id, a.backend, what, before, after, "unclear", note=f"not measured in {where}")


def _time(a: Record, b: Record, name: str) -> Finding | None:
    """One pass, not judged yet; None unless both runs timed it."""
    before, after = getattr(a, f"{name}_ms"), getattr(b, f"{name}_ms")
    if not before or not after:
        return None
    clock = _clock(a, b)
    return Finding(
        *(a.cell_id, a.backend, name, before, after, None),
        ratio=after / before,
        uncertainty=math.hypot(noise_of(a, name), noise_of(b, name)),
        resolution=_resolution_ms(a, b) / min(before, after),
        clock=clock,
        note=f"SM clock {a.sm_clock_MHz:.6g} → {b.sm_clock_MHz:.6g} MHz" if clock else None,
    )


def _judge(time: Finding, threshold: float) -> Verdict:
    """A change has to be above the threshold and what the device resolves, and beyond what noise and clock explain.

    Two times are the same where they lie within that least change, and what noise and clock could hide would not take
    them far beyond it. What is neither is unclear; more samples would tell.
    """
    excess, uncertainty, least = time.excess, time.uncertainty or 0.0, max(threshold, time.resolution)
    if excess > least and excess > CERTAIN * uncertainty + time.clock:
        return "slower" if time.ratio and time.ratio > 1 else "faster"
    if excess <= least and excess + LIKELY * uncertainty + time.clock <= ROOM * least:
        return "same"
    return "unclear"


def _peak(a: Record, b: Record, what: str, threshold: float) -> Finding | None:
    """One peak of memory; None unless both runs measured it."""
    before, after = getattr(a, PEAKS[what]), getattr(b, PEAKS[what])
    if before is None or after is None:
        return None
    least = max(LEAST_MEMORY_MIB[_kind(a.device)], max(threshold, LEAST_MEMORY) * min(before, after))
    moved = after - before
    verdict: Verdict = "same" if abs(moved) <= least else "more memory" if moved > 0 else "less memory"
    return Finding(a.cell_id, a.backend, what, before, after, verdict, ratio=after / before if before else None)


def _excess(ratio: float) -> float:
    return max(ratio, 1 / ratio) - 1


def _clock(a: Record, b: Record) -> float:
    """How much of a change the SM clocks explain: a kernel bound by arithmetic takes longer by as much as they fell."""
    return _excess(b.sm_clock_MHz / a.sm_clock_MHz) if a.sm_clock_MHz and b.sm_clock_MHz else 0.0


def _resolution_ms(*records: Record) -> float:
    if any("launch_bound" in record.tags for record in records):
        return LAUNCHES_MS
    return max(RESOLUTION_MS[_kind(record.device)] for record in records)


def _kind(device: str) -> str:
    """The kind of device, by which the limits above are kept: `cuda` for `cuda:1`."""
    return device.partition(":")[0]


def _longer(a: Record, b: Record, name: str, floor_ms: float) -> bool:
    return all((getattr(record, f"{name}_ms") or 0.0) > floor_ms for record in (a, b))


# --- two runs ---------------------------------------------------------------------------------------------------------


def _notices(a: Run, b: Run) -> Iterator[str]:
    """In what the runs differ that could pass for a change of the backends, and what is missing."""
    before, now = (run.header.machine | {"attnbench": run.header.attnbench} for run in (a, b))
    differences = {
        "machines": machine.difference(a.header.machine, b.header.machine),
        "software": _difference(before, now, SOFTWARE),
        "settings": _difference(a.header.request, b.header.request, SETTINGS),
    }
    yield from (f"The {what} differ: {how}." for what, how in differences.items() if how)
    for run in (a, b):
        if not run.complete:
            yield f"{run.directory} is not finished: it has {len(run.records)} of {run.header.cells} cells."


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """In which of `names` two headers differ, in words; what one lacks is the same as what is empty in the other."""
    parts = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in names
        if (before.get(name) or None) != (now.get(name) or None)
    ]
    return "; ".join(parts) or None
