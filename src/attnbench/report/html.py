"""The page: one file that holds a run, its charts and what draws them. No request leaves it."""

from __future__ import annotations

from contextlib import suppress
from importlib.resources import files
from typing import Any

from attnbench.calibration import cache_directory
from attnbench.errors import MissingLibrary
from attnbench.report.charts import CHARTS
from attnbench.report.figures import device, vegalite_version
from attnbench.report.page_data import page_data, script_json
from attnbench.report.preface import facts_of, troubles_of
from attnbench.store import Run, write_whole
from attnbench.tags import TAGS

SCRIPTS = ("dom.js", "data.js", "answer.js", "table.js", "drawer.js", "charts.js", "pivots.js", "main.js")
"""In the order they are joined, each with the names that those before it have."""


def page(run: Run) -> str:
    """The page of a run, finished or not.

    Raises:
        MissingLibrary: a library of the `report` extra is not installed.
    """
    try:
        import jinja2
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise MissingLibrary("the page", error.name, "report") from None
    folder = files("attnbench.report") / "page"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        **_head(run),
        charts=CHARTS,
        facts=facts_of(run),
        troubles=troubles_of(run),
        tags=[(name, TAGS[name].about) for name in TAGS if any(name in record.tags for record in run.records)],
        style=(folder / "style.css").read_text("utf-8"),
        script="".join((folder / name).read_text("utf-8") for name in SCRIPTS),
        data=script_json(page_data(run)),
        bundle=script_json(_bundle()),
    ) + "\n"  # fmt: skip


def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script. It takes seconds to make, and is kept for the next page."""
    from importlib import metadata

    import vl_convert

    version = vegalite_version()
    kept = cache_directory() / f"vega-{metadata.version('vl-convert-python')}-{version}.js"
    with suppress(OSError):
        return kept.read_text("utf-8")
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, bundle)
    return bundle


def _head(run: Run) -> dict[str, Any]:
    header = run.header
    return {
        "device": device(header),
        "name": header.request.get("name") or "",
        "started": header.started_at[:10],
        "version": header.attnbench,
        "done": len(run.records),
        "cells": header.cells,
        "counts": sorted(run.counts.items(), key=lambda item: -item[1]),
    }
