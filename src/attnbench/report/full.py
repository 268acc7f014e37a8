"""The full layout: the machine, every backend's cells, and what they come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from attnbench.families import family
from attnbench.record import Record
from attnbench.report.groups import GROUPED_BY, groups
from attnbench.report.preface import machine, summary
from attnbench.report.tables import Table, Writer, pivot
from attnbench.store import Run

BASELINE = "eager"

KERNELS = ("kernels_forward", "kernels_backward")

NOT_A_COLUMN = {
    *("run_id", "cell_id", "schema_version", "device", "status", "phase", "started_at", *KERNELS, *GROUPED_BY),
    *("windows", "clock_regime", "event_overhead_ms"),
}
"""Fields that the table of cells leaves out: the same throughout the section, or shown in another form."""


def document(run: Run, writer: Writer) -> str:
    """The report of a run, finished or not."""
    order = {name: index for index, name in enumerate(run.header.request["backends"])}
    ordered = sorted(run.records, key=lambda record: order.get(record.backend, len(order)))
    parts = [writer.heading("Attention benchmark", 1), *machine(run, writer), *summary(run, writer)]
    for name, records in groups(ordered).items():
        parts.append(writer.heading(name, 2))
        parts += _fastest(records, writer)
        parts += [writer.heading("Cells", 3), writer.table(_cells(records))]
        parts += _frontier(records, writer)
        parts += _choices(records, writer)
        parts += _speed_up(records, writer)
        parts += _limits(records, writer)
        parts += _launch_bound(records, writer)
        parts += _pivots(records, writer)
        parts += _kernels(records, writer)
    return "\n\n".join(parts) + "\n"


def _by_backend(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.backend, []).append(record)
    return found


def _cells(records: Sequence[Record]) -> Table:
    """Every cell; the record's columns but for raw samples, for what the section has in common and for what is empty."""
    names = [
        name for name in Record.__dataclass_fields__ if name not in NOT_A_COLUMN and not name.endswith("_samples_ms")
    ]
    if all(record.kv_len == record.seq_len for record in records):
        names.remove("kv_len")
    first = ["backend", "d_model", "seq_len", "outcome", "forward_ms", "backward_ms", "forward_backward_ms"]
    names = first + [name for name in names if name not in first]
    order = {name: index for index, name in enumerate(_by_backend(records))}
    ordered = sorted(records, key=lambda record: (record.d_model, record.seq_len, record.kv_len, order[record.backend]))
    headers = ["status" if name == "outcome" else name for name in names]
    return Table(
        headers, [[_cell(getattr(record, name)) for name in names] for record in ordered]
    ).without_empty_columns()


def _cell(value: Any) -> Any:
    if isinstance(value, tuple):
        return ", ".join(value)
    return f"{value:.1e}" if isinstance(value, float) and 0 < abs(value) < 1e-3 else value


def _fastest(records: Sequence[Record], writer: Writer) -> list[str]:
    """The backend with the least time for each shape, of those that were right; forward / backward."""
    if len(_by_backend(records)) < 2:
        return []
    best: dict[tuple[int, int], list[Record]] = {}
    for record in records:
        if record.status == "ok":
            best.setdefault((record.seq_len, record.d_model), []).append(record)

    def names(record: Record) -> str | None:
        right = best.get((record.seq_len, record.d_model), [])
        passes = [[r for r in right if getattr(r, name) is not None] for name in ("forward_ms", "backward_ms")]
        timed = zip(passes, ("forward_ms", "backward_ms"), strict=True)
        return " / ".join(min(own, key=lambda r: getattr(r, name)).backend for own, name in timed if own) or None

    return [
        writer.heading("Fastest", 3),
        writer.text("Forward / backward, by seq_len and d_model, whatever the margin."),
        writer.table(pivot(records, names)),
    ]


def _frontier(records: Sequence[Record], writer: Writer) -> list[str]:
    return [
        writer.heading("How far each got", 3),
        writer.text("The largest seq_len that ran, by d_model, and what stopped the next."),
        writer.table(frontier(records)),
    ]


def frontier(records: Sequence[Record]) -> Table:
    """The largest seq_len that ran, per backend and d_model, and what stopped the next."""
    widths = sorted({record.d_model for record in records})
    largest = max(record.seq_len for record in records)

    def reached(own: Sequence[Record], width: int) -> str | None:
        of_width = [record for record in own if record.d_model == width]
        lengths = [record.seq_len for record in of_width if record.status == "ok"]
        failed = [record for record in of_width if record.status != "ok"]
        if not lengths:
            return failed[0].outcome if failed else None
        beyond = min(
            (record for record in failed if record.seq_len > max(lengths)), key=lambda r: r.seq_len, default=None
        )
        return str(max(lengths)) + (
            f", then {beyond.outcome}" if beyond else " (all)" if max(lengths) == largest else ""
        )

    rows = [[name, *(reached(own, width) for width in widths)] for name, own in _by_backend(records).items()]
    return Table(["backend", *map(str, widths)], rows)


def _choices(records: Sequence[Record], writer: Writer) -> list[str]:
    """Which kernel family ran where the backend left the choice to a dispatcher."""
    chosen = [record for record in records if record.backend == "sdpa" and record.status == "ok"]
    if not any(family(record.kernels_forward) for record in chosen):
        return []
    return [
        writer.heading("What sdpa chose", 3),
        writer.table(pivot(chosen, lambda record: family(record.kernels_forward))),
    ]


def _speed_up(records: Sequence[Record], writer: Writer) -> list[str]:
    """Times of the baseline over those of each backend, where both ran."""
    backends = _by_backend(records)
    base = {(record.seq_len, record.d_model): record for record in backends.get(BASELINE, ())}
    lengths, widths = (sorted({getattr(record, name) for record in records}) for name in ("seq_len", "d_model"))

    def ratios(record: Record | None) -> str | None:
        reference = base.get((record.seq_len, record.d_model)) if record else None
        if not record or not reference or not record.forward_ms or not reference.forward_ms:
            return None
        shown = f"{reference.forward_ms / record.forward_ms:.2f}"
        if record.backward_ms and reference.backward_ms:
            shown += f" / {reference.backward_ms / record.backward_ms:.2f}"
        return shown

    rows = []
    for name, own in backends.items():
        by_shape = {(record.seq_len, record.d_model): record for record in own}
        for length in lengths:
            row = [ratios(by_shape.get((length, width))) for width in widths]
            if name != BASELINE and any(row):
                rows.append([name, length, *row])
    if not rows:
        return []
    return [
        writer.heading(f"Speed-up over {BASELINE}", 3),
        writer.text("Forward / backward, by d_model; above 1 is faster."),
        writer.table(Table(["backend", "seq_len", *map(str, widths)], rows)),
    ]


def _limits(records: Sequence[Record], writer: Writer) -> list[str]:
    """The fraction of the hardware's limit that each backend reached, and what bounds each shape."""
    timed = [record for record in records if record.limit_forward is not None]
    if not timed:
        return []

    def percent(record: Record) -> str:
        reached = [part for part in (record.limit_forward, record.limit_backward) if part is not None]
        return " / ".join(f"{part:.1%}" for part in reached)

    parts = [
        writer.heading("Fraction of the limit", 3),
        writer.text("Floor over measured time, forward / backward, by seq_len and d_model. What bounds the step:"),
        writer.table(pivot(timed, lambda record: record.bound_by)),
    ]
    for name, own in _by_backend(timed).items():
        parts += [writer.text(f"{name}:"), writer.table(pivot(own, percent))]
    return parts


def _launch_bound(records: Sequence[Record], writer: Writer) -> list[str]:
    """Cells whose calls wait for the host: the time of a call beside the device's own."""
    fields = ("call_forward_ms", "device_forward_ms", "call_backward_ms", "device_backward_ms")
    bound = [record for record in records if "launch_bound" in record.tags]
    if not bound:
        return []
    rows = [
        [record.seq_len, record.d_model, record.backend, *(getattr(record, name) for name in fields), "launch_bound"]
        for record in sorted(bound, key=lambda record: (record.seq_len, record.d_model))
    ]
    return [
        writer.heading("Launch-bound cells", 3),
        writer.text("A call among others back to back, host included, beside the sum of its kernels' times."),
        writer.table(Table(["seq_len", "d_model", "backend", *fields, "tag"], rows)),
    ]


def _kernels(records: Sequence[Record], writer: Writer) -> list[str]:
    """The kernel that took the longest, and in how many cells."""
    rows = []
    for name, own in _by_backend(records).items():
        for field in KERNELS:
            longest = Counter(getattr(record, field)[0] for record in own if getattr(record, field))
            rows += [[name, field.removeprefix("kernels_"), _short(kernel), n] for kernel, n in longest.most_common(3)]
    if not rows:
        return []
    return [
        writer.heading("What ran", 3),
        writer.text("The kernels that most often took the longest; the records name all."),
        writer.table(Table(["backend", "pass", "kernel", "cells"], rows)),
    ]


def _short(kernel: str, most: int = 90) -> str:
    return kernel if len(kernel) <= most else kernel[: most - 1] + "…"


PIVOTS: dict[str, Callable[[Record], float | None]] = {
    "Forward (ms)": lambda record: record.forward_ms,
    "Backward (ms)": lambda record: record.backward_ms,
    "Peak memory (MiB)": lambda record: record.peak_MiB,
}


def _pivots(records: Sequence[Record], writer: Writer) -> list[str]:
    parts = []
    for title, value in PIVOTS.items():
        found = [
            (name, own)
            for name, own in _by_backend(records).items()
            if any(value(record) is not None for record in own)
        ]
        if found:
            parts.append(writer.heading(f"{title} by seq_len and d_model", 3))
        for name, own in found:

            def shown(record: Record, value: Callable[[Record], float | None] = value) -> str:
                number = value(record)
                return record.outcome if number is None else f"{number:.6g}"

            table = pivot(own, shown)
            parts += [writer.text(f"{name}:"), writer.table(table)]
    return parts
