"""Stopwatches: samples of single calls, by the wall clock on CPU and by events on CUDA.

On CPU a forward and its backward are timed one after the other, and the step is both. On CUDA each pass is timed apart by
a pair of events, with the L2 cache flushed before, unless it is long; calls are queued behind a kernel that spins until the
host has queued them all, so that the host's time does not enter. Where the device catches up all the same, the window says
so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from attnbench.measure.call import Grads
from attnbench.measure.sampling import Window
from attnbench.measure.telemetry import Monitor
from attnbench.record import PASSES


class Timed(Protocol):
    """What a stopwatch times: a forward, and the backward of its output."""

    def forward(self) -> Tensor: ...

    def backward(self, out: Tensor) -> Grads: ...


@dataclass
class CpuStopwatch:
    """`time.perf_counter` around each pass of a step; a window lasts `WINDOW_S`, or one step."""

    call: Timed
    backward: bool
    WINDOW_S = 0.1

    def window(self, most: int) -> Window:
        taken = Window({name: [] for name in PASSES[: 3 if self.backward else 1]})
        began = time.perf_counter()
        while True:
            start = time.perf_counter()
            out = self.call.forward()
            middle = time.perf_counter()
            taken.samples_ms["forward"].append((middle - start) * 1e3)
            if self.backward:
                grads = self.call.backward(out)
                end = time.perf_counter()
                taken.samples_ms["backward"].append((end - middle) * 1e3)
                taken.samples_ms["forward_backward"].append((end - start) * 1e3)
                del grads
            del out
            if len(taken.samples_ms["forward"]) >= most or time.perf_counter() - began > self.WINDOW_S:
                return taken

    def wait_longer(self) -> None:
        """A CPU waits for no host."""


@dataclass
class _Mark:
    """Two events around a call, and the pass it belongs to."""

    name: str
    start: torch.cuda.Event
    end: torch.cuda.Event


@dataclass
class CudaStopwatch:
    """Events around single calls that are queued ahead of the device."""

    call: Timed
    backward: bool
    device: torch.device
    monitor: Monitor
    warm_cache: bool = False

    WINDOW_S = 0.05
    """Device time of a window, and the host's time to queue it, at the most."""

    MOST_SAMPLES = 20
    """Samples of a window: the driver queues about a thousand launches before it makes the host wait."""

    LONG_S = 0.02
    """A step that takes longer is timed at one go with its passes: what the L2 cache keeps of a forward for its backward
    is some microseconds of that."""

    LONGEST_HOLD_S = 0.5

    overhead_ms: float = 0.0
    """What two events see of a kernel besides the kernel (`attnbench.measure.kernels.empty_kernel`); not counted."""

    _host_s: float = 0.005  # to queue a sample, in all its passes: a guess until one was queued
    _device_s: float = WINDOW_S  # to work on it
    _at_one_go: bool = False
    _patience: float = 1.5
    _most: int = MOST_SAMPLES
    _marks: list[_Mark] = field(default_factory=list)

    def __post_init__(self) -> None:
        properties = torch.cuda.get_device_properties(self.device)
        size = 0 if self.warm_cache else 2 * properties.L2_cache_size
        self._other_data = torch.empty(size, dtype=torch.int8, device=self.device)
        self._cycles_per_s = properties.clock_rate * 1e3

    def window(self, most: int) -> Window:
        size = self.hold_for(most)
        taken = Window({name: [] for name in PASSES[: 3 if self.backward else 1]})
        self._marks = []
        began = time.perf_counter()
        for _ in range(size):
            self._queue_sample(taken)
        queued = time.perf_counter()
        self._host_s = min(self._host_s, (queued - began) / size)
        self._watch(taken, until=queued + self._device_s * size)
        self._read_marks(taken)
        first, last = self._marks[0].start, self._marks[-1].end
        self._device_s = first.elapsed_time(last) / 1e3 / size
        step_ms = sum(min(taken.samples_ms[name]) for name in PASSES[:2] if name in taken.samples_ms)
        self._at_one_go = step_ms > self.LONG_S * 1e3
        return taken

    def _queue_sample(self, taken: Window) -> None:
        with self._mark("forward", taken) as forward:
            out = self.call.forward()
        if not self.backward:
            return
        with self._mark("backward", taken, flush=not self._at_one_go) as backward:
            grads = self.call.backward(out)
        del out, grads
        if self._at_one_go:
            self._marks.append(_Mark("forward_backward", forward.start, backward.end))
        else:
            with self._mark("forward_backward", taken):
                self.call.backward(self.call.forward())

    def hold_for(self, most: int) -> int:
        """Keeps the device from starting on what is queued next until the host has queued it.

        Returns the number of samples to queue: `most`, or fewer where they would take longer than `WINDOW_S`.
        """
        size = max(1, min(most, self._most, int(self.WINDOW_S / max(self._device_s, self._host_s))))
        # If the device takes longer than the host, only the first sample has to be waited for.
        waits = size if 2 * self._host_s > self._device_s else 1
        seconds = min(self._host_s * waits * self._patience + 2e-4, self.LONGEST_HOLD_S)
        torch.cuda._sleep(int(self._cycles_per_s * seconds))
        return size

    def lead(self, seconds: float, most: int) -> None:
        """The load itself, for at least `seconds`; a first sample tells how long the host takes."""
        began = time.perf_counter()
        self.window(1)
        while time.perf_counter() - began < seconds:
            self.window(most)

    def watched(self, watch: Callable[[Callable[[], Any]], Any], repeats: int) -> dict[str, list[float]]:
        """Some calls queued and flushed as samples are, forward and backward in turn, each a piece of work to `watch`.

        Steps are made as well, so that the load is the same, and are not looked at.

        Returns the milliseconds that events saw of the very same calls, by pass; nothing where the device caught up.
        """
        taken = Window({name: [] for name in PASSES[: 2 if self.backward else 1]})
        self._marks = []

        def timed(name: str, work: Callable[[], Any]) -> Any:
            with self._mark(name, taken, flush=False):
                return work()

        for _ in range(self.hold_for(repeats)):
            self.flush()
            out = watch(lambda: timed("forward", self.call.forward))
            if self.backward:
                self.flush()
                grads = watch(lambda out=out: timed("backward", lambda: self.call.backward(out)))
                del grads
            del out
            if self.backward and not self._at_one_go:
                self.flush()
                self.call.backward(self.call.forward())
        self._read_marks(taken)
        if taken.starved:
            self.wait_longer()
            return {}
        return taken.samples_ms

    def wait_longer(self) -> None:
        self._patience *= 2
        self._most = max(1, self._most // 2)  # it may have been held up by a full queue

    def flush(self) -> None:
        """Fills the L2 cache with other data."""
        if not self.warm_cache:
            self._other_data.zero_()

    @contextmanager
    def _mark(self, name: str, taken: Window, *, flush: bool = True) -> Iterator[_Mark]:
        if flush:
            self.flush()
        mark = _Mark(name, *(torch.cuda.Event(enable_timing=True) for _ in range(2)))
        mark.start.record()
        yield mark
        mark.end.record()
        # Had the device begun on it before the host was done with it, it could have waited for the host in between.
        taken.starved |= mark.start.query()
        self._marks.append(mark)

    def _read_marks(self, taken: Window) -> None:
        torch.cuda.synchronize(self.device)
        for mark in self._marks:
            taken.samples_ms[mark.name].append(max(0.0, mark.start.elapsed_time(mark.end) - self.overhead_ms))

    def _watch(self, taken: Window, until: float, interval_s: float = 0.01) -> None:
        """Reads the device's state while it works, at least once."""
        while (reading := self.monitor.read()) is not None:
            taken.readings.append(reading)
            if time.perf_counter() > until - interval_s or self._marks[-1].end.query():
                return
            time.sleep(interval_s)


def time_calls(work: Callable[[], Any], wait: Callable[[Any], None], *, for_s: float = 0.01) -> float:
    """Milliseconds of a call among others back to back, host and device together: the wall clock over some calls.

    `wait` is given the last result, and returns when it is there.
    """
    wait(work())
    began, count, result = time.perf_counter(), 0, None
    while count < 3 or time.perf_counter() - began < for_s:
        result = work()
        count += 1
    wait(result)
    return (time.perf_counter() - began) / count * 1e3
