"""What a recommendation is asked for: a shape, a pass, and what a run fills in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from attnbench.case import Case
from attnbench.errors import RequestError, unknown
from attnbench.record import Record
from attnbench.store import Run


@dataclass(frozen=True)
class Pass:
    """Where a record keeps a pass: the name of its time, the peak that has to fit, the floors that sum to its own."""

    time: str
    peak: str
    floors: tuple[str, ...] = ()

    def ms(self, record: Record) -> float | None:
        """None where the record is not right, or the pass was not timed."""
        return (getattr(record, f"{self.time}_ms") or None) if record.status == "ok" else None

    def limit(self, record: Record) -> float | None:
        """The fraction of the limit; None where a floor is not known."""
        floors, ms = [getattr(record, name) for name in self.floors], self.ms(record)
        return sum(floors) / ms if floors and ms and None not in floors else None


PASSES = {
    "forward": Pass("forward", "forward_peak_MiB", ("floor_forward_ms",)),
    "backward": Pass("backward", "peak_MiB", ("floor_backward_ms",)),
    "step": Pass("forward_backward", "peak_MiB", ("floor_forward_ms", "floor_backward_ms")),
}
"""What can be asked for; a step is a forward and its backward."""

SEED_PASSES = {"forward": Pass("forward", "forward_peak_MiB"), "step": Pass("backward", "peak_MiB")}
"""The same under the seed's protocol, whose backward is a whole step and has no fraction of the limit."""

ALIKE = ("dtype", "precision", "causal", "batch", "heads", "kv_heads")
"""Dimensions that a run must have measured: times at one value tell nothing certain of another."""


@dataclass(frozen=True)
class Wish:
    """The shape that a backend is wanted for, and how it is to be used.

    A dimension that is None is the run's own, where that has one value only; `kv_len` is `seq_len` where it is so
    throughout the run. `what` is one of `PASSES`; None is a step, and the forward of a run that timed nothing else.
    `deterministic` asks for gradients that are the same each time.

    Raises:
        RequestError: a size, dtype or precision that no case can have, or an unknown pass.
    """

    seq_len: int | None = None
    d_model: int | None = None
    kv_len: int | None = None
    batch: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    dtype: str | None = None
    precision: str | None = None
    causal: bool | None = None
    what: str | None = None
    memory_bytes: int | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        ones = dict.fromkeys(("batch", "kv_heads", "seq_len", "kv_len", "d_model"), 1)
        Case(**{**ones, "heads": max(1, self.kv_heads or 1), **self.dimensions})
        if self.what is not None and self.what not in PASSES:
            raise unknown("pass", self.what, PASSES)

    @property
    def dimensions(self) -> dict[str, Any]:
        """Those that were given."""
        given = {field.name: getattr(self, field.name) for field in fields(Case)}
        return {name: value for name, value in given.items() if value is not None}


def wished_pass(run: Run, wish: Wish) -> tuple[str, Pass]:
    passes = SEED_PASSES if run.header.request.get("protocol") == "seed" else PASSES
    timed = [name for name, one in passes.items() if any(one.ms(record) for record in run.records)]
    what = wish.what or ("forward" if timed == ["forward"] else "step")
    if what not in (timed or passes):
        raise RequestError(f"{run.directory} has no time of pass {what!r}; it has: {', '.join(timed) or 'none'}")
    return what, passes[what]


def wished_case(run: Run, wish: Wish) -> Case:
    """The wish with what it leaves open filled in from the run."""
    given, records = wish.dimensions, run.records
    if not records:
        raise RequestError(f"{run.directory} has no records yet; go on with it by attnbench run --resume")
    agreed: list[str] = []
    for name in ALIKE:
        if name not in given:
            continue
        found = [record for record in records if getattr(record, name) == given[name]]
        said = _said(name, [given[name]])
        if not found:
            beside = f" with {', '.join(agreed)}" if agreed else ""
            has = _said(name, _values(records, name))
            raise RequestError(f"{said} was not measured{beside}; {run.directory} has {has}")
        agreed.append(said)
        records = found
    open_ = {name: _values(records, name) for name in (*ALIKE, "d_model", "seq_len") if name not in given}
    of_length = [record for record in records if record.seq_len == given.get("seq_len")] or records
    if "kv_len" not in given and any(record.kv_len != record.seq_len for record in of_length):
        open_["kv_len"] = _values(of_length, "kv_len")
    if several := {name: values for name, values in open_.items() if len(values) > 1}:
        options = ["--causal or --no-causal" if name == "causal" else f"--{name.replace('_', '-')}" for name in several]
        has = "; ".join(_said(name, values) for name, values in several.items())
        raise RequestError(
            f"{run.directory} has several values of some dimensions: {has}; choose by {', '.join(options)}"
        )
    chosen = given | {name: values[0] for name, values in open_.items()}
    return Case(**{"kv_len": chosen["seq_len"]} | chosen)


def _values(records: Iterable[Record], name: str) -> list[Any]:
    return sorted({getattr(record, name) for record in records})


def _said(name: str, values: Iterable[Any]) -> str:
    """A dimension and its values in words; a mask is called what ids of cells call it."""
    words = {True: "causal", False: "full"} if name == "causal" else {}
    return f"{'mask' if name == 'causal' else name} {', '.join(str(words.get(value, value)) for value in values)}"
