"""The display of a run on a terminal. Loads rich, which nothing else of a run needs."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from attnbench.plan import Cell, Plan
from attnbench.progress import Forecast, clock, describe, outcome
from attnbench.record import Record


class Live:
    """Finished cells scroll by above a bar that says what is at work and how long it will take."""

    def __init__(self, plan: Plan, done: set[str]) -> None:
        self._forecast = Forecast(plan, done)
        self._progress = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("about {task.fields[left]} to go"),
            TextColumn("{task.description}", style="dim", markup=False),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=len(plan.cells), completed=len(done), left=clock(plan.seconds))

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def working(self, cell: Cell) -> None:
        self._progress.update(self._task, description=describe(cell), left=clock(self._forecast.seconds_left()))

    def finished(self, cell: Cell, record: Record) -> None:
        self._forecast.finished(cell)
        colour = {"ok": "green", "unsupported": "dim", "oom": "yellow", "timeout": "yellow"}.get(record.status, "red")
        line = Text.assemble(describe(cell), "  ", (outcome(record), colour))  # no markup: reasons may hold brackets
        self._progress.console.print(line, highlight=False)
        self._progress.update(self._task, advance=1, left=clock(self._forecast.seconds_left()))
