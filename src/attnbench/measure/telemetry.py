"""The state of a GPU while it works: its SM clock, what holds the clock down, power and temperature."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch

from attnbench import clock_events
from attnbench.measure.sampling import Reading


@cache
def monitor(device: torch.device) -> Monitor:
    """The one monitor of a device."""
    return Monitor(device)


class Monitor:
    """Reads one GPU by NVML, in some microseconds. `read` gives None on CPU and where the driver will not tell."""

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = None
        self.limit_W: float | None = None
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            # CUDA and NVML may count GPUs differently; the UUID is the same to both
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self.limit_W = pynvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1e3
            self.read()
        except Exception:  # no library, no permission, an unknown query: a cell is measured without it
            self._handle = None

    def read(self) -> Reading | None:
        if self._handle is None:
            return None
        nvml, handle = self._nvml, self._handle
        try:
            return Reading(
                at_s=time.perf_counter(),
                sm_clock_MHz=float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
                power_W=self._power_W(),
                temperature_C=float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
                clock_events=clock_events.names(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)),
            )
        except nvml.NVMLError:
            return None

    def _power_W(self) -> float:
        """Power now; `nvmlDeviceGetPowerUsage` would be a mean over the last second, most of it from before."""
        nvml = self._nvml
        (field,) = nvml.nvmlDeviceGetFieldValues(self._handle, [nvml.NVML_FI_DEV_POWER_INSTANT])
        if field.nvmlReturn != nvml.NVML_SUCCESS:
            return nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3
        return field.value.uiVal / 1e3
