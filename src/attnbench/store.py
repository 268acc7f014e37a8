"""The run directory: run.json for what was asked and where, records.jsonl for what came of it, one finished cell a line.

A record is written whole, in one call, and flushed to the disk before the next cell starts, so a killed run loses at
most the cell in hand. A last line that a kill tore is dropped when the run goes on.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from attnbench.errors import DiskFull, RequestError
from attnbench.noise import wander
from attnbench.record import FAILURES, SCHEMA_VERSION, Record
from attnbench.schema import misfit, read_json

HEADER, RECORDS = "run.json", "records.jsonl"


@dataclass(frozen=True)
class Header:
    """run.json: the run's id, the request, the machine, the cells planned and where the time went.

    `seconds` is filled in when the run ends: `start` (processes, libraries, the plan), `calibration`, `compile`,
    `correctness`, `memory`, `timing` (warming up included), `idle` (all else) and `whole`. `ceilings` are the device's
    measured rates (`attnbench.limits.Ceilings`). `pulses_ms` are times of one fixed piece of work on a CPU, taken all through
    the run (`attnbench.measure.pulse`); `wander` is how far they lie apart.
    """

    run_id: str
    started_at: str
    request: dict[str, Any]
    machine: dict[str, Any]
    attnbench: str
    cells: int
    seconds: dict[str, float] | None = None
    ceilings: dict[str, Any] | None = None
    pulses_ms: tuple[float, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def wander(self) -> float | None:
        """How far the machine's own speed moved during the run, ± relatively; None where nobody looked."""
        return wander(self.pulses_ms)


@dataclass(frozen=True)
class Run:
    """A run as its directory keeps it, finished or not."""

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


def read_header(directory: Path) -> Header:
    """A run's header. Raises `RequestError` where the directory holds no run that this attnbench can read."""
    path = directory / HEADER
    try:
        values = read_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        what = "is not a run directory: it has no run.json" if directory.is_dir() else "does not exist"
        what = "is a file" if directory.is_file() else what
        raise RequestError(f"{directory} {what}; a run directory is what `attnbench run --out DIR` leaves") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RequestError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict) or values.get("schema_version") != SCHEMA_VERSION:
        found = values.get("schema_version") if isinstance(values, dict) else None
        raise RequestError(f"{path} has schema {found}; this attnbench reads schema {SCHEMA_VERSION}")
    if isinstance(pulses := values.get("pulses_ms"), list):
        values["pulses_ms"] = tuple(pulses)
    try:
        header = Header(**values)
    except TypeError as error:
        raise RequestError(f"{path} is not the header of a run: {error}") from None
    if wrong := misfit(header):
        raise RequestError(f"{path} is not the header of a run: its {wrong}")
    return header


NEEDED: dict[str, dict[str, Any]] = {"request": {"device": str, "protocol": str}}
"""What every reader of a run takes from its header, and of which types it has to be."""

TOLD: dict[str, dict[str, Any]] = {
    "request": {"budget_s": (int, float), "seed": int, "backends": list},
    "machine": dict.fromkeys(("cpu", "system", "kernel", "python"), str)
    | dict.fromkeys(("physical_cores", "memory_MiB"), int)
    | {"packages": dict, "gpus": list},
}
"""The same of documents, which tell of the machine and how it was measured."""


def require(directory: Path, header: Header, needed: dict[str, dict[str, Any]] = TOLD) -> None:
    """Raises `RequestError` where a header lacks what a reader needs."""
    for name, types in needed.items():
        part = getattr(header, name)
        if missing := [key for key, wanted in types.items() if not isinstance(part.get(key), wanted)]:
            raise RequestError(
                f"{directory / HEADER} is not the header of a run: its {name} tells no {', '.join(missing)}"
            )


def read_run(directory: Path) -> tuple[Header, list[Record]]:
    """A run: its header, and its finished cells in the order they finished.

    Raises:
        RequestError: the directory holds no run, or a line other than a torn last one is no record.
    """
    header = read_header(directory)
    require(directory, header, NEEDED)
    return header, read_records(directory)


def read_records(directory: Path) -> list[Record]:
    """The finished cells of a run, in the order they finished.

    Raises:
        RequestError: the directory holds no run, or a line other than a torn last one is no record.
    """
    return _parse(directory / RECORDS, read_header(directory).run_id)[0]


def _parse(path: Path, run_id: str) -> tuple[list[Record], int]:
    """The records of a run in a file and the length in bytes of what was sound."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RequestError(f"{path.parent} is damaged: it has {HEADER}, but no {RECORDS}") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    *lines, torn = data.split(b"\n")
    records: list[Record] = []
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        try:
            record = Record.from_dict(read_json(line))
        except ValueError as error:
            raise RequestError(f"{path}, line {number}: {error}") from None
        if record.run_id != run_id:
            raise RequestError(f"{path}, line {number}: a record of another run, {record.run_id}")
        if record.cell_id in seen:
            raise RequestError(f"{path}, line {number}: a second record of {record.cell_id}")
        seen.add(record.cell_id)
        records.append(record)
    return records, len(data) - len(torn)


class Store:
    """A run directory open for writing. A context manager: leaving it closes the file and frees its lock."""

    def __init__(self, directory: Path, header: Header, records: list[Record], descriptor: int) -> None:
        self.directory, self.header, self.records = directory, header, records
        self._descriptor = descriptor

    @classmethod
    def create(cls, directory: Path, header: Header) -> Store:
        """A new run directory.

        Raises:
            RequestError: the directory holds a run or anything else, or cannot be written.
        """
        refuse_occupied(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(directory / RECORDS, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            _lock(descriptor, directory)
            write_whole(directory / HEADER, _to_json(header))
        except (OSError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            why = getattr(error, "strerror", None) or error
            raise RequestError(f"{directory} cannot be written: {why}; choose another --out") from None
        return cls(directory, header, [], descriptor)

    @classmethod
    def resume(cls, directory: Path) -> Store:
        """The run in a directory, to go on with; a torn last line is cut off.

        Raises:
            RequestError: there is no run, it is damaged, another process writes to it, or it cannot be written.
        """
        header = read_header(directory)
        try:
            descriptor = os.open(directory / RECORDS, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise RequestError(f"{directory} cannot be written: {error.strerror}") from None
        _lock(descriptor, directory)
        records, sound = _parse(directory / RECORDS, header.run_id)
        os.ftruncate(descriptor, sound)
        return cls(directory, header, records, descriptor)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._descriptor)

    @property
    def done(self) -> set[str]:
        """Ids of the finished cells."""
        return {record.cell_id for record in self.records}

    def append(self, record: Record) -> None:
        """Adds a finished cell and flushes it to the disk.

        Raises:
            DiskFull: it could not be written; nothing of it is left behind.
        """
        line = (json.dumps(record.to_dict(), allow_nan=False) + "\n").encode()
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            written = os.write(self._descriptor, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, end)
            raise DiskFull(f"{self.directory / RECORDS} cannot be written: {error.strerror or error}") from None
        self.records.append(record)

    def write(self, name: str, text: str) -> None:
        """A document beside the records. Raises `DiskFull` where it cannot be written."""
        try:
            write_whole(self.directory / name, text)
        except OSError as error:
            raise DiskFull(f"{self.directory / name} cannot be written: {error.strerror or error}") from None

    def finish(self, header: Header) -> None:
        """Replaces run.json. Raises `DiskFull` where it cannot be written."""
        self.header = header
        self.write(HEADER, _to_json(header))


def refuse_occupied(directory: Path) -> None:
    """Raises `RequestError` if a new run cannot be put into `directory`."""
    try:
        if directory.exists() and not directory.is_dir():
            raise RequestError(f"{directory} is a file; --out takes a directory")
        if (directory / HEADER).exists():
            raise RequestError(f"{directory} holds a run already; go on with it by --resume, or choose another --out")
        if directory.is_dir() and any(directory.iterdir()):
            raise RequestError(f"{directory} is not empty and holds no run; choose another --out")
    except OSError as error:
        raise RequestError(f"{directory} cannot be read: {error.strerror}; choose another --out") from None


def _lock(descriptor: int, directory: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise RequestError(
            f"another attnbench is writing to {directory}; wait for it, or choose another --out"
        ) from None


def _to_json(header: Header) -> str:
    return json.dumps(header.__dict__, indent=2) + "\n"


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a kill in the middle, finds the old one or the new one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
