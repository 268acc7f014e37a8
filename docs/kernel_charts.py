"""Draws docs/img/kernels-*.svg and writes their tables into docs/kernels.md, from published runs that have `attnbench`.

    python docs/kernel_charts.py results/RUN…

Without arguments the page keeps the runs that it names.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

import attnbench
from attnbench import Record, RequestError, Result
from attnbench.report import tables
from attnbench.report.charts import DATA
from attnbench.report.comparison import folded
from attnbench.report.figures import device, vegalite_version
from attnbench.report.groups import groups
from attnbench.report.tables import Table
from attnbench.report.themes import COLOURS, DASHES, NEUTRAL, SHAPES, config

DOCS = Path(__file__).resolve().parent
PAGE, IMAGES, RESULTS = DOCS / "kernels.md", DOCS / "img", DOCS.parent / "results"
START, END = "<!-- charts: written by docs/kernel_charts.py -->\n", "<!-- end of charts -->"
NAMED = re.compile(r"\(\.\./results/([^/)]+)/report\.md\)")

OURS, PEER, FLOOR = "attnbench", "fastest other", "floor"
DOTS = "M-1,0H-.6M-.2,0H.2M.6,0H1"
"""The floor's shape in the legend; it has no points."""
COLOUR = {OURS: COLOURS[0], PEER: COLOURS[1], FLOOR: NEUTRAL}
DASH = {OURS: DASHES[0], PEER: DASHES[1], FLOOR: DASHES[2]}
SHAPE = {OURS: SHAPES[0], PEER: SHAPES[1], FLOOR: DOTS}
DECADES = [10.0**power for power in range(-5, 6)]

LEGEND = """\
Times are those of the device for a whole pass, gaps between its kernels included, the host's time not. The peer is the
fastest other backend that is right there, in its output and all gradients, whatever the margin; where the ratio is below 1,
ours is faster. The last column of each pass is the floor over our time."""

SAME = ("protocol", "clock", "warm_cache")
"""What runs must have been asked alike for their times to stand side by side."""


@dataclass(frozen=True)
class Entry:
    """One pass of one shape. A time is None where nobody was right; `outcome` tells how ours ended."""

    timed: str
    d_model: int
    seq_len: int
    outcome: str
    ours_ms: float | None
    peer: str | None
    peer_ms: float | None
    floor_ms: float | None

    @property
    def ratio(self) -> float | None:
        """Our time over the peer's: below 1 is faster."""
        return self.ours_ms / self.peer_ms if self.ours_ms and self.peer_ms else None

    @property
    def of_floor(self) -> float | None:
        return self.floor_ms / self.ours_ms if self.floor_ms and self.ours_ms else None

    @property
    def series(self) -> dict[str, float | None]:
        """In the order in which they are drawn, ours on top."""
        return {FLOOR: self.floor_ms, PEER: self.peer_ms, OURS: self.ours_ms}


def entries(records: Sequence[Record]) -> list[Entry]:
    """Both passes, as far as any was timed, of every shape of one group of cases."""
    shapes: dict[tuple[int, int], list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.d_model, record.seq_len)):
        shapes.setdefault((record.d_model, record.seq_len), []).append(record)
    timed = [name for name in ("forward", "backward") if any(_right(records, name))]
    return [_entry(name, cell) for name in timed for cell in shapes.values()]


def _right(records: Sequence[Record], timed: str) -> list[Record]:
    return [record for record in records if record.status == "ok" and getattr(record, f"{timed}_ms")]


def _entry(timed: str, cell: Sequence[Record]) -> Entry:
    right = _right(cell, timed)
    times: dict[str, float] = {record.backend: getattr(record, f"{timed}_ms") for record in right}
    ours_ms = times.pop(OURS, None)
    peer = min(times, key=lambda name: times[name], default=None)
    floors = {record.backend: floor for record in cell if (floor := getattr(record, f"floor_{timed}_ms"))}
    # one that keeps its scores has a lower floor in the backward: ours is the one our limit is of
    floor = floors.get(OURS) if ours_ms else min(floors.values(), default=None)
    outcome = next((record.outcome for record in cell if record.backend == OURS), "–")
    shape = (cell[0].d_model, cell[0].seq_len)
    return Entry(timed, *shape, outcome, ours_ms, peer, times[peer] if peer else None, floor)


def compared(runs: Sequence[Result]) -> dict[str, list[Record]]:
    """The records of all runs, by their group in words; groups without ours are left out.

    Raises:
        RequestError: the runs cannot stand side by side, or two groups would have the same image.
    """
    records = [record for run in runs for record in run.records]
    asked = {(device(run.header), *(run.header.request.get(name) for name in SAME)) for run in runs}
    if len(asked) > 1:
        raise RequestError(f"the runs differ in device, {', '.join(SAME)}: {asked}")
    found = {name: group for name, group in groups(records).items() if any(one.backend == OURS for one in group)}
    if not found:
        raise RequestError(f"none of the runs has a record of {OURS}")
    ((cell_id, times),) = Counter(record.cell_id for record in records).most_common(1)
    if times > 1:
        raise RequestError(f"{cell_id} is in {times} of the runs; name one of them")
    if len({image(group) for group in found.values()}) < len(found):
        raise RequestError(f"an image is of one batch, number of heads and kv_len, and these are: {'; '.join(found)}")
    return found


def image(group: Sequence[Record]) -> str:
    case = group[0].case
    parts = (case.dtype, case.precision if case.dtype == "float32" else "", "causal" if case.causal else "")
    return "-".join(("kernels", *filter(None, parts))) + ".svg"


# --- the chart


def drawn(name: str, group: Sequence[Record], on: str) -> str:
    """The SVG of a group: a row for each pass, a column for each d_model."""
    found = entries(group)
    lengths = sorted({entry.seq_len for entry in found})
    passes = list(dict.fromkeys(entry.timed for entry in found))
    panels = [_panels(timed, lengths, header=timed == passes[0], footer=timed == passes[-1]) for timed in passes]
    drawing = alt.vconcat(*panels, spacing=8).to_dict() | {
        "title": {"text": f"{OURS}, the fastest other backend and the floor", "subtitle": f"{on}, {name}"},
        "config": config("paper"),
        "datasets": {DATA: [row for entry in found for row in _points(entry)]},
    }
    return vl_convert.vegalite_to_svg(drawing, vl_version=vegalite_version())


def _points(entry: Entry) -> list[dict[str, Any]]:
    shape = {"timed": entry.timed, "d_model": entry.d_model, "seq_len": entry.seq_len}
    at = f"{entry.timed}, d_model {entry.d_model}, seq_len {entry.seq_len}"
    known = {name: ms for name, ms in entry.series.items() if ms}
    return [shape | {"series": name, "ms": ms, "said": f"{name}, {at}: {ms:.6g} ms"} for name, ms in known.items()]


def _panels(timed: str, lengths: Sequence[int], *, header: bool, footer: bool) -> Any:
    """A pass by d_model; the widths stand above the first row and the lengths' title below the last."""
    names = [OURS, PEER, FLOOR]
    short = "datum.value % 1024 ? '' + datum.value : datum.value / 1024 + 'k'"
    ticks = alt.Axis(values=list(lengths), labelExpr=short, labelOverlap=True)
    length = alt.X("seq_len:Q", title="seq_len" if footer else None, axis=ticks)
    ms = alt.Y("ms:Q", title=f"{timed} ms", axis=alt.Axis(format=",~g", values=DECADES))
    legend = alt.Legend(title=None, orient="top", symbolSize=90)
    base = alt.Chart().transform_filter(f"datum.timed == '{timed}'")
    base = base.encode(
        x=length.scale(type="log", base=2, nice=False, padding=10),
        y=ms.scale(type="log", nice=False, padding=8),
        color=alt.Color("series:N", legend=legend).scale(domain=names, range=list(COLOUR.values())),
        description="said:N",
    )
    shape = alt.Shape("series:N", title=None).scale(domain=names, range=list(SHAPE.values()))
    lines = [  # not one with an encoding, whose dashes would break the outlines of points in the legend
        base.transform_filter(f"datum.series == '{name}'").mark_line(strokeWidth=1.8, strokeDash=list(dash))
        for name, dash in reversed(DASH.items())
    ]
    points = base.transform_filter(f"datum.series != '{FLOOR}'").mark_point(filled=True, size=36, opacity=1)
    layered = alt.layer(*lines, points.encode(shape=shape))
    layered = layered.properties(width=185, height=220, data=alt.NamedData(DATA))
    widths = alt.Header(labelExpr="'d_model ' + datum.value", title=None, labelAnchor="start", labels=header)
    return layered.facet(column=alt.Column("d_model:N", sort="ascending", header=widths), spacing=14)


# --- the page


def table(found: Sequence[Entry]) -> str:
    """A row for each shape. Where ours has no time it says how it ended; a dash is where nothing can be compared."""
    passes = list(dict.fromkeys(entry.timed for entry in found))
    rows: dict[tuple[int, int], list[Any]] = {}
    for entry in found:
        row = rows.setdefault((entry.d_model, entry.seq_len), [entry.d_model, entry.seq_len])
        row += [
            _ms(entry.ours_ms) or ("–" if entry.outcome == "ok" else entry.outcome),
            f"{_ms(entry.peer_ms)} `{entry.peer}`" if entry.peer else "–",
            f"{entry.ratio:.2f}" if entry.ratio else "–",
            f"{entry.of_floor:.0%}" if entry.of_floor else "–",
        ]
    headers = [header for timed in passes for header in (f"{timed}, ms", "best peer", "ours / peer", "of the floor")]
    return tables.DATA["markdown"](Table(["d_model", "seq_len", *headers], list(rows.values())))


def _ms(ms: float | None) -> str | None:
    return f"{ms:.3g}" if ms else None


def section(runs: Sequence[Result]) -> str:
    """What stands between the markers: nothing without runs."""
    if not runs:
        return ""
    charts = {name: (image(group), entries(group)) for name, group in compared(runs).items()}
    names = [run.directory.name for run in runs]
    links = ", ".join(f"[{name}](../results/{name}/report.md)" for name in names)
    parts = [f"{device(runs[0].header)}; {links}.\n{LEGEND}"]
    for name, (file, found) in charts.items():
        what = f"Time of {OURS}, the fastest other backend and the floor against seq_len, {name}"
        parts += [f"### {name}", f"![{what}](img/{file})", folded("Every cell", table(found).rstrip())]
    return "\n\n".join(parts) + "\n"


def named(page: str) -> list[str]:
    """The runs that the page was made of."""
    return NAMED.findall(page[page.index(START) : page.index(END)])


def written(page: str, runs: Sequence[Result]) -> str:
    """The page with its section renewed. Raises `ValueError` where a marker is missing."""
    first = page.index(START) + len(START)
    return page[:first] + section(runs) + page[page.index(END, first) :]


def images(runs: Sequence[Result]) -> dict[str, str]:
    """The SVGs by the names of their files."""
    found = compared(runs) if runs else {}
    return {image(group): drawn(name, group, device(runs[0].header)) for name, group in found.items()}


def main(directories: Sequence[str]) -> None:
    page = PAGE.read_text("utf-8")
    paths = [Path(directory).resolve() for directory in directories] or [RESULTS / name for name in named(page)]
    if elsewhere := [str(path) for path in paths if path.parent != RESULTS]:
        raise RequestError(f"the page links to runs in {RESULTS}, and these are elsewhere: {', '.join(elsewhere)}")
    runs = [attnbench.load(path) for path in paths]
    renewed = written(page, runs)
    IMAGES.mkdir(exist_ok=True)
    for name, svg in images(runs).items():
        (IMAGES / name).write_text(svg, "utf-8")
    PAGE.write_text(renewed, "utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RequestError as error:
        sys.exit(str(error))
