"""Tags: warnings beside a status, each with what gives cause for it and what it means for the reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attnbench.clock_events import DISTURBING
from attnbench.noise import MIN_SAMPLES, RELATIVE_ERROR, relative_error
from attnbench.record import PASSES, Record

NOISY = 0.02
"""Relative uncertainty of a median from which it is called noisy, however many samples there are."""

HOST_BOUND = 1.2
"""A call that takes this many times its kernels' own time waits for the host."""

CLOCK_MOVED = 0.02


@dataclass(frozen=True)
class Tag:
    about: str
    applies: Callable[[Record], bool]


def _samples(record: Record) -> list[tuple[float, ...]]:
    return [taken for name in PASSES if (taken := getattr(record, f"{name}_samples_ms"))]


def _few_samples(record: Record) -> bool:
    return any(len(taken) < MIN_SAMPLES for taken in _samples(record))


def _noisy(record: Record) -> bool:
    noises = [noise for name in PASSES if (noise := getattr(record, f"{name}_noise")) is not None]
    unsettled = any(len(taken) >= MIN_SAMPLES and relative_error(taken) >= RELATIVE_ERROR for taken in _samples(record))
    return unsettled or any(noise > NOISY for noise in noises)


def _launch_bound(record: Record) -> bool:
    pairs = (
        (record.call_forward_ms, record.device_forward_ms),
        (record.call_backward_ms, record.device_backward_ms),
    )
    waits = any(call and device and call > HOST_BOUND * device for call, device in pairs)
    return waits or any("starved" in window for window in record.kept_windows)


def _throttled(record: Record) -> bool:
    return any(DISTURBING & set(window.get("clock_events", ())) for window in record.kept_windows)


def _clock_moved(record: Record) -> bool:
    clocks = [window["sm_clock_MHz"] for window in record.kept_windows if "sm_clock_MHz" in window]
    return bool(clocks) and max(clocks) > (1 + CLOCK_MOVED) * min(clocks)


def _above_limit(record: Record) -> bool:
    return any(limit is not None and limit > 1 for limit in (record.limit_forward, record.limit_backward))


TAGS: dict[str, Tag] = {
    "few_samples": Tag("fewer than ten samples of a pass: its spread is a guess", _few_samples),
    "noisy": Tag("the median is known to no better than 0.5 % by its samples, or 2 % between rounds", _noisy),
    "launch_bound": Tag("a call takes over 1.2 times its kernels' own time: the host sets the pace", _launch_bound),
    "throttled": Tag("heat or something outside slowed the GPU in every try", _throttled),
    "clock_unlocked": Tag("the SM clock moved by more than 2 % between windows", _clock_moved),
    "fallback": Tag("kernels ran, and none of them was the backend's own", lambda record: "fallback" in record.tags),
    "above_limit": Tag("faster than the floor: a ceiling is too low, or work was left out", _above_limit),
}


def tagged(record: Record) -> Record:
    """The record with every tag that it gives cause for; `fallback` is the worker's to see, and stays."""
    if record.status != "ok":
        return record
    return record.but(tags=tuple(name for name, tag in TAGS.items() if tag.applies(record)))
