"""Which kernels ran, by the profiler, and how long the device spent in them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from attnbench.measure.stopwatch import CudaStopwatch
from attnbench.measure.telemetry import monitor

CPU_WORK = ("aten::", "## Call CompiledFxGraph")
"""Beginnings of the names of what does the work on a CPU: ATen's operations and calls of compiled code."""

LEAST_SHARE = 0.01
"""An operation on CPU that spent less of the time than this is not named."""


LONGEST_GAP_US = 2.0
"""Between kernels that are queued back to back a GPU takes no more than this; in longer gaps it waits for the host."""

LEAD_S, LOOK_S = 0.1, 0.06
"""Near the power cap the clock is never at rest: it is brought back by this much of the load, and looked at for so long."""


@dataclass(frozen=True)
class Seen:
    """What ran in a piece of work: names, each once, longest first, and the milliseconds the device spent in it.

    `queued_ms` is how long it takes where the host is ahead: from the beginning of the first kernel to the end of the last,
    gaps between them counted up to `LONGEST_GAP_US`. `events_ms` is what a pair of events saw of the same calls.
    """

    names: tuple[str, ...]
    device_ms: float | None
    queued_ms: float | None = None
    events_ms: float | None = None


class Watch:
    """Profiles some pieces of work in one session: kernels on CUDA, ATen's operations on CPU.

    Call it with each piece in turn; `seen` tells of them in the same order. Marks stand at both ends of each: on CUDA
    kernels that spin for a cycle, so that nothing has to wait for the device in between. One that spins for longer holds
    the queue, and is no mark.
    """

    _MARK, _LONGEST_MARK_US = "spin_kernel", 50.0

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._profiler = profile(activities=[ProfilerActivity.CUDA if self._cuda else ProfilerActivity.CPU])

    def __enter__(self) -> Watch:
        self._profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)
        self._profiler.__exit__(*error)

    def __call__(self, work: Callable[[], Any]) -> Any:
        self._mark()
        result = work()
        self._mark()
        return result

    def _mark(self) -> None:
        if self._cuda:
            torch.cuda._sleep(1)
        else:
            with torch.profiler.record_function(self._MARK):
                pass

    def seen(self) -> list[Seen]:
        """One entry for each piece of work; to be asked after the session has ended."""
        pieces: list[list[tuple[str, float]]] = []
        spans: list[list[tuple[float, float]]] = []
        inside = False
        for event in sorted(self._profiler.events() or (), key=lambda event: event.time_range.start):
            on_device = event.device_type == DeviceType.CUDA
            if self._MARK in event.name and on_device == self._cuda:
                if not self._cuda or event.self_device_time_total < self._LONGEST_MARK_US:
                    inside = not inside
                    if inside:
                        pieces.append([])
                        spans.append([])
            elif inside and self._cuda and on_device:
                pieces[-1].append((event.name, event.self_device_time_total))
                spans[-1].append((event.time_range.start, event.time_range.end))
            elif inside and not self._cuda and event.name.startswith(CPU_WORK):
                name = event.name if event.name.startswith("aten::") else "CompiledFxGraph"  # the rest is a hash
                pieces[-1].append((name, event.self_cpu_time_total))
        return [self._summed(piece, of_it) for piece, of_it in zip(pieces, spans, strict=True)]

    def _summed(self, piece: list[tuple[str, float]], spans_us: list[tuple[float, float]]) -> Seen:
        spent_us: dict[str, float] = {}
        for name, spent in piece:
            spent_us[name] = spent_us.get(name, 0.0) + spent
        total = sum(spent_us.values())
        least = 0.0 if self._cuda else total * LEAST_SHARE
        names = [name for name, spent in spent_us.items() if spent >= least]
        return Seen(
            tuple(sorted(names, key=lambda name: -spent_us[name])),
            total / 1e3 if self._cuda and total else None,
            queued_us(spans_us) / 1e3 if spans_us else None,
        )


def queued_us(spans_us: Sequence[tuple[float, float]]) -> float:
    """How long kernels with these beginnings and ends take where each is queued before the one ahead of it ends."""
    total, until = 0.0, None
    for start, end in sorted(spans_us):
        if until is None:
            until = start
        total += min(max(0.0, start - until), LONGEST_GAP_US) + max(0.0, end - max(start, until))
        until = max(until, end)
    return total


class Watchable(Protocol):
    """A stopwatch whose calls can be looked at by the profiler, too."""

    device: torch.device
    backward: bool

    def lead(self, seconds: float, most: int) -> None: ...

    def watched(self, watch: Watch, repeats: int) -> dict[str, list[float]]: ...


def device_times(stopwatch: Watchable, *, near_cap: bool = False) -> dict[str, Seen]:
    """What the device does in the passes of a stopwatch's call: medians of some, queued and flushed as for its samples.

    Nothing where the driver lets no profiler look.

    To be asked right after samples were taken, while the clock is where they left it. `near_cap` tells that the power cap
    moves it, so that it changes in the pause in which the profiler starts, and from one call to the next.
    """
    repeats = 20 if near_cap else 5
    with Watch(stopwatch.device) as watch:
        stopwatch.lead(LEAD_S if near_cap else 0.0, repeats)
        began = time.perf_counter()
        looks = [stopwatch.watched(watch, repeats)]
        while near_cap and time.perf_counter() - began < LOOK_S:
            looks.append(stopwatch.watched(watch, repeats))
    seen = watch.seen()
    by_pass = {"forward": seen[::2], "backward": seen[1::2]} if stopwatch.backward else {"forward": seen}
    return {
        name: _typical(pieces, [one for look in looks for one in look.get(name, ())])
        for name, pieces in by_pass.items()
        if pieces
    }


def _typical(seen: Sequence[Seen], by_events_ms: Sequence[float]) -> Seen:
    times = [one.device_ms for one in seen if one.device_ms is not None]
    return Seen(seen[0].names, _median(times), events_ms=_median(by_events_ms))


def _median(times: Sequence[float]) -> float | None:
    return statistics.median(times) if times else None


def empty_kernel(device: torch.device, repeats: int = 20) -> tuple[float, float]:
    """Milliseconds of a kernel that does next to nothing, and what a pair of events sees besides it.

    Between its two timestamps lies the launch of the kernel, some microseconds on a GPU, whatever the kernel. Measured as
    samples are taken: after a flush of the L2 cache, queued ahead of the device. Where the driver lets no profiler look, all
    of it counts as the kernel's.
    """
    call = _Nothing()
    stopwatch = CudaStopwatch(call, False, device, monitor(device))
    stopwatch.window(repeats)
    stopwatch.window(repeats)  # by now it knows how long the host takes
    taken = stopwatch.window(repeats)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            call.forward()
        torch.cuda.synchronize(device)
    own = [event.self_device_time_total for event in profiler.events() or () if Watch._MARK in event.name]
    seen_ms = statistics.median(taken.samples_ms["forward"])
    own_ms = statistics.median(filter(None, own)) / 1e3 if any(own) else seen_ms
    return own_ms, max(0.0, seen_ms - own_ms)


class _Nothing:
    """A call whose forward is one kernel that spins for a cycle."""

    _out = torch.empty(0)

    def forward(self) -> torch.Tensor:
        torch.cuda._sleep(1)
        return self._out

    def backward(self, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (out,)
