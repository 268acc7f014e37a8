"""Tables: what they hold, and how each format writes them."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from attnbench.record import Record


@dataclass(frozen=True)
class Table:
    """Rows under headers; None is an empty cell."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def without_empty_columns(self) -> Table:
        kept = [i for i in range(len(self.headers)) if any(row[i] not in (None, "") for row in self.rows)]
        return Table([self.headers[i] for i in kept], [[row[i] for i in kept] for row in self.rows])


@dataclass(frozen=True)
class Writer:
    """How one format writes headings, paragraphs, tables and the page around them. Numbers keep six significant digits."""

    heading: Callable[[str, int], str]
    text: Callable[[str], str]
    table: Callable[[Table], str]
    page: Callable[[str], str] = lambda body: body


def markdown_table(table: Table) -> str:
    rows = [[cell.replace("|", "\\|") if isinstance(cell, str) else cell for cell in row] for row in table.rows]
    return tabulate(rows, headers=list(table.headers), tablefmt="pipe", missingval="")


def latex_table(table: Table) -> str:
    return tabulate(table.rows, headers=list(table.headers), tablefmt="latex_booktabs", missingval="")


_LATEX_SPECIAL = {char: f"\\{char}" for char in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\~{}", "^": r"\^{}"}


def _latex_text(text: str) -> str:
    return "".join(_LATEX_SPECIAL.get(char, char) for char in text)


def html_table(table: Table) -> str:
    body = tabulate(table.rows, headers=list(table.headers), tablefmt="html", missingval="")
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


def records_csv(records: Sequence[Record]) -> str:
    """Every field a column; lists are JSON."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(Record.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    for record in records:
        values = record.to_dict()
        writer.writerow(
            {name: json.dumps(value) if isinstance(value, tuple) else value for name, value in values.items()}
        )
    return buffer.getvalue()


def records_json(records: Sequence[Record]) -> str:
    return json.dumps([record.to_dict() for record in records], indent=1, allow_nan=False) + "\n"
