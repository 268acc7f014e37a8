"""Published runs that come with attnbench, to be named wherever a run directory is: `reference:h200`.

A wheel carries them beside this file; a checkout has them under results/, where they are published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from attnbench.errors import RequestError, unknown
from attnbench.record import Record
from attnbench.store import HEADER, Header, read_run

PREFIX = "reference:"

_H200 = {
    "h200-bf16": "seed-bf16-h200-2026-11-24",
    "h200-tf32": "seed-fp32-tf32-h200-2026-11-24",
    "h200-ieee": "seed-fp32-ieee-h200-2026-11-24",
}

PUBLISHED: dict[str, tuple[str, ...]] = {"h200": tuple(_H200.values())} | {name: (run,) for name, run in _H200.items()}
"""Names, and the runs that each stands for: one, or several of the same machine without a cell in common.

pyproject.toml lists the same directories, for the wheel.
"""

PLACES = (Path(__file__).parent / "results", Path(__file__).parents[2] / "results")
"""Where they are: in an installed package, in a checkout."""


def is_published(directory: Path) -> bool:
    """Whether this is a name of a published run, and not a directory."""
    return str(directory).startswith(PREFIX)


def read_published(name: Path) -> tuple[Header, list[Record]]:
    """The published run of a name, `reference:…`.

    Raises:
        RequestError: no run is published by that name, or the installation lacks it.
    """
    if (asked := str(name).removeprefix(PREFIX)) not in PUBLISHED:
        raise unknown("published run", str(name), [PREFIX + known for known in PUBLISHED])
    runs = [read_run(_place(directory)) for directory in PUBLISHED[asked]]
    return joined([header for header, _ in runs]), [record for _, records in runs for record in records]


def _place(directory: str) -> Path:
    for place in PLACES:
        if (place / directory / HEADER).exists():
            return place / directory
    raise RequestError(f"this installation of attnbench lacks its published run {directory}; install it anew")


def joined(headers: Sequence[Header]) -> Header:
    """One header for several runs of the same machine: what they were asked for together, the time of all of them."""
    first = headers[0]
    if len(headers) == 1:
        return first
    ceilings = first.ceilings
    if any(header.ceilings != ceilings for header in headers):
        ceilings = {"reason": "each of these runs has its own"}
    spent: dict[str, float] = {}
    for header in headers:
        for name, seconds in (header.seconds or {}).items():
            spent[name] = round(spent.get(name, 0.0) + seconds, 1)
    return replace(
        first,
        run_id="+".join(header.run_id for header in headers),
        started_at=min(header.started_at for header in headers),
        request=_together([header.request for header in headers]),
        cells=sum(header.cells for header in headers),
        seconds=spent or None,
        ceilings=ceilings,
    )


def _together(several: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Lists end to end without repetition, tables key by key, and of all else the first."""
    joined = dict(several[0])
    for name, value in joined.items():
        others = [values[name] for values in several if name in values]
        if isinstance(value, dict):
            joined[name] = _together(others)
        elif isinstance(value, list) and name != "shard":
            joined[name] = list(dict.fromkeys(item for other in others for item in other))
    return joined
