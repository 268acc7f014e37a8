"""From a run to documents. `FORMATS` by `LAYOUTS`: what `attnbench report` can write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnbench.case import Case
from attnbench.errors import MissingLibrary, RequestError, unknown
from attnbench.report import full, html, seed
from attnbench.report.tables import WRITERS, records_csv, records_json
from attnbench.store import Run

LAYOUTS = {"full": full.document, "seed": seed.document}
FORMATS = ("markdown", "html", "csv", "json", "latex")


def check_layout(layout: str, backends: Sequence[str], cases: Sequence[Case]) -> None:
    """Raises `RequestError` where a layout is not known or cannot show a run; to be asked before hours of measuring."""
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    if layout == "seed":
        seed.check(backends, cases)


def render(run: Run, format: str = "markdown", layout: str = "full", backend: str | None = None) -> str:  # noqa: A002
    """A run as a document.

    `layout` shapes Markdown, HTML and LaTeX; HTML in full is the page. CSV and JSON are the records themselves, field by field. `backend` leaves out
    every other one.

    Raises:
        RequestError: an unknown format, layout or backend, a run that the layout cannot show, or a page without the
            libraries that it needs.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    names = list(dict.fromkeys(record.backend for record in run.records))
    if backend is not None:
        if backend not in names:
            raise RequestError(
                f"backend {backend!r} is not in {run.directory}; it has: {', '.join(names) or 'no records'}"
            )
        run = replace(run, records=[record for record in run.records if record.backend == backend])
    check_layout(layout, names if backend is None else [backend], [record.case for record in run.records])
    if format == "csv":
        return records_csv(run.records)
    if format == "json":
        return records_json(run.records)
    if format == "html" and layout == "full":
        return html.page(run)
    writer = WRITERS[format]
    return writer.page(LAYOUTS[layout](run, writer))


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
