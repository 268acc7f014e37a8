"""What is known of families of kernels: how their names tell them, and whether their gradients are the same each time.

Knows no framework."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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


# --- determinism ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Determinism:
    """Whether a backward gives the same gradients each time on one machine, and why.

    `by_setting` tells that it does so only under `torch.use_deterministic_algorithms(True)`, where other, slower code
    runs than what was timed without.
    """

    possible: bool
    by_setting: bool
    why: str


_UNKNOWN = Determinism(False, False, "whether its gradients are the same each time is not known")
_ATOMICS = Determinism(False, False, "its backward adds up dq by atomics, in any order")
_SWITCHED = Determinism(True, False, "it asks its package for a deterministic backward")
_TENSORS = Determinism(True, False, "matrix products, softmax and sums, all of them in a fixed order")

_ONE_PROGRAM = Determinism(True, False, "each block of dq, dk and dv is written by one program, without atomics")

DETERMINISM: dict[str, Determinism] = {
    "naive": _TENSORS,
    "eager": _TENSORS,
    "compile": _TENSORS,
    "sdpa-math": _TENSORS,
    "sdpa-flash": Determinism(
        True, True, "its backward adds up dq by atomics, but in a fixed order under torch.use_deterministic_algorithms"
    ),
    "sdpa-efficient": Determinism(
        True, True, "its backward splits keys, but does not under torch.use_deterministic_algorithms"
    ),
    "sdpa-cudnn": Determinism(
        False,
        False,
        "cuDNN's backward is not deterministic; PyTorch takes no cuDNN attention when asked for one that is",
    ),
    "flex": _ONE_PROGRAM,
    "flex-causal-score": _ONE_PROGRAM,
    "attnbench": _ONE_PROGRAM,
    "flash-attn-2": _ATOMICS,
    "flash-attn-2-deterministic": _SWITCHED,
    "flash-attn-3": _ATOMICS,
    "flash-attn-3-deterministic": _SWITCHED,
    "flash-attn-4": _ATOMICS,
    "flash-attn-4-deterministic": _SWITCHED,
    "cudnn-frontend": Determinism(False, False, "cuDNN's backward is not deterministic unless asked to be"),
    "cudnn-frontend-deterministic": _SWITCHED,
}
"""By backend, on CUDA; docs/backends.md has the sources. Of the others nothing is known."""

_ON_CPU = Determinism(True, False, "on a CPU each head is one thread's work, in a fixed order")
FIXED_ON_CPU = {"naive", "eager", "compile", "sdpa", "sdpa-math", "sdpa-flash", "flex", "flex-causal-score"}
"""Backends that run on a CPU and have a fixed order of work there."""


def determinism(backend: str, device: str, kernels: Iterable[tuple[tuple[str, ...], tuple[str, ...]]]) -> Determinism:
    """What is known of a backend on a device type. `kernels` are those of its records, of forward and backward.

    They tell which kernel `sdpa` chose; where that is another one for each record, or no name tells, nothing is known.
    """
    if device == "cpu":
        return _ON_CPU if backend in FIXED_ON_CPU else _UNKNOWN
    if backend != "sdpa":
        return DETERMINISM.get(backend, _UNKNOWN)
    chosen = {family(forward + backward) for forward, backward in kernels}
    name = f"sdpa-{chosen.pop()}" if len(chosen) == 1 else None
    found = DETERMINISM.get(name or "", _UNKNOWN)
    if name == "sdpa-cudnn":
        return Determinism(
            False, False, "it chose cuDNN, whose place another kernel takes under the setting; that was not timed"
        )
    return found
