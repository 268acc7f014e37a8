"""Why a GPU does not run at its highest clock: the reasons its driver gives, as names."""

from __future__ import annotations

CLOCK_EVENTS: dict[int, str] = {
    0x1: "gpu_idle",
    0x2: "applications_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
"""The bits of NVML's mask of clock-event reasons, under the names that `nvidia-smi` has for them."""

DISTURBING: frozenset[str] = frozenset({
    "hw_slowdown",
    "sync_boost",
    "sw_thermal_slowdown",
    "hw_thermal_slowdown",
    "hw_power_brake_slowdown",
})  # fmt: skip
"""Reasons that slow the GPU for something other than the load's own power: heat, or the world outside.

A kernel that draws the whole power limit is slowed for what it is, and its time is its time; these would pass, or
differ elsewhere.
"""


def names(bits: int) -> tuple[str, ...]:
    """The reasons in a mask of them, in the order of their bits; a bit that has no name yet is told as a number."""
    bits_set = [1 << position for position in range(bits.bit_length()) if bits >> position & 1]
    return tuple(CLOCK_EVENTS.get(bit, f"{bit:#x}") for bit in bits_set)
