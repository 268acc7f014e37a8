"""A table: what analysis comes to and reports write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows under headers; None is an empty cell."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def without_empty_columns(self) -> Table:
        kept = [i for i in range(len(self.headers)) if any(row[i] not in (None, "") for row in self.rows)]
        return Table([self.headers[i] for i in kept], [[row[i] for i in kept] for row in self.rows])
