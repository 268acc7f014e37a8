"""Time of one cell: forward, pure backward and whole step, as the request wants it measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from attnbench.measure.call import Call, TorchCall
from attnbench.measure.graphs import Graphed
from attnbench.measure.profiled import ProfiledStopwatch
from attnbench.measure.sampling import Sampling, Window, sample, settle
from attnbench.measure.stopwatch import CpuStopwatch, CudaStopwatch
from attnbench.measure.telemetry import monitor

WARMTH_MATTERS_S = 0.5
"""A step on CPU that takes longer needs no other to warm up for it: what is cold at first is little beside that."""

BURST_SAMPLES, BURST_REST_S = 10, 0.5
"""A burst is this many samples after a rest this long: 10 calls of some milliseconds end before the clock falls."""


@dataclass(frozen=True)
class Timer:
    """How calls are timed on a device.

    `clock` is the regime of a GPU's clocks: `sustained`, under this very load until the SM clock has settled, as in
    training; or `burst`, a few calls after a rest, when the clock has no time to fall. `warm_cache` leaves the L2 cache
    as the call before left it. `overhead_ms` is taken off each sample: what events see besides a kernel.
    """

    device: torch.device
    backward: bool = True
    clock: str = "sustained"
    warm_cache: bool = False
    overhead_ms: float = 0.0

    def stopwatch(self, call: Call | Graphed) -> CudaStopwatch | ProfiledStopwatch:
        """What times a call on a GPU: events where they see its work, the profiler's records elsewhere."""
        state = monitor(self.device)
        if not isinstance(call, Graphed) and not call.on_torch_stream:
            return ProfiledStopwatch(call, self.backward, self.device, state, self.warm_cache)
        return CudaStopwatch(call, self.backward, self.device, state, self.warm_cache, self.overhead_ms)

    def time(
        self, call: Call | Graphed, budget_s: float, *, warm: bool = False, near_cap: bool | None = None
    ) -> Sampling:
        """Samples until they settle or `budget_s` is spent; at least one of each pass.

        `warm` tells that a CPU need not be warmed by a step that does not count: the same call has just been made, or
        takes longer than `WARMTH_MATTERS_S`. `near_cap` is what an earlier sampling of the same call found.
        """
        if self.device.type == "cpu":
            if not warm:
                self._step(call)
            return sample(CpuStopwatch(call, self.backward), budget_s=budget_s)
        stopwatch = self.stopwatch(call)
        if self.clock == "burst":
            stopwatch.window(1)
            return sample(stopwatch, budget_s=budget_s, rest_s=BURST_REST_S, most=BURST_SAMPLES)
        near_cap = settle(stopwatch, limit_W=stopwatch.monitor.limit_W, near_cap=near_cap)
        sampling = sample(stopwatch, budget_s=budget_s)
        sampling.near_cap = near_cap
        return sampling

    def _step(self, call: Call | Graphed) -> None:
        out = call.forward()
        if self.backward:
            call.backward(out)


# --- the seed's protocol ----------------------------------------------------------------------------------------------

SEED_WARMUP, SEED_ITERATIONS = 10, 100


def time_as_seed(call: TorchCall, device: torch.device, *, backward: bool, budget_s: float) -> Sampling:
    """The procedure of the table attnbench began with, for comparison with it.

    The forward includes a sum over the output; the pass it calls backward is a whole step: forward, sum and a backward
    that accumulates into `.grad`. Each iteration ends in a synchronisation of the device and is timed by the wall clock;
    100 after 10 to warm up, or as many as `budget_s` allows for each of the two.
    """

    def forward() -> None:
        call.forward().sum()

    def step() -> None:
        call.forward().sum().backward()

    samples_ms = {"forward": _iterate(forward, device, budget_s)}
    if backward:
        samples_ms["backward"] = _iterate(step, device, budget_s)
        for tensor in call.inputs:
            tensor.grad = None
    return Sampling([Window(samples_ms)])


def _iterate(work: Callable[[], None], device: torch.device, budget_s: float) -> list[float]:
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    samples_ms: list[float] = []
    began = time.perf_counter()
    for iteration in range(SEED_WARMUP + SEED_ITERATIONS):
        start = time.perf_counter()
        work()
        wait()
        end = time.perf_counter()
        if iteration >= SEED_WARMUP or end - began > budget_s:
            samples_ms.append((end - start) * 1e3)
        if samples_ms and end - began > budget_s:
            break
    return samples_ms
