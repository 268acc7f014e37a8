"""Tables: what they hold, and how each format writes them."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnbench.analysis.table import Table
from attnbench.errors import printable
from attnbench.record import Record


@dataclass(frozen=True)
class Writer:
    """How one format writes headings, paragraphs, tables and the page around them. Numbers keep six significant digits."""

    heading: Callable[[str, int], str]
    text: Callable[[str], str]
    table: Callable[[Table], str]
    page: Callable[[str], str] = lambda body: body


def _tabulate(rows: Sequence[Sequence[Any]], headers: Sequence[str], form: str, **how: Any) -> str:
    from tabulate import tabulate  # takes a while to load, and most commands make no table

    return tabulate(rows, headers=list(headers), tablefmt=form, missingval="", **how)


def markdown_table(table: Table) -> str:
    rows = [[cell.replace("|", "\\|") if isinstance(cell, str) else cell for cell in row] for row in table.rows]
    return _tabulate(rows, table.headers, "pipe")


def latex_table(table: Table) -> str:
    return _tabulate(table.rows, table.headers, "latex_booktabs")


_LATEX_SPECIAL = {char: f"\\{char}" for char in "&%$#_{}"} | {
    char: f"\\text{name}{{}}"
    for char, name in {
        "\\": "backslash",
        "~": "asciitilde",
        "^": "asciicircum",
        "<": "less",
        ">": "greater",
        "|": "bar",
    }.items()
}


def _latex_text(text: str) -> str:
    return "".join(_LATEX_SPECIAL.get(char, char) for char in text)


def html_table(table: Table) -> str:
    body = _tabulate(table.rows, table.headers, "html")
    return f'<div class="wide">{body}</div>'


_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: 0.15rem 0.6rem; border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent) }
thead th { text-align: left }
"""


def html_page(body: str) -> str:
    """A page of its own: no request leaves it."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Attention benchmark</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


WRITERS = {
    "markdown": Writer(lambda text, level: f"{'#' * level} {text}", lambda text: text, markdown_table),
    "latex": Writer(
        lambda text, level: f"\\{'sub' * (level - 1)}section*{{{_latex_text(text)}}}", _latex_text, latex_table
    ),
    "html": Writer(
        lambda text, level: f"<h{level}>{html.escape(text)}</h{level}>",
        lambda text: f"<p>{html.escape(text)}</p>",
        html_table,
        html_page,
    ),
}


def pivot(records: Sequence[Record], value: Callable[[Record], Any]) -> Table:
    """`value` by seq_len (rows) and d_model (columns)."""
    lengths = sorted({record.seq_len for record in records})
    widths = sorted({record.d_model for record in records})
    by_shape = {(record.seq_len, record.d_model): value(record) for record in records}
    return Table(
        ["seq_len", *map(str, widths)],
        [[length, *(by_shape.get((length, width)) for width in widths)] for length in lengths],
    )


def records_table(records: Sequence[Record]) -> Table:
    """Every field a column, in the schema's order."""
    return Table(list(Record.__dataclass_fields__), [list(record.to_dict().values()) for record in records])


# --- one table as a document of its own -------------------------------------------------------------------------------


def _pipe_table(table: Table) -> str:
    return _shown(table, "pipe", lambda text: printable(text).replace("|", "\\|"))


def _latex_table(table: Table) -> str:
    return _shown(table, "latex_booktabs", printable)  # tabulate escapes


def _shown(table: Table, form: str, text: Callable[[str], str]) -> str:
    """Numbers with six significant digits, whatever stands beside them; text as it is, even where it looks like one."""
    columns = list(zip(*table.rows, strict=True))
    texts = [i for i, column in enumerate(columns) if not all(isinstance(v, int | float | None) for v in column)]
    sides = ["right" if any(isinstance(v, int | float) for v in column) else "left" for column in columns]

    def cell(index: int, value: Any) -> Any:
        if isinstance(value, str):
            return text(value)
        if isinstance(value, tuple | list | Mapping):
            plain = all(isinstance(item, str) for item in value) and not isinstance(value, Mapping)
            return text(", ".join(value) if plain else json.dumps(value))
        if isinstance(value, bool):
            return str(value).lower()
        return f"{value:.6g}" if index in texts and isinstance(value, float) else value

    rows = [[cell(index, value) for index, value in enumerate(row)] for row in table.rows]
    headers = [text(header) for header in table.headers]
    return _tabulate(rows, headers, form, disable_numparse=texts, colalign=sides) + "\n"


def _csv_table(table: Table) -> str:
    """Lists are JSON."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.headers)
    for row in table.rows:
        writer.writerow([json.dumps(v) if isinstance(v, tuple | list | Mapping) else v for v in row])
    return buffer.getvalue()


def _json_table(table: Table) -> str:
    """A list of objects, one a row."""
    return (
        json.dumps([dict(zip(table.headers, row, strict=True)) for row in table.rows], indent=1, allow_nan=False) + "\n"
    )


DATA: dict[str, Callable[[Table], str]] = {
    "markdown": _pipe_table,
    "csv": _csv_table,
    "json": _json_table,
    "latex": _latex_table,
}
"""How each format writes a table of data that is a document of its own."""
