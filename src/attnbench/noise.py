"""How well a median is known. Knows no framework."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

RELATIVE_ERROR = 0.005
"""Sampling ends when the median of each pass is known to this relative standard error."""

MIN_SAMPLES, MAX_SAMPLES = 10, 1000

DEVIATION = 1.4826
"""Of what is normally distributed, the standard deviation by the median of the magnitudes."""


def relative_error(samples: Sequence[float]) -> float:
    """Standard error of the median over the median: 1.2533 σ/√n, with σ from the median absolute deviation."""
    centre = statistics.median(samples)
    deviation = DEVIATION * statistics.median(abs(sample - centre) for sample in samples)
    return 1.2533 * deviation / len(samples) ** 0.5 / centre if centre else 0.0


def settled(samples: Sequence[float]) -> bool:
    return len(samples) >= MAX_SAMPLES or (len(samples) >= MIN_SAMPLES and relative_error(samples) < RELATIVE_ERROR)


def noise(rounds: Sequence[Sequence[float]]) -> float | None:
    """Relative uncertainty of the median over all samples of some rounds; None for a lone sample.

    The larger of its standard error and half the distance between those of the rounds' own medians whose ranks lie √R/2, the
    standard deviation of a median's rank, below and above the middle, rounded outward: of three that is the range. Drift
    between rounds does not shrink with the number of samples in each, but what is known of it grows with that of rounds.
    """
    samples = [sample for taken in rounds for sample in taken]
    if len(samples) < 2:
        return None
    medians = sorted(statistics.median(taken) for taken in rounds if taken)
    middle, reach = (len(medians) - 1) / 2, math.sqrt(len(medians)) / 2
    low, high = max(0, math.floor(middle - reach)), min(len(medians) - 1, math.ceil(middle + reach))
    return max(relative_error(samples), (medians[high] - medians[low]) / 2 / statistics.median(samples))


def wander(pulses: Sequence[float]) -> float | None:
    """Half the range in which nine in ten of some times of the same work lie, over their median; None for less than ten."""
    if len(pulses) < MIN_SAMPLES:
        return None
    twentieths = statistics.quantiles(pulses, n=20, method="inclusive")
    return (twentieths[-1] - twentieths[0]) / 2 / statistics.median(pulses)


def by_round(windows: Sequence[Mapping[str, Any]], samples: Sequence[float], name: str) -> list[list[float]]:
    """A pass's kept samples, parted into the rounds they were taken in; `windows` as records keep them."""
    rounds: dict[int, list[float]] = {}
    start = 0
    for window in windows:
        if "discarded" not in window:
            end = start + window["samples"].get(name, 0)
            rounds.setdefault(window["round"], []).extend(samples[start:end])
            start = end
    return list(rounds.values()) or [list(samples)]
