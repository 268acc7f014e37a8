"""Memory of one cell, phase by phase, in a pass of its own on fresh inputs.

Every figure is above the base: what the process held just before the inputs were made. On CUDA it comes from PyTorch's
caching allocator, on CPU from the process's resident set, whose peak the kernel can be told to forget (Linux).
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

MiB = 1 << 20


class Probe(Protocol):
    """Where a process's memory can be read."""

    def settle(self) -> None:
        """Gives back what is free, so that the next reading holds what is live."""
        ...

    def forget_peak(self) -> None: ...

    def now_bytes(self) -> int: ...

    def peak_bytes(self) -> int: ...


@dataclass(frozen=True)
class AllocatorProbe:
    """PyTorch's CUDA allocator: bytes in live tensors and workspaces."""

    device: torch.device

    def settle(self) -> None:
        gc.collect()
        torch.cuda.synchronize(self.device)

    def forget_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def now_bytes(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak_bytes(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


class ResidentProbe:
    """The resident set of this process on Linux: pages in memory, and their peak since it was last forgotten."""

    _STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self) -> None:
        self._trim = ctypes.CDLL(None).malloc_trim if hasattr(ctypes.CDLL(None), "malloc_trim") else None
        self.forget_peak()

    def settle(self) -> None:
        gc.collect()
        if self._trim is not None:
            self._trim(0)  # glibc keeps freed pages for itself unless told

    def forget_peak(self) -> None:
        self._CLEAR.write_text("5")

    def now_bytes(self) -> int:
        return self._read("VmRSS")

    def peak_bytes(self) -> int:
        return self._read("VmHWM")

    def _read(self, key: str) -> int:
        for line in self._STATUS.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) << 10
        raise OSError(f"{self._STATUS} has no {key}")


def probe(device: torch.device) -> Probe | None:
    """The probe for a device; None where this system has no way to tell."""
    if device.type == "cuda":
        return AllocatorProbe(device)
    try:
        return ResidentProbe() if sys.platform == "linux" else None
    except OSError:
        return None  # a sandbox may refuse clear_refs


class Ledger:
    """Reads a probe at the borders of a cell's phases.

    `mem_after_inputs`: q, k, v and the output's gradient. `forward_peak`, `backward_peak`: the most that was held at
    once during the phase, inputs included. `mem_before_backward`: what is held between the two, and
    `saved_activations`: how much of that the forward left behind, the output included. All in MiB above the base.
    """

    def __init__(self, probe: Probe | None) -> None:
        self._probe = probe
        self.fields: dict[str, float] = {}
        if self._probe:
            self._probe.settle()
            self._base = self._probe.now_bytes()

    def after_inputs(self) -> None:
        if self._probe:
            self._probe.settle()  # inputs that were laid out anew have left their first form behind
        self._note("mem_after_inputs_MiB", lambda probe: probe.now_bytes())
        self._forget()

    def after_forward(self) -> None:
        self._note("forward_peak_MiB", lambda probe: probe.peak_bytes())
        if self._probe:
            self._probe.settle()
        self._note("mem_before_backward_MiB", lambda probe: probe.now_bytes())
        if self.fields:
            self.fields["saved_activations_MiB"] = (
                self.fields["mem_before_backward_MiB"] - self.fields["mem_after_inputs_MiB"]
            )
        self._forget()

    def after_backward(self) -> None:
        self._note("backward_peak_MiB", lambda probe: probe.peak_bytes())

    def _note(self, name: str, read: Callable[[Probe], int]) -> None:
        if self._probe:
            self.fields[name] = max(0, read(self._probe) - self._base) / MiB

    def _forget(self) -> None:
        if self._probe:
            self._probe.forget_peak()
