"""Which kernels ran, by the profiler, and how long the device spent in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")

CPU_WORK = ("aten::", "inductor::", "graph_")
"""Beginnings of the names of what does the work on a CPU: ATen's operations and compiled kernels."""

LEAST_SHARE = 0.01
"""What spent less of the time than this is not named."""


def watch(work: Callable[[], Result], device: torch.device) -> tuple[Result, tuple[str, ...], float | None]:
    """Runs `work` under the profiler.

    Returns:
        its result; the names of what ran, each once, longest first (kernels on CUDA, ATen operations on CPU); and on
        CUDA the milliseconds that the device spent in them.
    """
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        result = work()
        if cuda:
            torch.cuda.synchronize(device)
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    spent_us: dict[str, float] = {}
    for event in profiler.events() or ():
        if event.device_type == wanted and (cuda or event.name.startswith(CPU_WORK)):
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            spent_us[event.name] = spent_us.get(event.name, 0.0) + spent
    total = sum(spent_us.values())
    names = [name for name, spent in spent_us.items() if spent >= total * LEAST_SHARE]
    names.sort(key=lambda name: -spent_us[name])
    return result, tuple(names), total / 1e3 if cuda and spent_us else None
