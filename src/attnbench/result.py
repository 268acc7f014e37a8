"""A run's outcome in Python: its records, as tables and documents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from attnbench.errors import RequestError
from attnbench.published import is_published, read_published
from attnbench.record import Record
from attnbench.report import render
from attnbench.store import Run, read_run

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Result(Run):
    """A run with the ways out of it that Python wants."""

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a record, one column a field, in the schema's order.

        Raises:
            RequestError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise RequestError("to_dataframe needs pandas; install it by: pip install 'attnbench[dataframe]'") from None
        return pandas.DataFrame(
            [record.to_dict() for record in self.records], columns=list(Record.__dataclass_fields__)
        )

    def to_markdown(self, layout: str = "full") -> str:
        """The report; `layout` is `full`, or `seed` for a run of one backend. Raises `RequestError` as `render` does."""
        return render(self, "markdown", layout)


def load(directory: str | Path) -> Result:
    """The run in a directory, whether finished or not, or a published one by its name, such as `reference:h200`.

    Raises:
        RequestError: there is no run, or not one that this attnbench can read.
    """
    path = Path(directory)
    return Result(path, *(read_published(path) if is_published(path) else read_run(path)))
