"""The state of a GPU while it works."""

from __future__ import annotations

import torch


def read(device: torch.device) -> dict[str, float]:
    """SM clock, power and temperature now, as fields of a record; empty on CPU and where the driver will not tell."""
    if device.type != "cuda":
        return {}
    try:
        return {
            "sm_clock_MHz": float(torch.cuda.clock_rate(device)),
            "power_W": torch.cuda.power_draw(device) / 1e3,
            "temperature_C": float(torch.cuda.temperature(device)),
        }
    except Exception:  # a driver that refuses a query must not cost the cell its times
        return {}
