"""A stopwatch for work that PyTorch's events do not see: the profiler's own records of kernels, which see all of a process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

from attnbench.measure.call import Call
from attnbench.measure.kernels import Watch
from attnbench.measure.sampling import Window
from attnbench.measure.telemetry import Monitor
from attnbench.record import PASSES


@dataclass
class ProfiledStopwatch:
    """A sample is the time from the beginning of a pass's first kernel to the end of its last, less what the host made it wait.

    Each pass has the device to itself: the host waits before and after it, and flushes the L2 cache in between. Nothing can be
    queued ahead there, so gaps between a pass's kernels count as if it were (`attnbench.measure.kernels.queued_us`).
    """

    call: Call
    backward: bool
    device: torch.device
    monitor: Monitor
    warm_cache: bool = False

    WINDOW_S = 0.05
    MOST_SAMPLES = 20

    LEAD_S = 0.05
    """How long the load runs unobserved at the beginning of a window: the clock rises while the profiler starts."""

    _step_s: float = WINDOW_S

    def __post_init__(self) -> None:
        size = 0 if self.warm_cache else 2 * torch.cuda.get_device_properties(self.device).L2_cache_size
        self._other_data = torch.empty(size, dtype=torch.int8, device=self.device)

    def window(self, most: int) -> Window:
        names = PASSES[: 3 if self.backward else 1]
        taken = Window({name: [] for name in names})
        size = max(1, min(most, self.MOST_SAMPLES, int(self.WINDOW_S / self._step_s)))
        with Watch(self.device) as watch:
            self.lead(self.LEAD_S)
            began = time.perf_counter()
            for _ in range(size):
                self._passes(watch, step=self.backward)
                if (reading := self.monitor.read()) is not None:
                    taken.readings.append(reading)
            self._step_s = (time.perf_counter() - began) / size
        for name, seen in zip(cycle(names), self._seen(watch), strict=False):
            taken.samples_ms[name].append(seen)
        return taken

    def lead(self, seconds: float, most: int = 1) -> None:
        """The load itself, unobserved, for at least `seconds`."""
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            for _ in range(most):
                out = self.call.forward()
                self.call.wait(self.call.backward(out) if self.backward else out)

    def watched(self, watch: Watch, repeats: int) -> dict[str, list[float]]:
        """Some calls under the profiler, forward and backward in turn; no other clock sees them."""
        for _ in range(repeats):
            self._passes(watch)
        return {}

    def wait_longer(self) -> None:
        """Nothing is queued ahead."""

    def _passes(self, watch: Watch, *, step: bool = False) -> None:
        out = self._alone(watch, self.call.forward)
        if self.backward:
            self._alone(watch, lambda: self.call.backward(out))
        if step:
            self._alone(watch, lambda: self.call.backward(self.call.forward()))

    def _alone(self, watch: Watch, work: Callable[[], Any]) -> Any:
        def waited() -> Any:
            torch.cuda.synchronize(self.device)
            result = work()
            self.call.wait(result)
            return result

        if not self.warm_cache:
            self._other_data.zero_()
        return watch(waited)

    def _seen(self, watch: Watch) -> list[float]:
        times = [piece.queued_ms for piece in watch.seen()]
        if not times or None in times:
            raise RuntimeError(
                "the driver lets no profiler look, and nothing else sees this framework's work on the GPU"
            )
        return [one for one in times if one is not None]
