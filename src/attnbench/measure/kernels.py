"""Which kernels ran, by the profiler, and how long the device spent in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

CPU_WORK = ("aten::", "inductor::", "graph_")
"""Beginnings of the names of what does the work on a CPU: ATen's operations and compiled kernels."""

LEAST_SHARE = 0.01
"""What spent less of the time than this is not named."""


@dataclass(frozen=True)
class Seen:
    """What ran between two marks: names, each once, longest first, and the milliseconds the device spent in it."""

    names: tuple[str, ...]
    device_ms: float | None


class Watch:
    """Profiles some pieces of work in one session: kernels on CUDA, ATen's operations on CPU.

    Call it with each piece in turn; `seen` tells of them in the same order. On CUDA a spin kernel marks the borders.
    """

    _MARK = "spin_kernel"

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._borders_us: list[float] = []
        self._profiler = profile(activities=[ProfilerActivity.CUDA if self._cuda else ProfilerActivity.CPU])

    def __enter__(self) -> Watch:
        self._profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profiler.__exit__(*error)

    def __call__(self, work: Callable[[], Any]) -> Any:
        with torch.profiler.record_function("attnbench::border"):
            if self._cuda:
                torch.cuda._sleep(1)
        result = work()
        if self._cuda:
            torch.cuda.synchronize(self._device)
        return result

    def seen(self) -> list[Seen]:
        """One entry for each piece of work; to be asked after the session has ended."""
        pieces: list[list[tuple[str, float]]] = []
        for event in sorted(self._profiler.events() or (), key=lambda event: event.time_range.start):
            if event.name == "attnbench::border" if not self._cuda else self._MARK in event.name:
                pieces.append([])
            elif pieces and self._cuda and event.device_type == DeviceType.CUDA:
                pieces[-1].append((event.name, event.self_device_time_total))
            elif pieces and not self._cuda and event.name.startswith(CPU_WORK):
                pieces[-1].append((event.name, event.self_cpu_time_total))
        return [self._summed(piece) for piece in pieces]

    def _summed(self, piece: list[tuple[str, float]]) -> Seen:
        spent_us: dict[str, float] = {}
        for name, spent in piece:
            spent_us[name] = spent_us.get(name, 0.0) + spent
        total = sum(spent_us.values())
        names = [name for name, spent in spent_us.items() if spent >= total * LEAST_SHARE]
        return Seen(
            tuple(sorted(names, key=lambda name: -spent_us[name])), total / 1e3 if self._cuda and total else None
        )
