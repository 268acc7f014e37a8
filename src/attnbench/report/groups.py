"""Cases that one table or chart can hold: those that differ in seq_len and d_model alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, TypeVar

from attnbench.case import Case
from attnbench.errors import RequestError
from attnbench.record import Record
from attnbench.store import Run

AnyRun = TypeVar("AnyRun", bound=Run)

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


def only(run: AnyRun, chosen: Mapping[str, Any]) -> AnyRun:
    """The run with those cells alone whose dimensions are `chosen`; None chooses nothing.

    Raises:
        RequestError: there is none, with the values that there are.
    """
    records = run.records
    for name, value in chosen.items():
        if value is None:
            continue
        found = [record for record in records if getattr(record, name) == value]
        if not found:
            has = ", ".join(sorted({str(getattr(record, name)) for record in records})) or "no records"
            raise RequestError(
                f"no cell of {run.directory} has {name} {value}; among those asked for there is {name} {has}"
            )
        records = found
    return replace(run, records=records)


def options_between(records: Sequence[Record]) -> list[str]:
    """The options of the command line that choose between these records' groups."""
    several = [name for name in GROUPED_BY if len({getattr(record, name) for record in records}) > 1]
    if len({record.kv_len if record.kv_len != record.seq_len else None for record in records}) > 1:
        several.append("kv_len")
    return ["--causal or --no-causal" if name == "causal" else f"--{name.replace('_', '-')}" for name in several]
