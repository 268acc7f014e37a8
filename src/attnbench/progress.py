"""What a sweep shows while it runs: a live bar with the time to go on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Protocol

from attnbench.plan import Cell, Plan
from attnbench.record import Record


class Forecast:
    """Time to go, from the plan's forecast corrected by how long the finished cells took.

    `done` are ids of cells that an earlier run finished.
    """

    def __init__(self, plan: Plan, done: set[str]) -> None:
        self._foreseen = {cell.id: cell.seconds for cell in plan.cells if cell.id not in done}
        self._left_s = sum(self._foreseen.values())
        self._all_s = self._left_s
        self._began = time.monotonic()

    def finished(self, cell: Cell) -> None:
        self._left_s -= self._foreseen.pop(cell.id, 0.0)

    def seconds_left(self) -> float:
        """Early on the forecast is trusted, later what was seen: after a tenth of the work both count alike."""
        done_s = self._all_s - self._left_s
        if done_s <= 0:
            return self._left_s
        seen = (time.monotonic() - self._began) / done_s
        trust = done_s / (done_s + self._all_s / 10)
        return self._left_s * (trust * seen + (1 - trust))


def clock(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def describe(cell: Cell) -> str:
    case = cell.case
    parts = [cell.backend, f"d_model {case.d_model}", f"seq_len {case.seq_len}", case.dtype]
    if case.dtype == "float32":
        parts.append(case.precision)
    if case.causal:
        parts.append("causal")
    return "  ".join(parts)


def outcome(record: Record) -> str:
    if record.status != "ok":
        return record.outcome + (f": {record.reason}" if record.reason and record.status != "oom" else "")
    backward = f", backward {record.backward_ms:.4g} ms" if record.backward_ms is not None else ""
    peak = f", peak {record.peak_MiB:.0f} MiB" if record.peak_MiB is not None else ""
    tags = f"  [{', '.join(record.tags)}]" if record.tags else ""
    return f"ok  forward {record.forward_ms:.4g} ms{backward}{peak}{tags}"


class Display(Protocol):
    """A `Watcher` that is entered for the length of the sweep."""

    def __enter__(self) -> object: ...

    def __exit__(self, *_: object) -> None: ...

    def working(self, cell: Cell) -> None: ...

    def finished(self, cell: Cell, record: Record) -> None: ...


class Silent:
    """Shows nothing."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def working(self, cell: Cell) -> None: ...

    def finished(self, cell: Cell, record: Record) -> None: ...


class Lines(Silent):
    """A line on standard error for each finished cell."""

    def __init__(self, plan: Plan, done: set[str]) -> None:
        self._forecast = Forecast(plan, done)
        self._total, self._count = len(plan.cells), len(done)

    def finished(self, cell: Cell, record: Record) -> None:
        self._forecast.finished(cell)
        self._count += 1
        left = f"  (about {clock(self._forecast.seconds_left())} to go)" if self._count < self._total else ""
        line = f"[{self._count}/{self._total}] {describe(cell)}  {outcome(record)}{left}\n"
        with suppress(BrokenPipeError):  # whoever reads along may stop; the sweep does not
            sys.stderr.write(line)
            sys.stderr.flush()


def display(plan: Plan, done: set[str], *, quiet: bool = False) -> Display:
    """The display that fits: nothing if `quiet`, a live bar on a terminal, lines elsewhere."""
    if quiet:
        return Silent()
    if not sys.stderr.isatty():
        return Lines(plan, done)
    from attnbench.live import Live

    return Live(plan, done)
