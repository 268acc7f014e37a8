"""The statistics of a verdict: how well one pass of a cell is known, and whether two times of it differ.

Times are compared by the logarithm of their ratio, so that twice and half as long count alike. docs/method.md,
"Comparing two runs", has the formulas.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Literal, get_args

from attnbench.errors import RequestError
from attnbench.noise import by_round, relative_error
from attnbench.record import Record

Verdict = Literal[
    "slower", "broke", "more memory", "faster", "mended", "less memory", "less accurate", "more accurate", "changed",
    "unclear", "same",
]  # fmt: skip
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
REGRESSIONS: tuple[Verdict, ...] = ("slower", "broke", "more memory")
IMPROVEMENTS: tuple[Verdict, ...] = ("faster", "mended", "less memory")
TOLD: tuple[Verdict, ...] = ("less accurate", "more accurate", "changed")
"""Changes that are neither: all of them within what a right cell may show, or between two failures."""

DEFAULT_THRESHOLD = 0.02
"""The least change of interest, relatively. Where noise is larger than that, it takes a larger change to be told."""

FALSE_DISCOVERIES = 0.05
"""The share of changes that may be none, among all that are told."""

LIKELY = 2.0
"""How many uncertainties an unchanged time must leave room for."""

ROOM = 1.5
"""How many times the least change of interest may lie between two times that are called the same, noise included."""

LONE_NOISE = {"cpu": 0.05, "cuda": 0.01}
"""What is taken for the relative uncertainty of a single sample, by device, and 1/n of it for that of n: a few samples
that happen to lie together do not show how far apart they could lie. On an H200, 97 % of the cells above 10 ms scatter
by less."""

USUAL_DRIFT, MOST_DRIFT = {"cpu": 0.04, "cuda": 0.005}, {"cpu": 0.1, "cuda": 0.005}
"""How far a cell's time is taken to move from one run to the next, relatively, by device: where two runs have too few times
in common to show it, and at the most. Measured, on a shared CPU and on an H200 (docs/method.md)."""

ENOUGH = 8
"""Times in common, from which the drift between two runs is seen in them; samples, from which ranks can be certain."""

RESOLUTION_MS = {"cuda": 0.002, "cpu": 0.0}
"""Differences below this tell nothing, by device: CUDA events resolve a microsecond or so, and launches jitter."""

LAUNCHES_MS = 0.005
"""The same of cells that are `launch_bound`: the gaps between their kernels differ by as much from process to process."""


@dataclass(frozen=True)
class Change:
    """One pass of a cell in two runs. All but the samples is in logarithms or relative, which is the same where small.

    `log_ratio` is that of B's reported median over A's. `variances` are those of the two medians, each with its degrees
    of freedom. `clock` is how much of a change the SM clocks explain, `resolution` the least difference that the device
    can tell, `drift` the standard deviation between runs, which no run can tell of itself. `p` is the probability of as
    large a change by chance, adjusted for the number of cells.
    """

    cell_id: str
    what: str
    log_ratio: float
    variances: tuple[tuple[float, float], tuple[float, float]]
    samples_ms: tuple[Sequence[float], Sequence[float]]
    clock: float = 0.0
    resolution: float = 0.0
    drift: float = 0.0
    p: float = 1.0

    @property
    def uncertainty(self) -> float:
        """Standard error of `log_ratio`: both medians' own, and the drift between the runs."""
        return math.sqrt(sum(variance for variance, _ in self.variances) + self.drift**2)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of `uncertainty`, by Welch and Satterthwaite; the drift, of many cells, counts as known."""
        own = sum(variance**2 / freedom for variance, freedom in self.variances)
        return self.uncertainty**4 / own if own else math.inf

    @property
    def excess(self) -> float:
        """By how much the larger is above the smaller, relatively."""
        return math.expm1(abs(self.log_ratio))


def change(a: Record, b: Record, name: str) -> Change | None:
    """The change of a pass from one record to another; None unless both have its time. No drift is known yet."""
    before, after = getattr(a, f"{name}_ms"), getattr(b, f"{name}_ms")
    if not before or not after:
        return None
    return Change(
        a.cell_id,
        name,
        math.log(after / before),
        (variance(a, name), variance(b, name)),
        (getattr(a, f"{name}_samples_ms"), getattr(b, f"{name}_samples_ms")),
        clock=_clock(a, b),
        resolution=resolution_ms(a, b) / min(before, after),
    )


def change_in_rounds(a: Record, b: Record, name: str) -> Change | None:
    """The change of a pass from one record to another of the same run, whose rounds went in turns.

    What the machine did in a round it did to both: the units are the differences of the rounds. Where there are no rounds to
    pair, it is as between two runs.
    """
    made = change(a, b, name)
    differences = [log_b - log_a for log_a, log_b in zip(_log_medians(a, name), _log_medians(b, name), strict=False)]
    if made is None or len(differences) < 2:
        return made
    between = statistics.variance(differences) / len(differences)
    paired = max(between, _within_rounds(a, name) + _within_rounds(b, name)), len(differences) - 1.0
    return replace(
        made, log_ratio=statistics.fmean(differences), variances=(paired, (0.0, math.inf)), samples_ms=((), ())
    )


def variance(record: Record, name: str) -> tuple[float, float]:
    """The variance of the logarithm of a pass's median, and its degrees of freedom.

    Samples of one round are not independent: what they have in common does not shrink with their number. So the rounds
    are the units, and the variance of R of them is that of their medians over R, with R − 1 degrees of freedom; but never
    less than the samples alone would leave. Without rounds it is what `noise_of` tells.
    """
    medians, samples = _log_medians(record, name), getattr(record, f"{name}_samples_ms")
    if len(medians) < 2:
        return noise_of(record, name) ** 2, max(1.0, len(samples) - 1.0) if len(samples) > 1 else math.inf
    between = statistics.variance(medians) / len(medians)
    return max(between, _least_variance(samples, record.device)), len(medians) - 1.0


def _rounds(record: Record, name: str) -> list[list[float]]:
    return [taken for taken in by_round(record.windows, getattr(record, f"{name}_samples_ms"), name) if taken]


def _log_medians(record: Record, name: str) -> list[float]:
    """The logarithms of the medians of a pass's rounds."""
    return [math.log(statistics.median(taken)) for taken in _rounds(record, name)]


def _least_variance(samples: Sequence[float], device: str) -> float:
    """The variance of a median of samples that have nothing in common."""
    return max(relative_error(samples), LONE_NOISE[kind(device)] / len(samples)) ** 2


def _within_rounds(record: Record, name: str) -> float:
    """The same of a pass's samples, each relative to its round's median."""
    rounds = _rounds(record, name)
    relative = [sample / statistics.median(taken) for taken in rounds for sample in taken]
    return _least_variance(relative, record.device)


def noise_of(record: Record, name: str) -> float:
    """Relative uncertainty of a pass's median.

    What the record says; where it says nothing, the standard error of the median. Never less than so many samples can
    tell.
    """
    told, samples = getattr(record, f"{name}_noise"), getattr(record, f"{name}_samples_ms")
    lone = LONE_NOISE[kind(record.device)]
    if told is None:
        told = relative_error(samples) if samples else lone
    return max(told, lone / len(samples)) if samples else told


# --- what one cell cannot tell ----------------------------------------------------------------------------------------


def drift(log_ratios: Sequence[float], device: str) -> float:
    """The standard deviation of log ratios from one run to the next, as two runs show it, and `MOST_DRIFT` at the most.

    The narrowest interval that holds half of the ratios gives the spread of the cells that did not change, wherever their
    middle lies. A run as a whole drifts, too, which nothing in it shows: it is taken to do so by √2 times as much.
    """
    if len(log_ratios) < ENOUGH:
        return USUAL_DRIFT[kind(device)]
    ordered = sorted(log_ratios)
    half = min(high - low for low, high in zip(ordered, ordered[len(ordered) // 2 :], strict=False))
    return min(MOST_DRIFT[kind(device)], math.sqrt(3) * half / (2 * statistics.NormalDist().inv_cdf(0.75)))


def with_certainty(changes: Sequence[Change], between: float) -> list[Change]:
    """The changes with the drift between what they are from and to, and with `p`, adjusted for so many cells."""
    drifting = [replace(one, drift=between) for one in changes]
    return [replace(one, p=p) for one, p in zip(drifting, adjusted(chances(drifting)), strict=True)]


def chances(changes: Sequence[Change]) -> list[float]:
    """The probability of each change, or a larger one, if there was none.

    It is the larger of two: that of Student's test of the log ratio beyond what the clock explains, with the rounds as
    units; and that of Mann and Whitney's of the samples, where there are enough for it to say anything. A change needs
    both.
    """
    stats = statistics_library()
    beyond = [max(0.0, abs(one.log_ratio) - math.log1p(one.clock)) / (one.uncertainty or 1e-12) for one in changes]
    by_rounds = 2 * stats.t.sf(beyond, [one.freedom for one in changes])
    return [max(float(p), _by_samples(one, stats)) for p, one in zip(by_rounds, changes, strict=True)]


def adjusted(values: Sequence[float]) -> list[float]:
    """p-values, adjusted for their number as Benjamini and Hochberg do."""
    return list(map(float, statistics_library().false_discovery_control(values))) if values else []


def _by_samples(one: Change, stats: ModuleType) -> float:
    if min(map(len, one.samples_ms)) < ENOUGH:
        return 0.0
    return float(stats.mannwhitneyu(*one.samples_ms, method="asymptotic").pvalue)


def statistics_library() -> ModuleType:
    """scipy.stats, which takes half a second to load. Raises `RequestError` where it is not installed."""
    try:
        import scipy.stats
    except ImportError:
        raise RequestError("comparing runs needs scipy; install it by: pip install 'attnbench[report]'") from None
    return scipy.stats


def parse_threshold(text: str) -> float:
    """`2%` or `0.02`, as a fraction. Raises `RequestError` for anything that is not above 0 and below 1."""
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})\s*(%?)\s*", text)
    fraction = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < fraction < 1:
        raise RequestError(f"threshold {text!r} is not a change above 0 and below 100 %; write it like 2% or 0.02")
    return fraction


# --- verdicts ---------------------------------------------------------------------------------------------------------


def judge_time(one: Change, threshold: float) -> Verdict:
    """A change has to be above the threshold and what the device resolves, and beyond what chance would bring about.

    Two times are the same where they lie within that least change, and what noise and clock could hide would not take
    them far beyond it. What is neither is unclear; more samples, or more runs, would tell.
    """
    least = max(threshold, one.resolution)
    if one.excess > least and one.p <= FALSE_DISCOVERIES:
        return "slower" if one.log_ratio > 0 else "faster"
    if one.excess <= least and one.excess + LIKELY * one.uncertainty + one.clock <= ROOM * least:
        return "same"
    return "unclear"


LEAST_MEMORY, LEAST_MEMORY_MIB = 0.01, {"cuda": 1.0, "cpu": 4.0}
"""By how much a peak must have moved at the least, relatively and in all: allocators round up, and the peak of a
resident set, two huge pages of which are 4 MiB, was seen to differ by 1.5 MiB from one run to the next."""


def judge_memory(before_MiB: float, after_MiB: float, threshold: float, device: str) -> Verdict:
    least = max(LEAST_MEMORY_MIB[kind(device)], max(threshold, LEAST_MEMORY) * min(before_MiB, after_MiB))
    if abs(after_MiB - before_MiB) <= least:
        return "same"
    return "more memory" if after_MiB > before_MiB else "less memory"


LEAST_ERROR_FACTOR = 2.0
"""By what factor an error must have moved to be told: other kernels round in another order, and errors of right results
differ by less."""


def judge_error(before: float, after: float) -> Verdict:
    """Of two errors that both pass: whether one is out of all proportion to the other."""
    if after > LEAST_ERROR_FACTOR * before:
        return "less accurate"
    return "more accurate" if before > LEAST_ERROR_FACTOR * after else "same"


# --- the device -------------------------------------------------------------------------------------------------------


def kind(device: str) -> str:
    """The kind of device, by which the limits above are kept: `cuda` for `cuda:1`."""
    return device.partition(":")[0]


def resolution_ms(*records: Record) -> float:
    if any("launch_bound" in record.tags for record in records):
        return LAUNCHES_MS
    return max(RESOLUTION_MS[kind(record.device)] for record in records)


def _clock(a: Record, b: Record) -> float:
    """How much of a change the SM clocks explain: a kernel bound by arithmetic takes longer by as much as they fell."""
    if not a.sm_clock_MHz or not b.sm_clock_MHz:
        return 0.0
    return math.expm1(abs(math.log(b.sm_clock_MHz / a.sm_clock_MHz)))


def mean_interval(log_ratios: Sequence[float], between: float, share: float = 0.95) -> tuple[float, float] | None:
    """The confidence interval of a geometric mean of ratios; None for a lone one.

    Student's, over the cells, with the drift that all cells of a run have in common.
    """
    if len(log_ratios) < 2:
        return None
    common = between**2 * 2 / 3
    variances = statistics.variance(log_ratios) / len(log_ratios)
    freedom = (len(log_ratios) - 1) * ((variances + common) / variances) ** 2 if variances else math.inf
    reach = float(statistics_library().t.ppf((1 + share) / 2, freedom)) * math.sqrt(variances + common)
    centre = statistics.fmean(log_ratios)
    return math.exp(centre - reach), math.exp(centre + reach)
