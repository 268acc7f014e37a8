"""Records and runs in DuckDB: conditions on records, questions of one's own, Parquet.

What a user writes in SQL reads the tables it is given and nothing else: no file, no network, no setting.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnbench.analysis.table import Table
from attnbench.errors import RequestError, printable, unknown
from attnbench.record import Record
from attnbench.schema import Kind, kinds
from attnbench.store import Run, require

if TYPE_CHECKING:
    import duckdb

LOCKED = {"enable_external_access": "false", "python_enable_replacements": "false", "temp_directory": ""}
"""No file, no extension, no variable of this program, no spilling to the disk."""

TYPES = {"text": "VARCHAR", "integer": "BIGINT", "number": "DOUBLE", "flag": "BOOLEAN", "object": "JSON"}

ROWS_AT_ONCE = 200
"""Rows handed over in one statement: a record has thousands of samples."""


def _type(kind: Kind) -> str:
    return TYPES[kind.name] + "[]" * (kind.many and kind.name != "object")


DERIVED: dict[str, str] = {"outcome": "VARCHAR", "peak_MiB": "DOUBLE"}
"""Columns beside a record's fields, by its properties of that name."""

RUNS: dict[str, tuple[str, Callable[[Run], Any]]] = {
    "run": ("VARCHAR", lambda run: str(run.directory)),
    "run_id": ("VARCHAR", lambda run: run.header.run_id),
    "started_at": ("VARCHAR", lambda run: run.header.started_at),
    "device": ("VARCHAR", lambda run: run.header.request["device"]),
    "gpu": ("VARCHAR", lambda run: ", ".join(str(gpu.get("name")) for gpu in run.header.machine["gpus"]) or None),
    "driver": ("VARCHAR", lambda run: run.header.machine.get("driver")),
    "cpu": ("VARCHAR", lambda run: run.header.machine["cpu"]),
    "hostname": ("VARCHAR", lambda run: run.header.machine.get("hostname")),
    "system": ("VARCHAR", lambda run: run.header.machine["system"]),
    "python": ("VARCHAR", lambda run: run.header.machine["python"]),
    "torch": ("VARCHAR", lambda run: run.header.machine["packages"].get("torch")),
    "triton": ("VARCHAR", lambda run: run.header.machine["packages"].get("triton")),
    "cuda": ("VARCHAR", lambda run: (run.header.machine.get("software") or {}).get("cuda")),
    "attnbench": ("VARCHAR", lambda run: run.header.attnbench),
    "protocol": ("VARCHAR", lambda run: run.header.request["protocol"]),
    "budget_s": ("DOUBLE", lambda run: run.header.request["budget_s"]),
    "cells": ("BIGINT", lambda run: run.header.cells),
    "finished": ("BIGINT", lambda run: len(run.records)),
    "seconds": ("DOUBLE", lambda run: (run.header.seconds or {}).get("whole")),
    "request": ("JSON", lambda run: run.header.request),
    "machine": ("JSON", lambda run: run.header.machine),
    "ceilings": ("JSON", lambda run: run.header.ceilings),
}
"""Columns of `runs`: type, and where each stands."""


def column_types() -> dict[str, str]:
    """Columns of `records` and their types: the schema's fields, and what derives from them."""
    return {name: _type(kind) for name, kind in kinds(Record).items()} | DERIVED


def matching(records: Sequence[Record], conditions: Sequence[str]) -> list[Record]:
    """The records for which every condition, an SQL expression over their columns, holds; in their order.

    Raises:
        RequestError: a condition is no such expression, or duckdb is not installed.
    """
    if not conditions:
        return list(records)
    duckdb = _duckdb()
    types = {"position": "BIGINT"} | column_types()
    database = connect()
    load(database, "records", types, [[index, *_values(record)] for index, record in enumerate(records)])
    lock(database)
    kept = set(range(len(records)))
    for condition in conditions:
        try:
            whole = database.table("records").filter(duckdb.SQLExpression(_unicode(condition))).select("position")
            kept &= {index for (index,) in whole.fetchall()}
        except duckdb.Error as error:
            columns = column_types()
            hint = f"; the columns are: {', '.join(columns)}" if isinstance(error, duckdb.ParserException) else ""
            raise RequestError(f"--where {condition!r}: {_said(error, columns)}{hint}") from None
    return [record for index, record in enumerate(records) if index in kept]


def ask(runs: Sequence[Run], question: str) -> Table:
    """The answer to one SELECT over `records`, every field of every record and the `run` it is of, and `runs`.

    Raises:
        RequestError: it is not one SELECT, reads anything else, or is wrong; or duckdb is not installed.
    """
    duckdb = _duckdb()
    for index, run in enumerate(runs):
        require(run.directory, run.header)
        if run.directory in (other.directory for other in runs[:index]):
            raise RequestError(f"{run.directory} is given twice, and its records would count twice")
    database = connect()
    records = {"run": "VARCHAR"} | column_types()
    load(database, "records", records, [[str(run.directory), *_values(one)] for run in runs for one in run.records])
    told = {name: kind for name, (kind, _) in RUNS.items()}
    load(database, "runs", told, [[tell(run) for _, tell in RUNS.values()] for run in runs])
    lock(database)
    try:
        statements = database.extract_statements(_unicode(question))
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise RequestError(f"query {question!r} is not one SELECT; write one over the tables records and runs")
        answer = database.execute(statements[0])
        described = answer.description or []
        rows = [[_python(value, str(column[1])) for value, column in zip(row, described, strict=True)]
                for row in answer.fetchall()]  # fmt: skip
    except duckdb.Error as error:
        columns = list(dict.fromkeys((*records, *told)))
        raise RequestError(f"query {question!r}: {_said(error, columns)}") from None
    return Table(_distinct([str(column[0]) for column in described]), rows)


def write_parquet(table: Table, path: Path, types: Mapping[str, str] | None = None) -> None:
    """Writes a table as a Parquet file. `types` are what its columns hold as a rule; where a failed cell shows how it
    ended in place of a number, or no type is given, the values decide.

    Raises:
        RequestError: the file cannot be written, or duckdb is not installed.
    """
    duckdb = _duckdb()
    database = duckdb.connect(":memory:")
    columns = zip(
        table.headers, zip(*table.rows, strict=True) if table.rows else [()] * len(table.headers), strict=True
    )
    found = {name: _type_of(values, (types or {}).get(name)) for name, values in columns}
    load(database, "written", found, table.rows)
    try:
        database.execute(f"COPY written TO {_quoted(str(path), chr(39))} (FORMAT parquet)")
    except duckdb.Error as error:
        raise RequestError(f"{path} cannot be written: {_said(error, ())}") from None


# --- the database -----------------------------------------------------------------------------------------------------


def _duckdb() -> Any:
    try:
        import duckdb
    except ImportError:
        raise RequestError("SQL and Parquet need duckdb; install it by: pip install 'attnbench[report]'") from None
    return duckdb


def connect() -> duckdb.DuckDBPyConnection:
    """A database in memory that can reach nothing outside it."""
    return _duckdb().connect(":memory:", config=LOCKED)


def lock(database: duckdb.DuckDBPyConnection) -> None:
    """From here on no setting can be changed."""
    database.execute("SET lock_configuration = true")


def load(
    database: duckdb.DuckDBPyConnection, name: str, types: Mapping[str, str], rows: Sequence[Sequence[Any]]
) -> None:
    """A table of that name; every row has a value, or None, for each of `types`."""
    columns = ", ".join(f"{_quoted(column)} {kind}" for column, kind in types.items())
    database.execute(f"CREATE TABLE {name} ({columns})")
    structure = json.dumps([{f"c{index}": kind for index, kind in enumerate(types.values())}])
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = [{f"c{index}": value for index, value in enumerate(row)} for row in rows[start : start + ROWS_AT_ONCE]]
        text = _unicode(json.dumps(some, ensure_ascii=False))
        database.execute(f"INSERT INTO {name} SELECT r.* FROM (SELECT unnest(from_json(?, ?)) AS r)", [text, structure])


def _values(record: Record) -> list[Any]:
    return [*record.to_dict().values(), *(getattr(record, name) for name in DERIVED)]


def _unicode(text: str) -> str:
    """Text with question marks for what Unicode does not have: file names and arguments may hold any bytes."""
    return text.encode(errors="replace").decode()


def _quoted(name: str, mark: str = '"') -> str:
    return mark + name.replace(mark, 2 * mark) + mark


def _type_of(values: Sequence[Any], usual: str | None = None) -> str:
    """The usual type of a column, unless it holds text in place of something else; without one, the narrowest."""
    found = {type(value) for value in values if value is not None}
    if usual and (str not in found or usual in ("VARCHAR", "JSON")):
        return usual
    if not found or found == {str}:
        return "VARCHAR"
    if found <= {tuple, list}:
        inner = {_type_of(value) for value in values if value is not None}
        return f"{inner.pop()}[]" if len(inner) == 1 and "JSON" not in inner else "JSON"
    if found == {bool}:
        return "BOOLEAN"
    return "BIGINT" if found == {int} else "DOUBLE" if found <= {int, float} else "JSON" if dict in found else "VARCHAR"


def _python(value: Any, kind: str) -> Any:
    """A value of DuckDB as JSON could hold it: what is not finite, as a division by zero, is None."""
    if kind == "JSON" and isinstance(value, str):
        return json.loads(value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, list | tuple):
        return [_python(item, kind.removesuffix("[]")) for item in value]
    if isinstance(value, dict):
        return {str(key): _python(item, "") for key, item in value.items()}
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if abs(number) < float("inf") else None


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, each with a number where it has stood before."""
    found: list[str] = []
    for name in names:
        repeats = sum(name == other for other in names[: len(found)])
        found.append(f"{name}_{repeats}" if repeats else name)
    return found


def _said(error: Exception, columns: Sequence[str] | Mapping[str, str]) -> str:
    """What DuckDB complains of, in a line."""
    text = str(error).partition("\n\nLINE")[0]
    if match := re.search(r'Referenced column "(.+?)" not found', text):
        return str(unknown("column", match[1], columns))
    if match := re.search(r"Table with name (.+?) does not exist", text):
        return str(unknown("table", match[1], ("records", "runs")))
    return printable(text.partition(": ")[2] or text)
