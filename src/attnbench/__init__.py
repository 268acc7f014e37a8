"""attnbench measures attention implementations: speed, memory, correctness and status, over a grid of shapes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnbench.api import run
    from attnbench.backends import backend
    from attnbench.case import Case
    from attnbench.errors import DiskFull, Interrupted, RequestError
    from attnbench.grid import Grid
    from attnbench.kernels import attention as attention
    from attnbench.record import Record
    from attnbench.result import Result, load

__version__ = "0.1.0"

__all__ = ["Case", "DiskFull", "Grid", "Interrupted", "Record", "RequestError", "Result", "backend", "load", "run"]
"""All but `attention`, which needs Triton: a star imports what works everywhere."""

_HOMES = {
    "Case": "case",
    "DiskFull": "errors",
    "Grid": "grid",
    "Interrupted": "errors",
    "Record": "record",
    "RequestError": "errors",
    "Result": "result",
    "attention": "kernels",
    "backend": "backends",
    "load": "result",
    "run": "api",
}
"""The module of each public name. It is loaded where the name is first used: commands and workers start without the rest."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
