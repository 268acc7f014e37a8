"""What cases an implementation takes, as data; the first reason against a case, in one line. Imports no framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnbench.case import DTYPES, Case

DEVICES = ("cpu", "cuda")

Capability = tuple[int, int]
"""A GPU's compute capability: (9, 0) is Hopper."""


@dataclass(frozen=True)
class Ask:
    """What a backend is asked to take: a case, on a device type (`cpu`, `cuda`), with or without its backward.

    `capability` is the GPU's; None on a CPU, and where it does not matter.
    """

    case: Case
    device: str
    backward: bool = True
    capability: Capability | None = None


@dataclass(frozen=True)
class HeadDims:
    """The head dimensions that an implementation takes: from `least` to `most`, multiples of `multiple_of`.

    `only` names the few that there are. `kernels` are the sizes that its kernels are made for: any other dimension is
    filled up with zeros to the next of them, in memory or in registers. Empty where none is known.
    """

    least: int = 1
    most: int | None = None
    multiple_of: int = 1
    only: tuple[int, ...] = ()
    kernels: tuple[int, ...] = ()

    def reason_against(self, d_model: int) -> str | None:
        if self.only and d_model not in self.only:
            return f"takes head dimensions {_either(self.only)}, not {d_model}"
        if d_model < self.least:
            return f"takes head dimensions of {self.least} and more, not {d_model}"
        if self.most is not None and d_model > self.most:
            return f"takes head dimensions up to {self.most}, not {d_model}"
        if d_model % self.multiple_of:
            return f"takes head dimensions that are multiples of {self.multiple_of}, not {d_model}"
        return None

    def padded(self, d_model: int) -> int | None:
        """The size that a kernel works on in place of `d_model`; None where it is d_model itself, as far as is known."""
        size = next((size for size in self.kernels if size >= d_model), d_model)
        return size if size != d_model else None

    @property
    def words(self) -> str:
        if self.only:
            return _either(self.only)
        if self.most is None:
            bounds = "any" if self.least == 1 else f"≥ {self.least}"
        else:
            bounds = f"{self.least}–{self.most}" if self.least > 1 else f"≤ {self.most}"
        return bounds + (f", multiples of {self.multiple_of}" if self.multiple_of > 1 else "")


@dataclass(frozen=True)
class Support:
    """What an implementation takes on one type of device.

    `causal` masks are aligned to the bottom right; `causal_unequal` tells whether also where kv_len is not seq_len, and
    `blind` in which dtypes queries that then see no key get zeros, with gradients of zero. `unequal` is about kv_len that
    is not seq_len without a mask, `grouped` about fewer key heads than query heads. `capability` is the least, and
    `capability_below` the first that it no longer runs on.
    """

    dtypes: tuple[str, ...] = tuple(DTYPES)
    tf32: bool = True
    head_dims: HeadDims = HeadDims()
    full: bool = True
    causal: bool = True
    unequal: bool = True
    causal_unequal: bool = True
    blind: tuple[str, ...] = tuple(DTYPES)
    grouped: bool = True
    backward: bool = True
    capability: Capability = (0, 0)
    capability_below: Capability | None = None

    def reason_against(self, ask: Ask) -> str | None:
        """Why a case is not taken, the first reason there is; None if nothing stands in the way."""
        case, unequal = ask.case, ask.case.seq_len != ask.case.kv_len
        if ask.capability is not None and (reason := self._against_capability(ask.capability)):
            return reason
        if case.dtype not in self.dtypes:
            return f"takes {_either(self.dtypes)}, not {case.dtype}"
        if case.precision == "tf32" and (ask.device == "cpu" or not self.tf32):
            return "tf32 is a mode of CUDA's tensor cores" if ask.device == "cpu" else "takes no float32 as tf32"
        if reason := self.head_dims.reason_against(case.d_model):
            return reason
        if not case.causal and not self.full:
            return "is about the causal mask, and the case has none"
        if case.causal and not self.causal:
            return "has no causal mask"
        if unequal and not self.unequal:
            return f"takes as many keys as queries alone, not {case.kv_len} and {case.seq_len}"
        if unequal and case.causal and not self.causal_unequal:
            return f"takes a causal mask over as many keys as queries alone, not {case.kv_len} and {case.seq_len}"
        if case.masked_rows and case.dtype not in self.blind:
            return f"promises no zeros for queries that see no key, and {case.masked_rows} queries see no key"
        if case.heads != case.kv_heads and not self.grouped:
            return f"takes as many key heads as query heads alone, not {case.kv_heads} and {case.heads}"
        if ask.backward and not self.backward:
            return f"has no backward on {ask.device.upper()}; ask for the forward alone with --pass forward"
        return None

    def _against_capability(self, has: Capability) -> str | None:
        if has < self.capability:
            return f"needs a GPU of compute capability {_version(self.capability)} or more, and this one has {_version(has)}"
        if self.capability_below is not None and has >= self.capability_below:
            return (
                f"runs on GPUs of compute capability below {_version(self.capability_below)}, "
                f"and this one has {_version(has)}"
            )
        return None

    @property
    def capabilities(self) -> str:
        """The range of compute capabilities, for a table."""
        least = f"≥ {_version(self.capability)}" if self.capability > (0, 0) else ""
        below = f"< {_version(self.capability_below)}" if self.capability_below else ""
        return ", ".join(part for part in (least, below) if part) or "any"


EVERYWHERE: Mapping[str, Support] = dict.fromkeys(DEVICES, Support())
"""The support of an implementation of which nothing is known to stand in its way."""

SIXTEEN_BIT = ("float16", "bfloat16")


def _either(values: tuple[object, ...]) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} and {last}" if others else last


def _version(capability: Capability) -> str:
    return ".".join(map(str, capability))
