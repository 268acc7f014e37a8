"""Time of one cell: forward, pure backward and whole step, in samples of single calls.

Each sample of the default protocol is one call. On CPU a forward and its backward are timed by the wall clock one after
the other, and the step is both. On CUDA each is timed by a pair of events, with the L2 cache flushed before; batches of
calls are queued behind a kernel that spins until the host has queued them all, so that the host's time never enters.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from attnbench.measure import telemetry
from attnbench.measure.call import Call

RELATIVE_ERROR = 0.005
"""Sampling ends when the median of each pass is known to this relative standard error."""

WARMTH_MATTERS_S = 0.5
"""A step on CPU that takes longer needs no other to warm up for it."""

MIN_SAMPLES, MAX_SAMPLES = 10, 1000
SEED_WARMUP, SEED_ITERATIONS = 10, 100


@dataclass
class Samples:
    """Milliseconds of single calls, in the order taken, and what else was seen meanwhile."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    forward_backward: list[float] = field(default_factory=list)
    state: dict[str, float] = field(default_factory=dict)

    @property
    def passes(self) -> dict[str, list[float]]:
        found = {"forward": self.forward, "backward": self.backward, "forward_backward": self.forward_backward}
        return {name: samples for name, samples in found.items() if samples}

    @property
    def settled(self) -> bool:
        """Whether more samples would add nothing."""
        return all(settled(samples) for samples in self.passes.values())


def relative_error(samples: list[float]) -> float:
    """Standard error of the median over the median: 1.2533 σ/√n, with σ from the median absolute deviation."""
    centre = statistics.median(samples)
    deviation = 1.4826 * statistics.median(abs(sample - centre) for sample in samples)
    return 1.2533 * deviation / len(samples) ** 0.5 / centre if centre else 0.0


def settled(samples: list[float]) -> bool:
    return len(samples) >= MAX_SAMPLES or (len(samples) >= MIN_SAMPLES and relative_error(samples) < RELATIVE_ERROR)


def time_call(call: Call, device: torch.device, *, backward: bool, budget_s: float, warm: bool) -> Samples:
    """Samples until they settle or `budget_s` is spent; at least one of each pass.

    `warm` tells that the same call has just been made, so that a CPU need not be warmed by one that does not count.
    """
    deadline = time.perf_counter() + budget_s
    if device.type == "cuda":
        return _cuda(call, device, backward, deadline)
    return _cpu(call, backward, deadline, warm)


def _cpu(call: Call, backward: bool, deadline: float, warm: bool) -> Samples:
    samples = Samples()
    if not warm:
        began = time.perf_counter()
        _step(call, backward)
        if time.perf_counter() - began > WARMTH_MATTERS_S:
            deadline = 0.0  # what is cold at first is little beside that; one more step and this visit is over
    while True:
        start = time.perf_counter()
        out = call.forward()
        middle = time.perf_counter()
        samples.forward.append((middle - start) * 1e3)
        if backward:
            grads = call.backward(out)
            end = time.perf_counter()
            samples.backward.append((end - middle) * 1e3)
            samples.forward_backward.append((end - start) * 1e3)
            del grads
        del out
        if samples.settled or time.perf_counter() >= deadline:
            return samples


def _step(call: Call, backward: bool) -> None:
    out = call.forward()
    if backward:
        call.backward(out)


# --- CUDA -------------------------------------------------------------------------------------------------------------

BATCH_S = 0.05
"""Device time of a batch of samples that is queued at once, and the host time to queue it, at the most."""

MAX_BATCH = 20
"""Samples of a batch at the most: the driver queues about a thousand launches before it makes the host wait."""


def _cuda(call: Call, device: torch.device, backward: bool, deadline: float) -> Samples:
    samples = Samples()
    queue = _Queue(device)
    host_s, device_s = queue.cost_of(lambda: _step(call, backward))
    per_sample_host, per_sample_device = 2.5 * host_s, 2 * device_s + 1e-4  # the passes apart, then the step whole
    size = max(1, min(MAX_BATCH, int(BATCH_S / max(per_sample_device, per_sample_host))))
    while True:
        marks: list[tuple[list[float], torch.cuda.Event, torch.cuda.Event]] = []
        # If the device takes longer than the host, only the first sample has to be waited for.
        queue.hold(per_sample_host * (size if per_sample_host > per_sample_device else 1))
        for _ in range(size):
            with queue.timed(samples.forward, marks):
                out = call.forward()
            if backward:
                with queue.timed(samples.backward, marks):
                    grads = call.backward(out)
                del out, grads
                with queue.timed(samples.forward_backward, marks):
                    _step(call, backward)
            else:
                del out
        samples.state = samples.state or telemetry.read(device)
        torch.cuda.synchronize(device)
        for into, start, end in marks:
            into.append(start.elapsed_time(end))
        if samples.settled or time.perf_counter() >= deadline:
            return samples


class _Queue:
    """Work queued ahead of a GPU, sample by sample."""

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.device = device
        self.flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.int8, device=device)
        self.cycles_per_s = properties.clock_rate * 1e3

    def cost_of(self, work: Callable[[], None], repeats: int = 3) -> tuple[float, float]:
        """Seconds of the host to queue `work`, and of the device to do it; the least of some tries, after a warm-up."""
        work()
        torch.cuda.synchronize(self.device)
        host, device = [], []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began = time.perf_counter()
            start.record()
            work()
            end.record()
            host.append(time.perf_counter() - began)
            torch.cuda.synchronize(self.device)
            device.append(start.elapsed_time(end) / 1e3)
            if time.perf_counter() - began > 0.2:
                break
        return min(host), min(device)

    def hold(self, seconds: float) -> None:
        """Keeps the device from starting on what is queued next, for about as long as the host needs to queue it."""
        torch.cuda._sleep(int(self.cycles_per_s * min(seconds * 1.5 + 2e-4, 0.2)))

    def timed(self, into: list[float], marks: list[tuple[list[float], torch.cuda.Event, torch.cuda.Event]]) -> _Timed:
        self.flush.zero_()
        return _Timed(into, marks)


class _Timed:
    def __init__(self, into: list[float], marks: list[tuple[list[float], torch.cuda.Event, torch.cuda.Event]]) -> None:
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        marks.append((into, self.start, self.end))

    def __enter__(self) -> None:
        self.start.record()

    def __exit__(self, *_: object) -> None:
        self.end.record()


# --- the seed's protocol ----------------------------------------------------------------------------------------------


def time_as_seed(call: Call, device: torch.device, *, backward: bool, budget_s: float, warm: bool) -> Samples:  # noqa: ARG001
    """The procedure of the table attnbench began with, for comparison with it.

    The forward includes a sum over the output; the pass it calls backward is a whole step: forward, sum and a backward
    that accumulates into `.grad`. Each iteration ends in a synchronisation of the device and is timed by the wall clock;
    100 after 10 to warm up, or as many as `budget_s` allows for each of the two.
    """

    def forward() -> None:
        call.forward().sum()

    def step() -> None:
        call.forward().sum().backward()

    samples = Samples()
    _iterate(forward, samples.forward, device, budget_s)
    if backward:
        _iterate(step, samples.backward, device, budget_s)
        for tensor in call.inputs:
            tensor.grad = None
    return samples


def _iterate(work: Callable[[], None], into: list[float], device: torch.device, budget_s: float) -> None:
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    began = time.perf_counter()
    for iteration in range(SEED_WARMUP + SEED_ITERATIONS):
        start = time.perf_counter()
        work()
        wait()
        end = time.perf_counter()
        if iteration >= SEED_WARMUP or end - began > budget_s:
            into.append((end - start) * 1e3)
        if into and end - began > budget_s:
            return
