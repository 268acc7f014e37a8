"""A chart of a run as a file: one group of cases, one pass, as SVG or PNG. Needs no browser and no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from attnbench.analysis.select import Selection, chosen
from attnbench.errors import MissingLibrary, RequestError, unknown
from attnbench.report.charts import CHARTS, DATA, PASSES, Subject, rows, spec
from attnbench.report.full import BASELINE
from attnbench.report.groups import groups, telling_apart
from attnbench.report.themes import config
from attnbench.store import Header, Run, require

FORMATS = ("svg", "png")
_PNG_SCALE = 2.0


@dataclass(frozen=True)
class Figure:
    """What to draw. `timed` is the pass, and `baseline` the backend that speed-ups are over; None are the defaults.

    Raises:
        RequestError: there is no such chart or pass, or one that the chart does not have.
    """

    chart: str
    timed: str | None = None
    baseline: str | None = None

    def __post_init__(self) -> None:
        if self.chart not in CHARTS:
            raise unknown("chart", self.chart, CHARTS)
        if self.timed is not None and self.timed not in PASSES:
            raise unknown("pass", self.timed, PASSES)
        if self.timed is not None and not CHARTS[self.chart].of_a_pass:
            raise RequestError(f"--pass {self.timed} was given, but chart {self.chart} is of no pass; leave it out")
        if self.baseline is not None and self.chart != "speedup":
            raise RequestError(f"--baseline {self.baseline} goes with --chart speedup, and the chart is {self.chart}")

    @classmethod
    def of(cls, format: str, chart: str | None, timed: str | None, selection: Selection) -> Figure:  # noqa: A002
        """What the command line asks for. Raises `RequestError` where no chart is named, or a table is asked for as well."""
        if chart is None:
            raise RequestError(f"--format {format} needs to know what to draw: give --chart {'|'.join(CHARTS)}")
        if selection.columns or selection.pivot or selection.sort:
            raise RequestError(f"--columns, --pivot and --sort make a table, and --format {format} draws a chart")
        return cls(chart, timed, selection.baseline)


def draw(
    run: Run,
    figure: Figure,
    format: str,  # noqa: A002
    where: Sequence[str] = (),
    backend: str | None = None,
) -> bytes:
    """A figure of a run's only group of cases; `where` and `backend` leave out others, as `chosen` does.

    Raises:
        RequestError: the run has several groups, no such baseline, or nothing to draw; or a library is not installed.
    """
    require(run.directory, run.header)
    run = replace(run, records=chosen(run, Selection(where), backend))
    found = groups(run.records)
    if not found:
        raise RequestError(f"there is nothing to draw of {run.directory}: no record is left, or none was made yet")
    if len(found) > 1:
        raise RequestError(
            f"a chart is of cases that differ in seq_len and d_model alone, and {run.directory} has {len(found)} groups "
            f'of them: {"; ".join(found)}; choose one by --where, such as --where "{telling_apart(run.records)}"'
        )
    ((group, records),) = found.items()
    subject = Subject.of(records, run.header.request["backends"], capacity_MiB(run.header))
    baseline = _baseline(run, figure, subject)
    drawing = spec(figure.chart, subject, timed=figure.timed or "forward", baseline=baseline)
    drawing |= {
        "title": _title(figure, baseline, device(run.header), group),
        "config": config("paper"),
        "datasets": {DATA: rows(records)},
    }
    return _convert(drawing, format)


def device(header: Header) -> str:
    """What the run was measured on, by name: the GPU, or the CPU."""
    gpu = _gpu(header)
    return gpu["name"] if gpu else header.machine["cpu"]


def capacity_MiB(header: Header) -> float | None:
    """The memory that cells had to do with: the limit that was asked for, or all of the device's."""
    limit, gpu = header.request.get("memory_limit_bytes"), _gpu(header)
    whole = gpu["memory_MiB"] if gpu else header.machine.get("cgroup_memory_MiB") or header.machine.get("memory_MiB")
    return limit / 2**20 if limit else whole


def baseline_of(backends: list[str]) -> str:
    """The backend that speed-ups are over where none was named."""
    return BASELINE if BASELINE in backends else next(iter(backends), "")


def _gpu(header: Header) -> dict[str, Any] | None:
    name, _, index = header.request["device"].partition(":")
    gpus = header.machine["gpus"]
    return gpus[int(index or 0)] if name == "cuda" and int(index or 0) < len(gpus) else None


def _baseline(run: Run, figure: Figure, subject: Subject) -> str:
    """The figure's baseline. Raises `RequestError` where that or the whole chart would show nothing."""
    if figure.baseline is not None and figure.baseline not in subject.backends:
        raise unknown(f"baseline of {run.directory}", figure.baseline, subject.backends)
    name, chart = figure.baseline or baseline_of(list(subject.backends)), CHARTS[figure.chart]
    shown = chart.shows.format(figure.timed or "forward")
    drawn = {row["backend"] for row in rows(run.records) if row["status"] == "ok" and row.get(shown)}
    if chart.of_a_pass and not drawn:
        raise RequestError(f"there is nothing to draw of {run.directory}: no cell that is ok has {shown}")
    if figure.chart == "speedup" and name not in drawn:
        raise RequestError(f"{name} is ok in no cell of {run.directory} that has {shown}; choose another --baseline")
    if figure.chart == "speedup" and drawn == {name}:
        raise RequestError(f"there is nothing to draw of {run.directory}: no other backend than {name} is ok")
    return name


def _title(figure: Figure, baseline: str, device: str, group: str) -> dict[str, Any]:
    chart = CHARTS[figure.chart]
    over = f" over {baseline}" if figure.chart == "speedup" else ""
    timed = f", {figure.timed or 'forward'}" if chart.of_a_pass else ""
    return {"text": f"{chart.title}{over}{timed}", "subtitle": f"{device}, {group}"}


def _convert(drawing: dict[str, Any], format: str) -> bytes:  # noqa: A002
    try:
        import vl_convert
    except ImportError:
        raise MissingLibrary(f"--format {format}", "vl-convert-python", "report") from None
    if format == "svg":
        return vl_convert.vegalite_to_svg(drawing, vl_version=vegalite_version()).encode()
    return vl_convert.vegalite_to_png(drawing, vl_version=vegalite_version(), scale=_PNG_SCALE)


def vegalite_version() -> str:
    """The Vega-Lite that altair's specifications are of, or the newest there is, as vl-convert names it: `6.1`."""
    import altair
    import vl_convert

    wanted = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    known = vl_convert.get_vegalite_versions()
    return wanted if wanted in known else known[-1]
