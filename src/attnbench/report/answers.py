"""What a run comes to: the fastest right backend for each of its shapes and passes, and whether that is certain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from attnbench.analysis.recommend import recommend
from attnbench.analysis.wish import PASSES, Wish
from attnbench.errors import RequestError
from attnbench.record import Record
from attnbench.report.groups import groups
from attnbench.store import Run


@dataclass(frozen=True)
class Answer:
    """The fastest of one shape and pass; `margin` is by how much the runner-up is slower, relatively.

    `tied` are the backends, the fastest among them, that noise cannot tell from it. `noise` is the relative uncertainty
    of `ms`. Where no backend was right or none was timed, all but the shape is None.
    """

    group: str
    seq_len: int
    d_model: int
    what: str
    backend: str | None = None
    ms: float | None = None
    noise: float | None = None
    runner_up: str | None = None
    margin: float | None = None
    tied: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in (None, ())}


def answers(run: Run) -> list[Answer]:
    """One for each group, shape and pass that the run timed.

    Under the seed's protocol what it calls backward is a whole step, and keeps that name here.
    """
    passes = {name: name for name in PASSES}
    if run.header.request.get("protocol") == "seed":
        passes = {"forward": "forward", "step": "backward"}
    return [
        _answer(run, group, shape, own, what, name)
        for group, records in groups(run.records).items()
        for shape, own in _shapes(records).items()
        for what, name in passes.items()
        if any(getattr(record, f"{_TIMED[name]}_ms") for record in run.records)
    ]


_TIMED = {name: one.time for name, one in PASSES.items()}


def _shapes(records: Sequence[Record]) -> dict[tuple[int, int], list[Record]]:
    found: dict[tuple[int, int], list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.seq_len, record.d_model)):
        found.setdefault((record.seq_len, record.d_model), []).append(record)
    return found


def _answer(run: Run, group: str, shape: tuple[int, int], records: list[Record], what: str, name: str) -> Answer:
    try:
        told = recommend(replace(run, records=records), Wish(what=what))
    except RequestError:  # no backend was right
        return Answer(group, *shape, name)
    first, second = told.winner, told.runner_up
    tied = [one.backend for one in told.candidates[1:] if told.too_close(one)]
    return Answer(
        group,
        *shape,
        name,
        first.backend,
        first.ms,
        first.noise,
        second and second.backend,
        second and told.margin(second),
        (first.backend, *tied) if tied else (),
    )
