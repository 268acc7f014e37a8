"""The record: what came of a cell. The one schema that the store, tables and documents derive from."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from attnbench import cost
from attnbench.case import Case
from attnbench.errors import RequestError
from attnbench.schema import misfit

SCHEMA_VERSION = 1

Status = Literal["ok", "oom", "timeout", "unsupported", "incorrect", "crash", "error"]
STATUSES: tuple[Status, ...] = get_args(Status)
FAILURES: tuple[Status, ...] = ("incorrect", "crash", "error")
"""Statuses that mean something is broken, and not just that a case is too large or not for this backend."""

PASSES = ("forward", "backward", "forward_backward")
"""What is timed, as it stands in the names of fields: `forward_ms`, `backward_noise`, `forward_backward_samples_ms`."""

Phase = Literal["setup", "forward", "backward"]


def cell_id(case: Case, backend: str) -> str:
    """Unique within a run and the same in every run of the same cell."""
    return f"{case.id}.{backend}"


@dataclass(frozen=True)
class Record:
    """One cell's outcome. A field is None where nothing was measured; a unit stands in the name of each that has one.

    Times are medians over `*_samples_ms` (means under the seed's protocol); `*_iqr_ms` is the distance between the
    quartiles, `*_noise` the relative uncertainty of the median (`attnbench.measure.sampling.noise`). `device_*_ms` are
    sums of kernel times by the profiler, `watched_*_ms` what events saw of the very same calls. `call_*_ms` is the wall
    time of a call among others back to back, `graph_*_ms` replays of a CUDA graph, or `graph_reason` says why there are
    none. Errors are relative, against float64 (`attnbench.reference`). Memory is above what the process held before the
    cell's inputs existed (`attnbench.measure.memory`).

    CUDA samples are without `event_overhead_ms`, which two events see besides a kernel.

    `windows` tell how the samples came about, in order: each has its `round`, how many `samples` of each pass it gave,
    its `sm_clock_MHz`, `power_W`, `temperature_C` and `clock_events`; one that was `discarded` says why, and keeps what
    it gave under `samples_ms`.

    `padded_d_model` is the head dimension that the kernels worked on, where it is known to be another than the case's.
    """

    run_id: str
    cell_id: str
    backend: str
    device: str
    batch: int
    heads: int
    kv_heads: int
    seq_len: int
    kv_len: int
    d_model: int
    dtype: str
    precision: str
    causal: bool
    status: Status
    phase: Phase | None = None
    reason: str | None = None
    tags: tuple[str, ...] = ()
    backend_version: str | None = None
    padded_d_model: int | None = None

    forward_ms: float | None = None
    forward_iqr_ms: float | None = None
    forward_noise: float | None = None
    forward_samples_ms: tuple[float, ...] = ()
    backward_ms: float | None = None
    backward_iqr_ms: float | None = None
    backward_noise: float | None = None
    backward_samples_ms: tuple[float, ...] = ()
    forward_backward_ms: float | None = None
    forward_backward_iqr_ms: float | None = None
    forward_backward_noise: float | None = None
    forward_backward_samples_ms: tuple[float, ...] = ()
    device_forward_ms: float | None = None
    device_backward_ms: float | None = None
    watched_forward_ms: float | None = None
    watched_backward_ms: float | None = None
    call_forward_ms: float | None = None
    call_backward_ms: float | None = None
    graph_forward_ms: float | None = None
    graph_backward_ms: float | None = None
    graph_reason: str | None = None
    compile_ms: float | None = None

    mem_after_inputs_MiB: float | None = None
    mem_before_backward_MiB: float | None = None
    saved_activations_MiB: float | None = None
    forward_peak_MiB: float | None = None
    backward_peak_MiB: float | None = None

    flops_forward: int | None = None
    flops_backward: int | None = None
    floor_forward_ms: float | None = None
    floor_backward_ms: float | None = None
    limit_forward: float | None = None
    limit_backward: float | None = None
    bound_by: str | None = None
    forward_TFLOP_per_s: float | None = None
    backward_TFLOP_per_s: float | None = None

    error_out: float | None = None
    error_dq: float | None = None
    error_dk: float | None = None
    error_dv: float | None = None

    kernels_forward: tuple[str, ...] = ()
    kernels_backward: tuple[str, ...] = ()

    clock_regime: str | None = None
    event_overhead_ms: float | None = None
    windows: tuple[Mapping[str, Any], ...] = ()
    sm_clock_MHz: float | None = None
    power_W: float | None = None
    temperature_C: float | None = None
    started_at: str | None = None
    seconds: float | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def case(self) -> Case:
        return Case(**{field.name: getattr(self, field.name) for field in fields(Case)})

    @property
    def outcome(self) -> str:
        """The status as tables show it: `ok`, `oom(forward)`."""
        return f"{self.status}({self.phase})" if self.status == "oom" and self.phase else self.status

    @property
    def kept_windows(self) -> list[Mapping[str, Any]]:
        """The windows that gave the samples, without those that were discarded."""
        return [window for window in self.windows if "discarded" not in window]

    @property
    def peak_MiB(self) -> float | None:
        peaks = [peak for peak in (self.forward_peak_MiB, self.backward_peak_MiB) if peak is not None]
        return max(peaks, default=None)

    def but(self, **changes: Any) -> Record:
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Every field by its name, in the schema's order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def of(cls, case: Case, backend: str, *, run_id: str, device: str, status: Status, **outcome: Any) -> Record:
        """The record of one cell; what follows from the case alone is filled in."""
        return cls(
            run_id=run_id,
            cell_id=cell_id(case, backend),
            backend=backend,
            device=device,
            **case.to_dict(),
            status=status,
            flops_forward=cost.flops_forward(case),
            flops_backward=cost.flops_backward(case),
            **outcome,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """A record read back.

        Raises:
            RequestError: `values` are no record of this schema.
        """
        if not isinstance(values, Mapping) or "schema_version" not in values:
            raise RequestError("not a record of attnbench: it has no schema_version")
        if values["schema_version"] != SCHEMA_VERSION:
            raise RequestError(
                f"written with record schema {values['schema_version']}; this attnbench reads schema {SCHEMA_VERSION}"
            )
        known = {field.name for field in fields(cls)}
        if strange := sorted(set(values) - known):
            raise RequestError(f"a record has fields this attnbench does not know: {', '.join(strange)}")
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        try:
            record = cls(**given)
        except TypeError as error:
            raise RequestError(f"a record lacks fields: {error}") from None
        try:
            fits = record.cell_id == cell_id(record.case, record.backend)
        except TypeError:
            fits = False
        if not fits:
            raise RequestError(f"a record's cell_id, {record.cell_id!r}, is not that of its case and backend")
        if record.status not in STATUSES:
            raise RequestError(f"a record has status {record.status!r}, which is none of {', '.join(STATUSES)}")
        if wrong := misfit(record):
            raise RequestError(f"a record's {wrong}")
        return record


def summary(name: str, samples_ms: Sequence[float], *, mean: bool = False) -> dict[str, Any]:
    """The record's three fields of one timed pass: `{name}_ms`, `{name}_iqr_ms` and `{name}_samples_ms`."""
    if not samples_ms:
        return {}
    centre = statistics.fmean(samples_ms) if mean else statistics.median(samples_ms)
    return {f"{name}_ms": centre, f"{name}_iqr_ms": iqr(samples_ms), f"{name}_samples_ms": tuple(samples_ms)}


def iqr(samples: Sequence[float]) -> float | None:
    """Distance between the quartiles; None for a lone sample, which has no spread to tell of."""
    if len(samples) < 2:
        return None
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return high - low
