"""When to measure, how long, and what to throw away. Knows no framework and no device: a `Stopwatch` takes the samples.

A visit of a cell warms up, then takes windows of samples until the medians are known or its budget is spent. A window
that something else disturbed is taken again, a bounded number of times.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from attnbench.clock_events import DISTURBING
from attnbench.noise import MAX_SAMPLES, settled

MOST_RETRIES = 3
"""Windows that a visit throws away at the most, for each cause."""

STARVED = "the host fell behind the device"


@dataclass(frozen=True)
class Reading:
    """The state of a GPU at one moment of a window, `at_s` by the clock of `time.perf_counter`."""

    at_s: float
    sm_clock_MHz: float
    power_W: float | None = None
    temperature_C: float | None = None
    clock_events: tuple[str, ...] = ()


@dataclass
class Window:
    """Samples taken at one go, in milliseconds of single calls by pass, and the device's state meanwhile.

    `starved` tells that the device waited for the host at some point, so that host time may have entered.
    """

    samples_ms: dict[str, list[float]]
    readings: list[Reading] = field(default_factory=list)
    starved: bool = False
    discarded: str | None = None

    @property
    def sm_clock_MHz(self) -> float | None:
        return statistics.median(reading.sm_clock_MHz for reading in self.readings) if self.readings else None

    @property
    def clock_events(self) -> tuple[str, ...]:
        return tuple(sorted({event for reading in self.readings for event in reading.clock_events}))

    def to_dict(self) -> dict[str, Any]:
        """As the record keeps it; raw samples only where they are not kept as the cell's."""
        known = {
            "sm_clock_MHz": self.sm_clock_MHz,
            "power_W": max((r.power_W for r in self.readings if r.power_W is not None), default=None),
            "temperature_C": max((r.temperature_C for r in self.readings if r.temperature_C is not None), default=None),
        }
        told: dict[str, Any] = {"samples": {name: len(samples) for name, samples in self.samples_ms.items()}}
        if self.readings:
            told |= {name: value for name, value in known.items() if value is not None}
            told["clock_events"] = self.clock_events
        if self.starved:
            told["starved"] = True
        if self.discarded:
            told |= {"discarded": self.discarded, "samples_ms": self.samples_ms}
        return told


class Stopwatch(Protocol):
    """Takes samples of one call."""

    def window(self, most: int) -> Window:
        """A window of up to `most` samples of each pass, and one at the least."""
        ...

    def wait_longer(self) -> None:
        """The host fell behind: give it more time to queue the next window."""
        ...


LEAST_WARM_S = {False: 0.02, True: 0.25}
"""How long a sustained load runs before its samples count: longer where it keeps the device busy, since what the power cap
does to the clock, and what the driver tells of the power, takes a tenth of a second to show."""

BUSY = 0.3
"""The share of the time in which a device works on calls from which they keep it busy."""

STEADY_S = {False: 0.1, True: 0.3}
"""For how long the clock must have stood still; longer where the power cap is near."""

MOST_WARM_S = 1.5

STEADY = 0.01
"""What counts as standing still: the halves of that stretch have means this close to each other, relatively. Under the
power cap the clock goes up and down by some steps without end."""

NEAR_CAP = 0.75
"""The share of the power limit from which the power cap is near."""


def settle(
    stopwatch: Stopwatch,
    *,
    limit_W: float | None = None,
    near_cap: bool | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> bool:
    """Runs the load until the SM clock has settled under it, for `MOST_WARM_S` at the most.

    `near_cap` tells what an earlier call of this function found of the same load, and returned: whether it comes near the
    power cap. Where it is known not to, nothing has to be waited for to find out.
    """
    began, busy_s = now(), 0.0
    readings: list[Reading] = []
    while True:
        window = stopwatch.window(MAX_SAMPLES)
        busy_s += sum(map(sum, window.samples_ms.values())) / 1e3
        readings += window.readings
        spent = now() - began
        near = near_cap or any(_near_cap(reading, limit_W) for reading in readings)
        busy = near or busy_s > BUSY * spent
        still = not busy or not readings or _steady(readings, STEADY_S[near])
        if spent >= MOST_WARM_S or (still and spent >= LEAST_WARM_S[near or (busy and near_cap is None)]):
            return near


def _near_cap(reading: Reading, limit_W: float | None) -> bool:
    drawn = reading.power_W is not None and limit_W is not None and reading.power_W > NEAR_CAP * limit_W
    return drawn or "sw_power_cap" in reading.clock_events


def _steady(readings: Sequence[Reading], stretch_s: float) -> bool:
    newest = readings[-1]
    if len(readings) < 2 or newest.at_s - readings[0].at_s < stretch_s:
        return False
    stretch = [reading for reading in readings if reading.at_s >= newest.at_s - stretch_s]
    if len(stretch) < 2:  # a single step takes longer
        stretch = readings[-2:]
    clocks = [reading.sm_clock_MHz for reading in stretch]
    half = len(clocks) // 2
    early, late = statistics.fmean(clocks[:half]), statistics.fmean(clocks[half:])
    return abs(late - early) <= STEADY * late


@dataclass
class Sampling:
    """What a visit brought: windows in the order taken, and whether the load came near the power cap, if that is known."""

    windows: list[Window] = field(default_factory=list)
    near_cap: bool | None = None

    @property
    def samples_ms(self) -> dict[str, list[float]]:
        """Kept samples by pass."""
        found: dict[str, list[float]] = {}
        for window in self.windows:
            if not window.discarded:
                for name, samples in window.samples_ms.items():
                    found.setdefault(name, []).extend(samples)
        return found


def sample(
    stopwatch: Stopwatch,
    *,
    budget_s: float,
    rest_s: float = 0.0,
    most: int = MAX_SAMPLES,
    now: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Sampling:
    """Windows of up to `most` samples, each after a rest of `rest_s`, until medians settle or `budget_s` is spent.

    One window is kept at the least. Where `MOST_RETRIES` windows were thrown away for a cause and it persists, the next
    one is kept, and shows the cause.
    """
    sampling = Sampling()
    thrown: Counter[str] = Counter()
    deadline = now() + budget_s
    while True:
        if rest_s:
            sleep(rest_s)
        window = stopwatch.window(most)
        if window.starved:
            stopwatch.wait_longer()
        cause = STARVED if window.starved else ", ".join(sorted(DISTURBING & set(window.clock_events)))
        if cause and thrown[cause] < MOST_RETRIES:
            thrown[cause] += 1
            window.discarded = cause
        sampling.windows.append(window)
        kept = sampling.samples_ms
        if kept and (now() >= deadline or all(map(settled, kept.values()))):
            return sampling
