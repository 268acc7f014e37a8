"""How far a measurement is from what the machine allows.

A case's floor is the least time it could take at the machine's ceilings: each of its resources (memory traffic, matrix
products, exponentials, one launch) at the highest rate that was measured for it, all of them at once, so that the one
that takes longest sets the floor. `floor / measured` is the fraction of the limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from attnbench import cost
from attnbench.case import Case
from attnbench.record import Record

MiB = 1 << 20

AS_ACCURATE: dict[tuple[str, str], dict[str, int]] = {
    ("bfloat16", "ieee"): {"bfloat16": 1, "float16": 1, "tf32": 1, "float32": 1},
    ("float16", "ieee"): {"float16": 1, "tf32": 1, "float32": 1},
    ("float32", "tf32"): {"tf32": 1, "float16": 1, "float32": 1},
    ("float32", "ieee"): {"float32": 1, "tf32": 3, "bfloat16": 3, "float16": 3},
    ("float64", "ieee"): {"float64": 1},
}
"""Arithmetic by which a case's products can be had in its accuracy class, and how many products of it each takes.

float16 has the eleven bits of significand that TensorFloat-32 has; a float32 product is three products of halves split
into a high and a low part. Whichever is fastest on a machine is the ceiling there: a floor must hold for every kernel
that passes the tolerance.
"""


@dataclass(frozen=True)
class Ceilings:
    """The highest rates measured on a machine. A rate is None, or absent from `matmul_flop_per_s`, where it is not known.

    `matmul_flop_per_s` is by arithmetic: `float32` (full products), `tf32`, `float16`, `bfloat16`, `float64`.
    `launch_ms` is the least time of one kernel, `cache_bytes` the size of the last cache before memory.
    """

    copy_bytes_per_s: float | None = None
    read_bytes_per_s: float | None = None
    exp_per_s: float | None = None
    launch_ms: float | None = None
    cache_bytes: int = 0
    matmul_flop_per_s: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Ceilings:
        """Ceilings as run.json keeps them; whatever stands beside them there is left aside."""
        return cls(**{name.name: values[name.name] for name in fields(cls) if values.get(name.name) is not None})

    @property
    def memory_bytes_per_s(self) -> float | None:
        """The faster of copying and reading alone: a case reads more than it writes, or the other way round."""
        return max((rate for rate in (self.copy_bytes_per_s, self.read_bytes_per_s) if rate), default=None)

    def matmul(self, case: Case) -> float | None:
        """FLOP/s at which products of the case's accuracy class can be had."""
        ways = AS_ACCURATE[case.dtype, case.precision]
        rates = [self.matmul_flop_per_s[name] / times for name, times in ways.items() if name in self.matmul_flop_per_s]
        return max(rates, default=None)


Terms = dict[str, float]
"""Milliseconds that each resource takes at its ceiling: `memory`, `matmul`, `exp`, `launch`."""


def _terms(case: Case, ceilings: Ceilings, flops: float, bytes_: float, exps: float, cached: bool) -> Terms:
    if cached:  # what the call before left in the cache need not come from memory
        bytes_ = max(0.0, bytes_ - ceilings.cache_bytes)
    amounts = {
        "memory": (bytes_, ceilings.memory_bytes_per_s),
        "matmul": (flops, ceilings.matmul(case)),
        "exp": (exps, ceilings.exp_per_s),
    }
    terms = {name: amount / rate * 1e3 for name, (amount, rate) in amounts.items() if rate}
    return terms | ({"launch": ceilings.launch_ms} if ceilings.launch_ms else {})


def forward_terms(case: Case, ceilings: Ceilings, *, cached: bool = False) -> Terms:
    return _terms(
        case, ceilings, cost.flops_forward(case), cost.bytes_forward(case), cost.exps_forward(case), cached
    )  # fmt: skip


def backward_terms(case: Case, ceilings: Ceilings, *, keeps_scores: bool = False, cached: bool = False) -> Terms:
    """The backward's; for an implementation that `keeps_scores`, as its forward left them.

    That one need not take the scores' product and exponentials again, four products of five being left, but reads a
    matrix of them.
    """
    if not keeps_scores:
        return _terms(
            case, ceilings, cost.flops_backward(case), cost.bytes_backward(case), cost.exps_backward(case), cached
        )  # fmt: skip
    kept = cost.pairs(case) * case.element_bytes
    return _terms(case, ceilings, cost.flops_backward(case) * 4 / 5, cost.bytes_backward(case) + kept, 0, cached)


def keeps_scores(record: Record) -> bool:
    """Whether the forward left a matrix of scores for the backward, by what its activations take.

    Where that was not measured the lower of the two floors is the safe one, and it is assumed so.
    """
    if record.saved_activations_MiB is None:
        return True
    return record.saved_activations_MiB * MiB >= cost.pairs(record.case) * record.case.element_bytes


def judged(record: Record, ceilings: Ceilings | None, *, warm_cache: bool = False) -> Record:
    """The record with its floors, fractions of the limit, TFLOP/s and `bound_by`, the resource that bounds the step.

    A floor is the case's; it stands in records without a time, too. Under the seed's protocol, whose passes are other
    ones, there are no fractions.
    """
    if ceilings is None:
        return record
    case, cached = record.case, warm_cache or record.device == "cpu"
    forward = forward_terms(case, ceilings, cached=cached)
    backward = backward_terms(case, ceilings, keeps_scores=keeps_scores(record), cached=cached)
    floors = {"forward": max(forward.values(), default=None), "backward": max(backward.values(), default=None)}
    whole = {name: forward[name] + backward[name] for name in forward} if record.backward_ms is not None else forward
    changes: dict[str, Any] = {"bound_by": max(whole, key=lambda name: whole[name]) if whole else None}
    for name, floor in floors.items():
        measured = getattr(record, f"{name}_ms")
        changes[f"floor_{name}_ms"] = floor
        if measured:
            changes[f"limit_{name}"] = floor / measured if floor else None
            changes[f"{name}_TFLOP_per_s"] = getattr(record, f"flops_{name}") / measured / 1e9
    return record.but(**changes)
