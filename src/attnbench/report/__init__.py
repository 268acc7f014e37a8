"""From a run to documents. `FORMATS` by `LAYOUTS`: what `attnbench report` can write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from attnbench.analysis import sql
from attnbench.analysis.select import Selection, chosen, select
from attnbench.case import Case
from attnbench.errors import MissingLibrary, RequestError, unknown
from attnbench.report import full, html, seed
from attnbench.report.tables import DATA, WRITERS, records_table
from attnbench.store import Run, require

LAYOUTS = {"full": full.document, "seed": seed.document}
FORMATS = ("markdown", "html", "csv", "json", "latex", "parquet")
BINARY = ("parquet",)
"""Formats that are no text: `write` alone has them."""

ALL = Selection()


def check_layout(layout: str, backends: Sequence[str], cases: Sequence[Case]) -> None:
    """Raises `RequestError` where a layout is not known or cannot show a run; to be asked before hours of measuring."""
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    if layout == "seed":
        seed.check(backends, cases)


def render(
    run: Run,
    format: str = "markdown",  # noqa: A002
    layout: str = "full",
    backend: str | None = None,
    selection: Selection = ALL,
) -> str:
    """A run as a document.

    `layout` shapes Markdown, HTML and LaTeX; HTML in full is the page. CSV and JSON are the records themselves, field by
    field. `backend` leaves out every other one. A `selection` leaves out records, or makes one table of them.

    Raises:
        RequestError: an unknown format, layout, backend or column, a run that the layout cannot show, a format that is
            no text, or a page without the libraries that it needs.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if format in BINARY:
        raise RequestError(f"{format} is not text; name a file for it by --out FILE")
    require(run.directory, run.header)
    if selection.is_table:
        if format not in DATA or layout != "full":
            what = f"layout {layout}" if layout != "full" else format
            raise RequestError(
                f"{what} is a document of many tables, and --columns, --pivot, --baseline and --sort make one; "
                f"they work with --format {', '.join((*DATA, *BINARY))}"
            )
        return DATA[format](select(run, selection, backend, short=format in WRITERS))
    run = replace(run, records=chosen(run, selection, backend))
    if format in ("csv", "json"):
        return DATA[format](records_table(run.records))
    names = list(dict.fromkeys(record.backend for record in run.records))
    check_layout(layout, names, [record.case for record in run.records])
    if format == "html" and layout == "full":
        return html.page(run)
    writer = WRITERS[format]
    return writer.page(LAYOUTS[layout](run, writer))


def write(run: Run, out: Path, format: str, layout: str, backend: str | None, selection: Selection) -> None:  # noqa: A002
    """The same as `render`, into a file. Raises `RequestError` as that does, and where the file cannot be written."""
    if format == "parquet":
        require(run.directory, run.header)
        whole = select(run, selection, backend, short=False)
        sql.write_parquet(whole, out, sql.column_types())
        return
    try:
        out.write_text(render(run, format, layout, backend, selection), "utf-8", "replace")
    except OSError as error:
        raise RequestError(f"{out} cannot be written: {error.strerror}") from None


def documents(run: Run, layout: str) -> tuple[dict[str, str], str | None]:
    """The documents that a run leaves in its directory, by file name, and what is missing for the page, in a line.

    Without the page's libraries report.html is the tables of report.md.
    """
    written = {"report.md": render(run, "markdown", layout)}
    try:
        return written | {"report.html": render(run, "html", layout)}, None
    except MissingLibrary as error:
        writer = WRITERS["html"]
        body = writer.text(f"These are tables alone: {error}.") + LAYOUTS[layout](run, writer)
        return written | {"report.html": writer.page(body)}, str(error)
