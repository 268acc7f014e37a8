"""The layout of the document that attnbench began with: one backend, one table, two pivots."""

from __future__ import annotations

from collections.abc import Sequence

from attnbench.case import Case
from attnbench.errors import RequestError
from attnbench.report.tables import Table, Writer, pivot
from attnbench.store import Run


def check(backends: Sequence[str], cases: Sequence[Case]) -> None:
    """Raises `RequestError` if there are several backends, or cases that differ in more than seq_len and d_model."""
    if len(backends) > 1:
        raise RequestError(f"the seed layout shows one backend; choose by --backend one of: {', '.join(backends)}")
    for name in Case.__dataclass_fields__:
        values = {getattr(case, name) for case in cases}
        follows = name == "kv_len" and all(case.kv_len == case.seq_len for case in cases)
        if name not in ("seq_len", "d_model") and len(values) > 1 and not follows:
            shown = ", ".join(sorted(map(str, values)))
            raise RequestError(
                f"the seed layout has columns for seq_len and d_model alone, but {name} is {shown}; use --layout full"
            )


def document(run: Run, writer: Writer) -> str:
    """The seed's document, of a run that `check` has passed."""
    records = sorted(run.records, key=lambda record: (record.d_model, record.seq_len))
    columns = ("d_model", "seq_len", "forward_ms", "backward_ms", "outcome")
    table = Table([*columns[:-1], "status"], [[getattr(record, column) for column in columns] for record in records])
    return "\n".join([
        writer.heading("Attention Benchmarking Results", 1),
        "",
        "",
        writer.table(table),
        "",
        writer.text("Forward (ms/iter) by seq_len x d_model:"),
        writer.table(pivot(records, lambda record: record.forward_ms)),
        "",
        writer.text("Backward (ms/iter) by seq_len x d_model:"),
        writer.table(pivot(records, lambda record: record.backward_ms)),
    ]) + "\n"  # fmt: skip
