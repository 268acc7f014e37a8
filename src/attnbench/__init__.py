"""attnbench measures attention implementations: speed, memory, correctness and status, over a grid of shapes."""

from attnbench.api import Interrupted, run
from attnbench.backends import backend
from attnbench.case import Case
from attnbench.errors import RequestError
from attnbench.grid import Grid
from attnbench.record import Record
from attnbench.result import Result, load
from attnbench.store import DiskFull

__version__ = "0.1.0"

__all__ = ["Case", "DiskFull", "Grid", "Interrupted", "Record", "RequestError", "Result", "backend", "load", "run"]
