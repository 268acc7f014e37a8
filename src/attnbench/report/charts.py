"""The charts: one definition, as Vega-Lite, for the page and for files.

A specification holds no numbers. It reads the rows that `rows` makes of records, and two parameters: `timed`, the pass,
and `baseline`, the backend that speed-ups are over. Only cells that are `ok` give points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from attnbench.errors import MissingLibrary
from attnbench.record import Record
from attnbench.report.themes import COLOURS, DASHES, NEUTRAL, SHAPES

PASSES = {"forward": "forward", "backward": "backward", "step": "forward_backward"}
"""What a chart can be of, and the name by which a record keeps its times."""

DATA = "cells"


def rows(records: Iterable[Record]) -> list[dict[str, Any]]:
    """What charts read of records: of each pass its time, spread, noise, peak, floor and fraction of the limit."""
    return [_row(record) for record in records]


def _row(record: Record) -> dict[str, Any]:
    row: dict[str, Any] = {
        name: getattr(record, name) for name in ("backend", "seq_len", "d_model", "status", "outcome")
    }
    floors = {"forward": record.floor_forward_ms, "backward": record.floor_backward_ms}
    both = None if None in floors.values() else sum(floor or 0.0 for floor in floors.values())
    for name, time in PASSES.items():
        floor, ms = floors.get(name, both), getattr(record, f"{time}_ms")
        row |= {f"{name}_{what}": getattr(record, f"{time}_{what}") for what in ("ms", "iqr_ms", "noise")}
        row[f"{name}_peak_MiB"] = record.forward_peak_MiB if name == "forward" else record.peak_MiB
        row[f"floor_{name}_ms"] = floor
        row[f"limit_{name}"] = (
            getattr(record, f"limit_{name}") if name in floors else floor / ms if floor and ms else None
        )
    return row


@dataclass(frozen=True)
class Subject:
    """What a chart is of: the backends in the order of their colours, the lengths, and the memory of the device."""

    backends: Sequence[str]
    seq_lens: Sequence[int]
    capacity_MiB: float | None = None

    @classmethod
    def of(cls, records: Sequence[Record], backends: Iterable[str], capacity_MiB: float | None) -> Subject:
        """`backends` give the order; those that no record is of have no colour."""
        there = dict.fromkeys(record.backend for record in records)
        names = dict.fromkeys([*(name for name in backends if name in there), *there])
        return cls(list(names), sorted({record.seq_len for record in records}), capacity_MiB)


def spec(chart: str, subject: Subject, *, timed: str = "forward", baseline: str | None = None) -> dict[str, Any]:
    """A chart's Vega-Lite, which reads the data set `cells`.

    Raises:
        MissingLibrary: altair is not installed.
    """
    try:
        import altair as alt
    except ImportError:
        raise MissingLibrary("a chart", "altair", "report") from None
    made = CHARTS[chart].make(_Maker(alt, subject))
    made = made.add_params(alt.param(name="timed", value=timed), alt.param(name="baseline", value=baseline or ""))
    return made.to_dict()


class _Maker:
    """The charts of a subject, each a method; `alt` is altair, which is loaded only where a chart is made."""

    def __init__(self, alt: Any, subject: Subject) -> None:
        self.alt, self.subject = alt, subject

    # --- lines over seq_len

    def time(self) -> Any:
        alt = self.alt
        floor = (
            self._cells()
            .transform_calculate(floor="datum['floor_' + timed + '_ms']")
            .transform_filter("isValid(datum.floor)")
            .transform_aggregate(floor="min(floor)", groupby=["seq_len", "d_model"])
            .encode(x=self._length(), y=alt.Y("floor:Q", title="ms"))
        )
        line = floor.mark_line(color=NEUTRAL, strokeDash=[3, 3], strokeWidth=1.5)
        first = floor.transform_joinaggregate(first="min(seq_len)", groupby=["d_model"])
        first = first.transform_filter("datum.seq_len == datum.first")
        label = first.mark_text(text="floor", style="muted", align="left", dx=8, dy=8, fontStyle="italic")
        return self._panels(line, label, *self._marks(self._timed(), "value", "ms"))

    def speedup(self) -> Any:
        alt = self.alt
        own = "datum.backend == baseline ? datum.{} : null"
        ratios = (
            self._timed()
            .transform_calculate(base=own.format("value"), base_error=own.format("error"))
            .transform_joinaggregate(base="max(base)", base_error="max(base_error)", groupby=["seq_len", "d_model"])
            .transform_filter("isValid(datum.base) && datum.base > 0 && datum.backend != baseline")
            .transform_calculate(
                speedup="datum.base / datum.value", error="sqrt(pow(datum.error, 2) + pow(datum.base_error, 2))"
            )
            .transform_calculate(low="datum.speedup / (1 + datum.error)", high="datum.speedup * (1 + datum.error)")
        )
        title = "times as fast as the baseline"
        even = self._once().mark_rule(color=NEUTRAL, strokeDash=[3, 3], strokeWidth=1.5).encode(y=alt.datum(1))
        return self._panels(even, *self._marks(ratios, "speedup", title, base=2))

    def memory(self) -> Any:
        alt, capacity = self.alt, self.subject.capacity_MiB
        title = "peak MiB"
        peaks = (
            self._cells()
            .transform_filter(_OK)
            .transform_calculate(value="datum[timed + '_peak_MiB']")
            .transform_filter("isValid(datum.value) && datum.value > 0")
        )
        stopped = (
            self._cells()
            .transform_filter("datum.status == 'oom'")
            .transform_aggregate(first="argmin(seq_len)", seq_len="min(seq_len)", groupby=["backend", "d_model"])
            .transform_window(rank="row_number()", groupby=["d_model", "seq_len"])
            .transform_calculate(
                outcome="datum.first.outcome", beyond=f"{capacity or 0} * pow(1.5, (datum.rank - 1) % 6 + 1)"
            )
            .mark_point(shape="M-.6,-.6L.6,.6M.6,-.6L-.6,.6", size=60, strokeWidth=2, filled=False, opacity=1)
            .encode(
                x=self._length(),
                y=alt.Y("beyond:Q", title=title) if capacity else alt.value(6),  # one above the other, off the scale
                color=self._colour(),
                tooltip=self._tips(backend="backend", outcome="from here"),
            )
        )
        layers = [*self._marks(peaks, "value", title, bars=False), stopped]
        if capacity:
            device = self._once().encode(y=alt.Y(datum=capacity, title=title))
            rule = device.mark_rule(color=NEUTRAL, strokeWidth=1.5)
            said = f"the device: {capacity / 1024:.4g} GiB"
            layers = [
                rule,
                device.mark_text(text=said, style="muted", align="left", dx=4, dy=10).encode(x=alt.value(0)),
                *layers,
            ]
        return self._panels(*layers)

    # --- tables by colour

    def limit(self) -> Any:
        cells = self._cells().transform_calculate(share="datum['limit_' + timed]")
        right = cells.transform_filter(f"{_OK} && isValid(datum.share)")
        colour = self.alt.Color("share:Q", title="of the limit").scale(domain=[0, 1], clamp=True)
        text = self.alt.Text("share:Q", format=".0%")
        layers = self._written(
            right, colour.legend(format=".0%", gradientLength=120), text, "datum.share > 0.62", share="of the limit"
        )
        short = "{oom: 'oom', incorrect: 'wrong', unsupported: '–', timeout: 'time', crash: 'crash', error: 'error'}"
        failed = cells.transform_filter(f"!({_OK})").transform_calculate(short=f"{short}[datum.status]")
        tips = self._tips(backend="backend", outcome="status")
        layers.append(failed.mark_text(style="muted").encode(text="short:N", tooltip=tips))
        length = self.alt.X("seq_len:O", title="seq_len", axis=self.alt.Axis(labelExpr=_LENGTH, labelAngle=0))
        return self._table(layers, length, 46).facet(self._panel(), columns=2)

    def frontier(self) -> Any:
        """Where nothing ran it says how the shortest failed."""
        lengths = list(self.subject.seq_lens)
        reached = (
            self._cells()
            .transform_calculate(ran=f"{_OK} ? datum.seq_len : 0")
            .transform_joinaggregate(reached="max(ran)", groupby=["backend", "d_model"])
            .transform_calculate(beyond=f"!({_OK}) && datum.seq_len > datum.reached ? datum.seq_len : 1e15")
            .transform_aggregate(reached="max(reached)", next="argmin(beyond)", groupby=["backend", "d_model"])
            .transform_calculate(stop="datum.next.beyond < 1e15 ? datum.next.outcome : ''")
            .transform_calculate(
                said="!datum.reached ? datum.stop : datum.reached + (datum.stop ? ', then ' + datum.stop : '')"
            )
        )
        colour = self.alt.Color("reached:O", legend=None).scale(domain=lengths)
        large = f"datum.reached > {lengths[int(0.62 * (len(lengths) - 1))] if lengths else 0}"
        layers = self._written(reached.transform_filter("datum.reached > 0"), colour, "said:N", large, said="reached")
        layers.append(reached.transform_filter("!datum.reached").mark_text(style="muted").encode(text="said:N"))
        return self._table(layers, self.alt.X("d_model:O", title="d_model", axis=self.alt.Axis(labelAngle=0)), 150)

    # --- what they are made of

    def _cells(self) -> Any:
        return self.alt.Chart()

    def _once(self) -> Any:
        """One row for each panel, for what is drawn once."""
        return self._cells().transform_aggregate(cells="count()")

    def _timed(self) -> Any:
        """Right cells, with their time and its relative uncertainty; half the quartiles' distance where that is not known."""
        half = "datum[timed + '_iqr_ms'] / 2 / datum.value"
        return (
            self._cells()
            .transform_filter(_OK)
            .transform_calculate(value="datum[timed + '_ms']", noise="datum[timed + '_noise']")
            .transform_filter("isValid(datum.value) && datum.value > 0")
            .transform_calculate(
                error=f"isValid(datum.noise) ? datum.noise : isValid(datum[timed + '_iqr_ms']) ? {half} : 0"
            )
            .transform_calculate(low="datum.value / (1 + datum.error)", high="datum.value * (1 + datum.error)")
        )

    def _marks(self, chart: Any, name: str, title: str, *, bars: bool = True, base: int = 10) -> list[Any]:
        """A line, error bars and points for each backend."""
        alt, names = self.alt, list(self.subject.backends)
        dashes = [list(DASHES[i // len(COLOURS) % len(DASHES)]) for i in range(len(names))]
        shapes = [SHAPES[i % len(SHAPES)] for i in range(len(names))]
        dash = alt.StrokeDash("backend:N", title=None).scale(domain=names, range=dashes)
        shape = alt.Shape("backend:N", title=None).scale(domain=names, range=shapes)
        axis = alt.Axis(format=",~g", tickCount=5)
        chart = chart.encode(x=self._length(), color=self._colour())
        y = alt.Y(f"{name}:Q", title=title, axis=axis).scale(type="log", base=base)
        tips = self._tips(**{"backend": "backend", name: title} | ({"error": "uncertainty"} if bars else {}))
        error = chart.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q", title=title), y2="high:Q")
        return [
            chart.mark_line(strokeWidth=1.8).encode(y=y, strokeDash=dash),
            *([error] if bars else []),
            chart.mark_point(filled=True, size=42, opacity=1).encode(y=y, shape=shape, tooltip=tips),
        ]

    def _written(self, chart: Any, colour: Any, text: Any, large: str, **tip: str) -> list[Any]:
        """Cells of a colour with a number on each, which is written to be read on small and on `large` values."""
        texts = [
            chart.transform_filter(condition).mark_text(style=style).encode(text=text)
            for condition, style in ((f"!({large})", "small"), (large, "large"))
        ]
        tips = self._tips(backend="backend", **tip)
        return [chart.mark_rect(cornerRadius=2, strokeWidth=1).encode(color=colour, tooltip=tips), *texts]

    def _colour(self) -> Any:
        names = list(self.subject.backends)
        colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
        legend = self.alt.Legend(title=None, columns=1 + len(names) // 24, symbolLimit=0)
        return self.alt.Color("backend:N", legend=legend).scale(domain=names, range=colours)

    def _length(self) -> Any:
        axis = self.alt.Axis(values=list(self.subject.seq_lens), labelExpr=_LENGTH, labelOverlap=True)
        return self.alt.X("seq_len:Q", title="seq_len", axis=axis).scale(type="log", base=2, nice=False, padding=12)

    def _tips(self, **names: str) -> list[Any]:
        numbers = {"value": ".4g", "speedup": ".3g", "share": ".1%", "error": ".2%"}
        dimensions = {"d_model": "d_model"} | ({} if "said" in names else {"seq_len": "seq_len"})
        return [
            self.alt.Tooltip(f"{name}:Q", title=title, format=numbers.get(name, "d"))
            if name in numbers or name in dimensions
            else self.alt.Tooltip(f"{name}:N", title=title)
            for name, title in (names | dimensions).items()
        ]

    def _panels(self, *layers: Any) -> Any:
        layered = self.alt.layer(*layers).properties(width=280, height=230, data=self.alt.NamedData(DATA))
        return layered.facet(self._panel(), columns=2).resolve_axis(x="independent", y="independent")

    def _panel(self) -> Any:
        header = self.alt.Header(labelExpr="'d_model ' + datum.value", title=None, labelAnchor="start")
        return self.alt.Facet("d_model:N", sort="ascending", header=header)

    def _table(self, layers: list[Any], x: Any, width: int) -> Any:
        y = self.alt.Y("backend:N", title=None).scale(domain=list(self.subject.backends))
        layered = self.alt.layer(*(layer.encode(x=x, y=y) for layer in layers))
        return layered.properties(data=self.alt.NamedData(DATA), width={"step": width}, height={"step": 24})


_OK = "datum.status == 'ok'"
_LENGTH = "datum.value >= 1024 && datum.value % 1024 == 0 ? datum.value / 1024 + 'k' : '' + datum.value"


@dataclass(frozen=True)
class Chart:
    """A chart's title, how to read it, the field that it shows (with the pass in braces), and the method that makes it."""

    title: str
    about: str
    shows: str
    make: Callable[[_Maker], Any]

    @property
    def of_a_pass(self) -> bool:
        return "{" in self.shows


CHARTS = {
    "time": Chart(
        "Time",
        "Median ms by seq_len, both logarithmic. Bars are the uncertainty of the median, the dashed line the hardware's floor.",
        "{}_ms",
        _Maker.time,
    ),
    "speedup": Chart(
        "Speed-up", "The baseline's time over each backend's, where both are right.", "{}_ms", _Maker.speedup
    ),
    "memory": Chart(
        "Memory",
        "Peak MiB by seq_len, and what the device has. A cross is the first length that ran out of memory.",
        "{}_peak_MiB",
        _Maker.memory,
    ),
    "limit": Chart(
        "Fraction of the limit",
        "The floor over the measured time: 100 % is all that this machine can do.",
        "limit_{}",
        _Maker.limit,
    ),
    "frontier": Chart(
        "How far each got",
        "The largest seq_len that ran, by d_model, and what stopped the next.",
        "outcome",
        _Maker.frontier,
    ),
}
"""Every chart by its name on the command line."""
