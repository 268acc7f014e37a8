"""A table to order: which records, which columns, by what sorted, pivoted, and how much faster than a baseline."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from attnbench.analysis import sql
from attnbench.analysis.table import Table
from attnbench.case import Case
from attnbench.errors import RequestError, unknown
from attnbench.record import PASSES, Record
from attnbench.schema import kinds
from attnbench.store import Run

DIMENSIONS = (*(name for name in Case.__dataclass_fields__ if name not in ("seq_len", "kv_len", "d_model")),
              "d_model", "seq_len", "kv_len", "backend")  # fmt: skip
"""What tells the records of a run apart, in the order in which rows are sorted."""

SPEED_UPS = {f"{name}_speedup": f"{name}_ms" for name in PASSES}
"""Columns that a baseline adds: its time over the record's own, above 1 is faster."""

SHORT = ("outcome", "forward_ms", "backward_ms", "forward_backward_ms", "peak_MiB")
"""What a table to read has after the dimensions, where no columns were asked for."""

NOT_MEASURED = ("compile_ms", "event_overhead_ms", "sm_clock_MHz", "power_W", "temperature_C", "seconds")
"""Numbers whose absence has nothing to do with how a cell ended."""


@dataclass(frozen=True)
class Selection:
    """What was asked for. `where` are SQL conditions; `pivot` are the names of rows, columns and values; `sort` is a
    column, with a minus before it for the greatest first."""

    where: Sequence[str] = ()
    columns: Sequence[str] = ()
    pivot: Sequence[str] = ()
    baseline: str | None = None
    sort: str | None = None

    @property
    def is_table(self) -> bool:
        """Whether it is one table, and not just fewer records."""
        return bool(self.columns or self.pivot or self.baseline or self.sort)


def parse_columns(text: str | None) -> tuple[str, ...]:
    """`a,b,c`. Raises `RequestError` where one is empty or stands twice."""
    names = tuple(name.strip() for name in text.split(",")) if text is not None else ()
    if "" in names or len(set(names)) < len(names):
        raise RequestError(
            f"columns {text!r} are not names, each once, with commas between; such as backend,forward_ms"
        )
    return names


def parse_pivot(text: str | None) -> tuple[str, ...]:
    """`ROWSxCOLSxVALUE`, or with ×. Raises `RequestError` for anything else."""
    names = tuple(name.strip() for name in re.split("[x×]", text)) if text is not None else ()
    if text is not None and (len(names) != 3 or len(set(names)) < 3 or "" in names):
        raise RequestError(f"pivot {text!r} is not of the form ROWSxCOLSxVALUE, such as seq_lenxd_modelxforward_ms")
    return names


def select(run: Run, selection: Selection, backend: str | None = None, *, short: bool = True) -> Table:
    """The table of a run; `backend` leaves out every other one, and `short` shows few columns where none are named.

    A number that was not measured, since the cell failed, shows how the cell ended, unless a column tells that anyway.
    The baseline is looked up among all records; where it failed, that cell's speed-up alone is empty.

    Raises:
        RequestError: a column, condition or baseline that the run does not have, or options that exclude each other.
    """
    if selection.columns and selection.pivot:
        raise RequestError("--columns and --pivot were both given; the columns of a pivot are those of its values")
    readers = _readers(run, selection.baseline)
    for name in (*selection.columns, *selection.pivot):
        _check(name, readers)
    sort, descending = (selection.sort or "").removeprefix("-"), (selection.sort or "").startswith("-")
    records = chosen(run, selection, backend)
    if selection.pivot:
        table = _pivot(run, records, readers, selection.pivot)
        return _sorted_table(table, sort, descending=descending) if sort else table
    records.sort(key=lambda record: [_in_order(run, name, getattr(record, name)) for name in DIMENSIONS])
    if sort:
        _check(sort, readers)
        records = _sort(records, [readers[sort](record) for record in records], descending=descending)
    names = selection.columns or _default_columns(records, selection, short)
    return Table(names, [[_cell(record, name, names, readers) for name in names] for record in records])


def chosen(run: Run, selection: Selection, backend: str | None = None) -> list[Record]:
    """The records that are wanted, as they stand in the run. Raises `RequestError` as `select` does."""
    names = list(dict.fromkeys(record.backend for record in run.records))
    if backend is not None and backend not in names:
        raise RequestError(f"backend {backend!r} is not in {run.directory}; it has: {', '.join(names) or 'no records'}")
    records = [record for record in run.records if backend in (None, record.backend)]
    return sql.matching(records, selection.where)


# --- columns ----------------------------------------------------------------------------------------------------------

Reader = Callable[[Record], Any]


def _readers(run: Run, baseline: str | None) -> dict[str, Reader]:
    """How each column there is gets its value."""
    readers: dict[str, Reader] = {name: _field(name) for name in (*Record.__dataclass_fields__, *sql.DERIVED)}
    if baseline is None:
        return readers
    base = {record.case: record for record in run.records if record.backend == baseline and record.status == "ok"}
    if not any(record.backend == baseline for record in run.records):
        raise unknown("baseline", baseline, dict.fromkeys(record.backend for record in run.records))
    return readers | {name: _speed_up(base, field) for name, field in SPEED_UPS.items()}


def _field(name: str) -> Reader:
    return lambda record: getattr(record, name)


def _speed_up(base: Mapping[Case, Record], field: str) -> Reader:
    def ratio(record: Record) -> float | None:
        before, own = getattr(base.get(record.case), field, None), getattr(record, field)
        return before / own if record.status == "ok" and before and own else None

    return ratio


def _check(name: str, readers: Mapping[str, Reader]) -> None:
    if name in SPEED_UPS and name not in readers:
        raise RequestError(f"column {name} needs a baseline; name one by --baseline BACKEND")
    if name not in readers:
        raise unknown("column", name, readers)


def _default_columns(records: Sequence[Record], selection: Selection, short: bool) -> tuple[str, ...]:
    added = tuple(SPEED_UPS) if selection.baseline else ()
    if not short:
        return (*Record.__dataclass_fields__, *added)
    shape = [name for name in DIMENSIONS if name in ("d_model", "seq_len") or name in _varying(records)]
    return ("backend", *(name for name in shape if name != "backend"), *SHORT, *added)


def _varying(records: Sequence[Record]) -> list[str]:
    """Dimensions that tell these records apart; kv_len only where it is not seq_len throughout."""
    several = [name for name in DIMENSIONS if len({getattr(record, name) for record in records}) > 1]
    return [name for name in several if name != "kv_len" or not _same_lengths(records)]


def _same_lengths(records: Sequence[Record]) -> bool:
    return all(record.kv_len == record.seq_len for record in records)


def _cell(record: Record, name: str, names: Sequence[str], readers: Mapping[str, Reader]) -> Any:
    value = readers[name](record)
    told = "outcome" in names or "status" in names
    return record.outcome if record.status != "ok" and not told and value in (None, ()) and _measured(name) else value


def _measured(name: str) -> bool:
    """Whether a column holds numbers that a cell has only if it came so far."""
    kind = kinds(Record).get(name)
    return kind is None or (kind.name == "number" and (kind.optional or kind.many) and name not in NOT_MEASURED)


# --- rows -------------------------------------------------------------------------------------------------------------

Row = TypeVar("Row")


def _rank(value: Any) -> tuple[int, Any]:
    """Where a value stands among others of its column: numbers, then text, then nothing."""
    if isinstance(value, int | float):
        return 0, value
    return (2, "") if value is None or value == () else (1, str(value))


def _in_order(run: Run, name: str, value: Any) -> tuple[int, Any]:
    """The same, but backends as they were asked for."""
    asked = run.header.request["backends"]
    return (0, asked.index(value)) if name == "backend" and value in asked else _rank(value)


def _sort(rows: Sequence[Row], values: Sequence[Any], *, descending: bool) -> list[Row]:
    """Rows by a value each; what has none is last either way."""
    ranks = [_rank(value) for value in values]
    found: list[Row] = []
    for alike in (0, 1, 2):
        own = [index for index, rank in enumerate(ranks) if rank[0] == alike]
        own.sort(key=lambda index: ranks[index][1], reverse=descending)
        found += [rows[index] for index in own]
    return found


def _pivot(run: Run, records: Sequence[Record], readers: Mapping[str, Reader], names: Sequence[str]) -> Table:
    """A row for each value of the rows' column, and of every other dimension that tells the records apart."""
    down, across, value = names
    for name in (down, across):
        if (kind := kinds(Record).get(name)) and kind.many:
            raise RequestError(f"column {name} holds lists, which make no rows or columns of a pivot")
    stand = {down, across}
    if _same_lengths(records):
        stand |= {"seq_len", "kv_len"} if stand & {"seq_len", "kv_len"} else set()
    leading = [*(name for name in _varying(records) if name not in stand), down]
    cells: dict[tuple[Any, ...], dict[Any, Any]] = {}
    for record in records:
        row = cells.setdefault(tuple(readers[name](record) for name in leading), {})
        row[readers[across](record)] = _cell(record, value, (), readers)
    rows = sorted(cells, key=lambda row: [_in_order(run, name, key) for name, key in zip(leading, row, strict=True)])
    columns = sorted({key for row in cells.values() for key in row}, key=lambda key: _in_order(run, across, key))
    return Table(
        [*leading, *("none" if key is None else str(key) for key in columns)],
        [[*row, *(cells[row].get(key) for key in columns)] for row in rows],
    )


def _sorted_table(table: Table, name: str, *, descending: bool) -> Table:
    if name not in table.headers:
        raise unknown("column", name, table.headers)
    index = list(table.headers).index(name)
    return Table(table.headers, _sort(table.rows, [row[index] for row in table.rows], descending=descending))
