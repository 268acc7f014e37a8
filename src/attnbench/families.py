"""What kernel names tell. Knows no framework."""

from __future__ import annotations

FAMILIES = {
    "cudnn": "cudnn",
    "flash": "flash",
    "fmha": "efficient",
    "efficient": "efficient",
    "softmax": "math",
}
"""What a kernel's name holds, and the family of attention kernels that this tells of; the first that fits."""


def family(kernels: tuple[str, ...]) -> str | None:
    """The family of attention kernels that ran: `flash`, `cudnn`, `efficient` or `math`; None if no name tells."""
    for part, found in FAMILIES.items():
        if any(part in kernel.lower() for kernel in kernels):
            return found
    return None
