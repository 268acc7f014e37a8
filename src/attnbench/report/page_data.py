"""What the page holds of a run, as JSON that is small: numbers rounded, long names once, of many samples a part."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from attnbench.record import PASSES, STATUSES, Record
from attnbench.report import repeat
from attnbench.report.answers import answers
from attnbench.report.charts import CHARTS, Subject, spec
from attnbench.report.charts import PASSES as DRAWN
from attnbench.report.figures import baseline_of, capacity_MiB
from attnbench.report.groups import groups
from attnbench.report.themes import COLOURS, DASHES, SHAPES, THEMES, config
from attnbench.store import Run
from attnbench.tags import TAGS
from attnbench.tolerance import TOLERANCE

MOST_SAMPLES = 200_000
"""Samples that a page holds of a whole run; each pass keeps its share of them, and no fewer than `LEAST_SAMPLES`."""

LEAST_SAMPLES = 12

_KERNELS = ("kernels_forward", "kernels_backward")
_SAMPLES = tuple(f"{name}_samples_ms" for name in PASSES)
_LEFT_OUT = {"run_id", "device", "schema_version", "windows", *_KERNELS, *_SAMPLES}
"""Fields of a record that are the same throughout, or stand in the page in another form."""

_OF_A_WINDOW = ("round", "samples", "sm_clock_MHz", "power_W", "temperature_C", "clock_events", "discarded")


def page_data(run: Run) -> dict[str, Any]:
    """All that the page's script reads.

    `cells` are rows under `fields`, without the fields that no record has; `kernels` and `groups` are names that cells
    give by their number. Raises `MissingLibrary` where altair is not installed.
    """
    subject = Subject.of(run.records, run.header.request["backends"], capacity_MiB(run.header))
    place = {name: index for index, name in enumerate(subject.backends)}
    records = sorted(run.records, key=lambda one: (one.d_model, one.seq_len, place[one.backend]))
    told = answers(run)
    by_name = groups(run.records)
    group_of = {record.cell_id: number for number, own in enumerate(by_name.values()) for record in own}
    names = [field.name for field in fields(Record) if field.name not in _LEFT_OUT]
    kept = [name for name in names if any(getattr(one, name) not in (None, ()) for one in run.records)]
    most = max(LEAST_SAMPLES, MOST_SAMPLES // max(1, len(PASSES) * len(run.records)))
    kernels: dict[str, int] = {}
    cells = [
        [
            *(_rounded(getattr(record, name)) for name in kept),
            group_of[record.cell_id],
            record.outcome,
            record.peak_MiB and _rounded(record.peak_MiB),
            TOLERANCE.get((record.dtype, record.precision)),
            repeat.of_cell(record, run.header.request),
            [[kernels.setdefault(name, len(kernels)) for name in getattr(record, field)] for field in _KERNELS],
            [_samples(getattr(record, name), most) for name in _SAMPLES],
            [[_rounded(_of_window(window, name)) for name in _OF_A_WINDOW] for window in record.windows],
        ]
        for record in records
    ]
    extra = ("group", "outcome", "peak_MiB", "tolerance", "command", "kernels", "samples", "windows")
    return {
        "fields": [*kept, *extra],
        "windowFields": _OF_A_WINDOW,
        "cells": cells,
        "kernels": list(kernels),
        "groups": list(by_name),
        "backends": list(subject.backends),
        "baseline": baseline_of(list(subject.backends)),
        "statuses": STATUSES,
        "tags": {name: tag.about for name, tag in TAGS.items()},
        "answers": [_compact(answer.to_dict()) for answer in told],
        "passes": [name for name in DRAWN if any(answer.what == name for answer in told)],
        "command": repeat.of_run(run.header.request),
        "device": run.header.request["device"],
        "colours": COLOURS,
        "dashes": DASHES,
        "shapes": SHAPES,
        "charts": {name: spec(name, subject) for name in CHARTS},
        "themes": {name: config(name) for name in THEMES if name != "paper"},
    }


def script_json(values: Any) -> str:
    """JSON that may stand inside a `<script>`: nothing in it ends the element or begins a comment."""
    return json.dumps(values, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _samples(samples: Sequence[float], most: int) -> list[Any]:
    """How many there are, and at most `most` of them, evenly from first to last, to four digits."""
    step = max(1, -(-len(samples) // most))
    return [len(samples), [float(f"{sample:.4g}") for sample in samples[::step]]]


def _of_window(window: Mapping[str, Any], name: str) -> Any:
    value = window.get(name)
    return max(value.values(), default=0) if name == "samples" and value else value


def _compact(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _rounded(value) for name, value in values.items()}


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
