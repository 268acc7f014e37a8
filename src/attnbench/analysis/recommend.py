"""The fastest right backend for a shape, by a run: read off where that was measured, interpolated where it was not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from attnbench.analysis.estimate import Error, Kind, Shape, error_like, estimate
from attnbench.analysis.snippets import snippet
from attnbench.analysis.verdict import kind as device_kind
from attnbench.analysis.verdict import noise_of
from attnbench.analysis.wish import ALIKE, Pass, Wish, wished_case, wished_pass
from attnbench.case import Case
from attnbench.errors import RequestError, printable
from attnbench.families import Determinism, determinism
from attnbench.record import Record
from attnbench.store import Run

MiB = 1 << 20


CERTAIN = 2.0
"""How many uncertainties a margin must exceed to be one."""


@dataclass(frozen=True)
class Candidate:
    """A right backend that fits, and its time: measured, or estimated from `shapes` (seq_len, d_model) in the way `kind`.

    `noise` is the relative uncertainty of `ms`, with the deviation of an estimate's errors, and None where that cannot be told;
    `limit` is the fraction of the limit. `tags` are those of every record used. `determinism` tells how its gradients
    come to be the same each time, where that was asked for; `at_least` that `ms` was taken without a setting that this
    needs, and under which the backward takes longer.
    """

    backend: str
    ms: float
    noise: float | None
    peak_MiB: float | None
    limit: float | None
    tags: tuple[str, ...]
    kind: Kind
    shapes: tuple[Shape, ...]
    error: Error | None = None
    determinism: Determinism | None = None
    at_least: bool = False

    @property
    def seq_lens(self) -> tuple[int, ...]:
        return tuple(sorted({seq_len for seq_len, _ in self.shapes}))

    @property
    def d_models(self) -> tuple[int, ...]:
        return tuple(sorted({d_model for _, d_model in self.shapes}))


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
    deterministic: bool
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
        """Whether noise may have put it behind the fastest; where the noise of either is not known, it may.

        A time that is one at the least may be longer in truth, which matters where it is the fastest's own.
        """
        noises = (self.winner.noise, candidate.noise)
        known = [noise for noise in noises if noise is not None]
        if self.winner.at_least or len(known) < len(noises):
            return True
        return self.margin(candidate) <= CERTAIN * math.hypot(*known)

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON, with the answer first."""
        second = self.runner_up
        return {
            "run": self.run,
            "case": self.case.to_dict(),
            "pass": self.what,
            "memory_MiB": self.memory_MiB,
            "deterministic": self.deterministic,
            "backend": self.winner.backend,
            "runner_up": second and second.backend,
            "margin": second and self.margin(second),
            "too_close_to_call": second and self.too_close(second),
            "measured": self.winner.kind == "measured",
            "candidates": [
                asdict(one)
                | {"seq_lens": one.seq_lens, "d_models": one.d_models}
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
    what, timed = wished_pass(run, wish)
    case = wished_case(run, wish)
    alike = [record for record in run.records if all(getattr(record, name) == getattr(case, name) for name in ALIKE)]
    usable = [record for record in alike if record.case == case]
    if not usable and case.kv_len != case.seq_len:
        raise RequestError(
            f"seq_len {case.seq_len} with kv_len {case.kv_len} was not measured at d_model {case.d_model}; "
            "only shapes with as many keys as queries are interpolated"
        )
    usable = usable or [record for record in alike if record.kv_len == record.seq_len]
    device = device_kind(run.header.request["device"])
    limit_MiB = wish.memory_bytes / MiB if wish.memory_bytes is not None else None
    names = dict.fromkeys([*run.header.request.get("backends", ()), *(record.backend for record in run.records)])
    judged = {}
    for name in names:
        records = {(one.seq_len, one.d_model): one for one in usable if one.backend == name}
        one = _within(limit_MiB, _candidate(name, records, case, timed))
        judged[name] = _reproducible(one, records, device, timed) if wish.deterministic else one
    found = sorted((one for one in judged.values() if isinstance(one, Candidate)), key=lambda one: one.ms)
    left_out = [LeftOut(name, one) for name, one in judged.items() if isinstance(one, str)]
    if not found:
        raise RequestError(f"no backend of {run.directory} is right for this and fits: {_by_reason(left_out)}")
    source = run.header.request.get("sources", {}).get(found[0].backend)
    code = snippet(found[0].backend, case, source, deterministic_on=device if wish.deterministic else None)
    return Recommendation(
        str(run.directory), case, what, limit_MiB, wish.deterministic, tuple(found), tuple(left_out), code
    )


def _by_reason(left_out: Iterable[LeftOut]) -> str:
    names: dict[str, list[str]] = {}
    for one in left_out:
        names.setdefault(one.reason, []).append(one.backend)
    return "; ".join(f"{reason} ({', '.join(own)})" for reason, own in names.items())


# --- one backend ------------------------------------------------------------------------------------------------------


def _candidate(backend: str, records: Mapping[Shape, Record], case: Case, timed: Pass) -> Candidate | str:
    """The backend as a candidate, or why it is none."""
    if not records:
        return "not measured"
    if any(d_model == case.d_model for _, d_model in records):  # those tell whether it is right there; others need not
        records = {at: one for at, one in records.items() if at[1] == case.d_model or not _unfit(one, timed)}
    made = estimate(records.keys(), (case.seq_len, case.d_model))
    if isinstance(made, str):
        return made
    used = {shape: records[shape] for shape in made.weights}
    for (seq_len, d_model), record in used.items():
        if reason := _unfit(record, timed):
            return reason if record.case == case else f"{reason} (seq_len {seq_len}, d_model {d_model})"
    times = {shape: ms for shape, record in records.items() if (ms := timed.ms(record))}
    peaks = {shape: getattr(record, timed.peak) for shape, record in used.items()}
    noise = math.hypot(*(weight * noise_of(used[shape], timed.time) for shape, weight in made.weights.items()))
    error = error_like(made.kind, times) if made.kind != "measured" else None
    known = made.kind == "measured" or error
    return Candidate(
        backend,
        made.of(times),
        math.hypot(noise, error.deviation if error else 0.0) if known else None,
        None if None in peaks.values() else made.of(peaks) if all(peaks.values()) else max(peaks.values()),
        timed.limit(next(iter(used.values()))) if made.kind == "measured" else None,
        tuple(dict.fromkeys(tag for record in used.values() for tag in record.tags)),
        made.kind,
        tuple(sorted(used)),
        error,
    )


def _reproducible(
    candidate: Candidate | str, records: Mapping[Shape, Record], device: str, timed: Pass
) -> Candidate | str:  # fmt: skip
    """The candidate if its gradients are the same each time, or can be made so; else why not."""
    if isinstance(candidate, str):
        return candidate
    kernels = [(records[shape].kernels_forward, records[shape].kernels_backward) for shape in candidate.shapes]
    found = determinism(candidate.backend, device, kernels)
    if not found.possible:
        return found.why
    return replace(candidate, determinism=found, at_least=found.by_setting and timed.time != "forward")


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
