"""The fastest right backend for a shape, by a run: read off where that was measured, interpolated where it was not."""

from __future__ import annotations

import math
import statistics
from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from attnbench.analysis.snippets import snippet
from attnbench.analysis.verdict import noise_of
from attnbench.case import Case
from attnbench.errors import RequestError, printable, unknown
from attnbench.record import Record
from attnbench.store import Run

MiB = 1 << 20


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

FARTHEST = 2
"""By what factor a seq_len may lie outside those that were measured."""

CERTAIN = 2.0
"""How many uncertainties a margin must exceed to be one."""


@dataclass(frozen=True)
class Wish:
    """The shape that a backend is wanted for, and how it is to be used.

    A dimension that is None is the run's own, where that has one value only; `kv_len` is `seq_len` where it is so
    throughout the run. `what` is one of `PASSES`; None is a step, and the forward of a run that timed nothing else.

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


@dataclass(frozen=True)
class Error:
    """How far interpolation missed the times of `lengths` measured seq_len, each predicted from those beside it."""

    median: float
    maximum: float
    lengths: int


@dataclass(frozen=True)
class Candidate:
    """A right backend that fits, and its time: measured at one of `seq_lens`, or a power law through two.

    `d_model` is that of the measurements; one larger than the case's stands in for it. `noise` is the relative
    uncertainty of `ms`, with an estimate's median error, and None where that cannot be told; `limit` is the fraction of
    the limit. `tags` are those of every record used.
    """

    backend: str
    ms: float
    noise: float | None
    peak_MiB: float | None
    limit: float | None
    tags: tuple[str, ...]
    d_model: int
    seq_lens: tuple[int, ...]
    error: Error | None = None


@dataclass(frozen=True)
class LeftOut:
    """A backend that takes no part, and why."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Recommendation:
    """The candidates for a case, the fastest first, those left out, and the code that calls the fastest."""

    run: str
    case: Case
    what: str
    memory_MiB: float | None
    candidates: Sequence[Candidate]
    left_out: Sequence[LeftOut]
    snippet: str

    @property
    def winner(self) -> Candidate:
        return self.candidates[0]

    @property
    def runner_up(self) -> Candidate | None:
        return self.candidates[1] if len(self.candidates) > 1 else None

    def margin(self, candidate: Candidate) -> float:
        """By how much it is slower than the fastest, relatively."""
        return candidate.ms / self.winner.ms - 1

    def too_close(self, candidate: Candidate) -> bool:
        """Whether noise may have put it behind the fastest; where the noise of either is not known, it may."""
        noises = (self.winner.noise, candidate.noise)
        known = [noise for noise in noises if noise is not None]
        return len(known) < len(noises) or self.margin(candidate) <= CERTAIN * math.hypot(*known)

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON, with the answer first."""
        second = self.runner_up
        return {
            "run": self.run,
            "case": self.case.to_dict(),
            "pass": self.what,
            "memory_MiB": self.memory_MiB,
            "backend": self.winner.backend,
            "runner_up": second and second.backend,
            "margin": second and self.margin(second),
            "too_close_to_call": second and self.too_close(second),
            "measured": self.winner.seq_lens == (self.case.seq_len,) and self.winner.d_model == self.case.d_model,
            "candidates": [
                asdict(one)
                | {"margin": self.margin(one), "too_close_to_call": one is not self.winner and self.too_close(one)}
                for one in self.candidates
            ],
            "left_out": [asdict(one) for one in self.left_out],
            "snippet": self.snippet,
        }  # fmt: skip


def recommend(run: Run, wish: Wish) -> Recommendation:
    """The fastest backend of a run that is right for a shape and fits.

    Raises:
        RequestError: the wish leaves open what the run has several of, or asks for what it did not measure and cannot
            be interpolated, or no backend is right and fits.
    """
    what, timed = _pass(run, wish)
    case = _case(run, wish)
    alike = [record for record in run.records if all(getattr(record, name) == getattr(case, name) for name in ALIKE)]
    usable = [record for record in alike if record.case == case]
    if not usable and case.kv_len != case.seq_len:
        raise RequestError(
            f"seq_len {case.seq_len} with kv_len {case.kv_len} was not measured at d_model {case.d_model}; "
            "only shapes with as many keys as queries are interpolated"
        )
    usable = usable or [record for record in alike if record.kv_len == record.seq_len]
    limit_MiB = wish.memory_bytes / MiB if wish.memory_bytes is not None else None
    names = dict.fromkeys([*run.header.request.get("backends", ()), *(record.backend for record in run.records)])
    judged = {
        name: _within(limit_MiB, _candidate(name, [one for one in usable if one.backend == name], case, timed))
        for name in names
    }
    found = sorted((one for one in judged.values() if isinstance(one, Candidate)), key=lambda one: one.ms)
    left_out = [LeftOut(name, one) for name, one in judged.items() if isinstance(one, str)]
    if not found:
        raise RequestError(f"no backend of {run.directory} is right for this and fits: {_by_reason(left_out)}")
    source = run.header.request.get("sources", {}).get(found[0].backend)
    code = snippet(found[0].backend, case, source)
    return Recommendation(str(run.directory), case, what, limit_MiB, tuple(found), tuple(left_out), code)


def _by_reason(left_out: Iterable[LeftOut]) -> str:
    names: dict[str, list[str]] = {}
    for one in left_out:
        names.setdefault(one.reason, []).append(one.backend)
    return "; ".join(f"{reason} ({', '.join(own)})" for reason, own in names.items())


# --- what is asked ----------------------------------------------------------------------------------------------------


def _pass(run: Run, wish: Wish) -> tuple[str, Pass]:
    passes = SEED_PASSES if run.header.request.get("protocol") == "seed" else PASSES
    timed = [name for name, one in passes.items() if any(one.ms(record) for record in run.records)]
    what = wish.what or ("forward" if timed == ["forward"] else "step")
    if what not in (timed or passes):
        raise RequestError(f"{run.directory} has no time of pass {what!r}; it has: {', '.join(timed) or 'none'}")
    return what, passes[what]


def _case(run: Run, wish: Wish) -> Case:
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


# --- one backend ------------------------------------------------------------------------------------------------------


def _candidate(backend: str, records: Sequence[Record], case: Case, timed: Pass) -> Candidate | str:
    """The backend as a candidate, or why it is none. Kernels pad d_model up: the next larger one may stand in."""
    if not records:
        return "not measured"
    d_model = min((record.d_model for record in records if record.d_model >= case.d_model), default=None)
    if d_model is None:
        return f"d_model {case.d_model} is above the largest measured, {max(record.d_model for record in records)}"
    by_length = {record.seq_len: record for record in records if record.d_model == d_model}
    lengths = _lengths_for(case.seq_len, sorted(by_length))
    if isinstance(lengths, str):
        return lengths
    used = [by_length[length] for length in lengths]
    for record in used:
        if reason := _unfit(record, timed):
            return reason if record.case == case else f"{reason} (seq_len {record.seq_len}, d_model {record.d_model})"
    weights = _weights(lengths, case.seq_len)
    times, peaks = [timed.ms(record) or 0.0 for record in used], [getattr(record, timed.peak) for record in used]
    noise = math.hypot(*(weight * noise_of(record, timed.time) for weight, record in zip(weights, used, strict=True)))
    candidate = Candidate(
        backend,
        _power_law(weights, times),
        noise,
        None if None in peaks else _power_law(weights, peaks) if all(peaks) else max(peaks),
        timed.limit(used[0]) if used[0].case == case else None,
        tuple(dict.fromkeys(tag for record in used for tag in record.tags)),
        d_model,
        lengths,
    )
    if len(lengths) == 1:
        return candidate
    error = _left_one_out({length: timed.ms(by_length[length]) for length in sorted(by_length)})
    return replace(candidate, noise=math.hypot(noise, error.median) if error else None, error=error)


def _lengths_for(seq_len: int, measured: Sequence[int]) -> tuple[int, ...] | str:
    """The measured length itself, or the two to draw a line through, or why there are none; `measured` ascends.

    Outside, the two must lie at least as far apart as the line is drawn on, or it would go where noise points.
    """
    if seq_len in measured:
        return (seq_len,)
    shortest, longest = measured[0], measured[-1]
    if seq_len > FARTHEST * longest:
        return f"seq_len {seq_len} is more than {FARTHEST} times the longest measured, {longest}"
    if FARTHEST * seq_len < shortest:
        return f"seq_len {seq_len} is less than 1/{FARTHEST} of the shortest measured, {shortest}"
    above = bisect(measured, seq_len)
    if 0 < above < len(measured):
        return measured[above - 1], measured[above]
    if above:
        pairs = [(length, longest) for length in reversed(measured) if length * seq_len <= longest**2]
    else:
        pairs = [(shortest, length) for length in measured if length * seq_len >= shortest**2]
    return pairs[0] if pairs else f"no two lengths are measured that lie far enough apart to extrapolate to {seq_len}"


def _weights(lengths: Sequence[int], seq_len: int) -> tuple[float, ...]:
    """How much the logarithm of each length's time counts at `seq_len`."""
    if len(lengths) == 1:
        return (1.0,)
    share = math.log(seq_len / lengths[0]) / math.log(lengths[1] / lengths[0])
    return 1 - share, share


def _power_law(weights: Iterable[float], values: Iterable[float]) -> float:
    return math.prod(value**weight for weight, value in zip(weights, values, strict=True))


def _left_one_out(times: Mapping[int, float | None]) -> Error | None:
    """The error of interpolating `times` (ms by seq_len, ascending); None where no three in a row are known."""
    points = list(times.items())
    errors = [
        abs(_power_law(_weights((low, high), middle), (before, after)) / true - 1)
        for (low, before), (middle, true), (high, after) in zip(points, points[1:], points[2:], strict=False)
        if before and true and after
    ]
    return Error(statistics.median(errors), max(errors), len(errors)) if errors else None


def _unfit(record: Record, timed: Pass) -> str | None:
    """Why nothing follows from a record; None if something does."""
    if record.status != "ok":
        return ": ".join(filter(None, (record.outcome, printable(record.reason or ""))))
    return None if timed.ms(record) else "this pass was not timed"


def _within(limit_MiB: float | None, candidate: Candidate | str) -> Candidate | str:
    """The candidate if it fits; else, as of those that were none to begin with, the reason."""
    if limit_MiB is None or isinstance(candidate, str):
        return candidate
    if candidate.peak_MiB is None:
        return "its memory was not measured, so it may not fit"
    if candidate.peak_MiB > limit_MiB:
        over = candidate.peak_MiB - limit_MiB
        return f"its peak of {candidate.peak_MiB:.6g} MiB is {over:.4g} MiB above the {limit_MiB:.6g} MiB there are"
    return candidate
