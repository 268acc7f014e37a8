"""Cases that one table or chart can hold: those that differ in seq_len and d_model alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from attnbench.case import Case
from attnbench.record import Record

GROUPED_BY = [name for name in Case.__dataclass_fields__ if name not in ("seq_len", "kv_len", "d_model")]
"""Fields of a case whose every combination has a section of its own; tables are over the others."""


def groups(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records by what their cases have in common, in words: `bfloat16, batch 8, 1 head, no mask`."""

    def key(record: Record) -> tuple[str, ...]:
        own_length = "" if record.kv_len == record.seq_len else str(record.kv_len)
        return (*(str(getattr(record, name)) for name in GROUPED_BY), own_length)

    return {
        _name(group[0].case): group for group in (list(found) for _, found in groupby(sorted(records, key=key), key))
    }


def _name(case: Case) -> str:
    heads = f"{case.heads} heads" if case.heads > 1 else "1 head"
    shared = f", {case.kv_heads} of keys" if case.kv_heads != case.heads else ""
    precision = f" ({case.precision})" if case.dtype == "float32" else ""
    length = f", {case.kv_len} keys" if case.kv_len != case.seq_len else ""
    mask = "causal" if case.causal else "no mask"
    return f"{case.dtype}{precision}, batch {case.batch}, {heads}{shared}{length}, {mask}"


def telling_apart(records: Sequence[Record]) -> str:
    """A condition for `--where` that leaves one of these records' groups: that of the first."""
    own = [name for name in GROUPED_BY if len({getattr(record, name) for record in records}) > 1]
    if len({record.kv_len if record.kv_len != record.seq_len else None for record in records}) > 1:
        own.append("kv_len")
    return " AND ".join(f"{name} = {_in_sql(getattr(records[0], name))}" for name in own)


def _in_sql(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value).lower()
