"""A run's outcome in Python: its records, as tables and documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from attnbench.errors import RequestError
from attnbench.record import FAILURES, Record
from attnbench.store import Header, read_header, read_records

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Result:
    """The records of one run and the directory that keeps them."""

    directory: Path
    header: Header
    records: Sequence[Record]

    @property
    def counts(self) -> dict[str, int]:
        """How many cells ended in each status."""
        return dict(Counter(record.status for record in self.records))

    @property
    def complete(self) -> bool:
        """Whether every planned cell has a record."""
        return len(self.records) >= self.header.cells

    @property
    def exit_code(self) -> int:
        """0, or 3 where some cell is incorrect, crashed or raised."""
        return 3 if any(record.status in FAILURES for record in self.records) else 0

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
        from attnbench.report import render

        return render(self, "markdown", layout)


def load(directory: str | Path) -> Result:
    """The run in a directory, whether finished or not.

    Raises:
        RequestError: there is no run, or not one that this attnbench can read.
    """
    path = Path(directory)
    return Result(path, read_header(path), read_records(path))
