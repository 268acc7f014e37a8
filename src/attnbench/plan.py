"""From a request to its cells: what will run, what cannot, and what it will take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from attnbench import backends, forecast
from attnbench.case import Case
from attnbench.errors import RequestError
from attnbench.executors.local import START_TIMEOUT_S, LocalExecutor, WorkerLost
from attnbench.machine import default_memory_limit_bytes, fingerprint
from attnbench.record import cell_id
from attnbench.request import Request


@dataclass(frozen=True)
class Cell:
    """One case on one backend, and what is foreseen of it.

    `refusal` is the backend's reason for not taking the case. `peaks_MiB` are those of forward and backward, as far as
    they are asked for and can be forecast; `fits` tells whether they are within the limit. `padded_d_model` is the head
    dimension that the backend's kernels work on, where it is known to be another than the case's.
    """

    case: Case
    backend: str
    version: str | None
    refusal: str | None
    peaks_MiB: tuple[float, ...]
    fits: bool
    seconds: float
    padded_d_model: int | None = None

    @property
    def id(self) -> str:
        return cell_id(self.case, self.backend)


@dataclass(frozen=True)
class Plan:
    """The cells of a request in the order they run: case by case, and all backends of a case together.

    `left_out` are backends that nobody named and that cannot run here or take no case, with their reasons.
    """

    request: Request
    machine: dict[str, Any]
    cells: tuple[Cell, ...]
    left_out: dict[str, str]
    memory_limit_MiB: float | None

    def by_case(self) -> Iterator[tuple[Case, list[Cell]]]:
        for case, cells in groupby(self.cells, key=lambda cell: cell.case):
            yield case, list(cells)

    @property
    def seconds(self) -> float:
        return sum(cell.seconds for cell in self.cells)

    def will_not_fit(self) -> list[Cell]:
        """Cells whose forecast peak is above the limit. They are run all the same: a forecast is no measurement."""
        return [cell for cell in self.cells if not cell.fits and not cell.refusal]

    def refused(self) -> Counter[tuple[str, str]]:
        """How many cells each (backend, reason) leaves out."""
        return Counter((cell.backend, cell.refusal) for cell in self.cells if cell.refusal)

    def to_dict(self) -> dict[str, Any]:
        return {
            "request": self.request.to_dict(),
            "machine": self.machine,
            "left_out": self.left_out,
            "memory_limit_MiB": self.memory_limit_MiB,
            "seconds": self.seconds,
            "cells": [
                {
                    "cell_id": cell.id,
                    "backend": cell.backend,
                    **cell.case.to_dict(),
                    "unsupported": cell.refusal,
                    "padded_d_model": cell.padded_d_model,
                    "forecast_forward_peak_MiB": cell.peaks_MiB[0] if cell.peaks_MiB else None,
                    "forecast_backward_peak_MiB": cell.peaks_MiB[1] if len(cell.peaks_MiB) > 1 else None,
                    "forecast_seconds": cell.seconds,
                    "will_not_fit": not cell.fits and not cell.refusal,
                }
                for cell in self.cells
            ],
        }


def describe(
    executor: LocalExecutor, names: tuple[str, ...], sources: dict[str, str], cases: list[Case], timeout_s: float
) -> dict[str, Any]:
    """What workers say of the device, and of each backend there; each is asked about in the process it would run in.

    A package that cannot be imported makes its own backends unavailable.

    Raises:
        RequestError: a worker cannot start on the device, or some of a user's own backends cannot be loaded; all of them
            are named.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(backends.worker_of(name), []).append(name)
    asked = {"task": "describe", "sources": sources, "cases": [case.to_dict() for case in cases]}
    told: dict[str, Any] = {}
    problems: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    # torch is loaded by then; what takes long after that is a package or a user's module
    patience_s = {worker: max(30.0, timeout_s) if worker else START_TIMEOUT_S for worker in groups}
    answers = executor.ask_each([
        (asked | {"names": group}, patience_s[worker], group[0]) for worker, group in groups.items()
    ])  # fmt: skip
    for (worker, group), answer in zip(groups.items(), answers, strict=True):
        installed = worker != "" and group[0] in backends.every()
        failed = answer if isinstance(answer, WorkerLost) else answer.get("fields", {}).get("reason")
        if isinstance(answer, WorkerLost) or failed:
            if not installed:
                raise RequestError(f"{', '.join(group)} cannot be loaded: {failed}") from None
            found |= {name: _lost(name, f"loading it failed: {failed}", len(cases)) for name in group}
            continue
        told = told or answer
        for backend in answer["backends"]:
            error = backend.get("error")
            if error and not installed:
                problems.append(error)
            found[backend["name"]] = _lost(backend["name"], error, len(cases)) if error else backend
    if problems:
        raise RequestError("; ".join(problems))
    try:
        told = told or executor.ask(asked | {"names": []}, START_TIMEOUT_S)
    except WorkerLost as lost:
        raise RequestError(f"{', '.join(names)} cannot be loaded: {lost}") from None
    return told | {"backends": [found[name] for name in names]}


def _lost(name: str, reason: str, cases: int) -> dict[str, Any]:
    """What can be told of a backend whose own code failed before it could tell anything."""
    nothing = dict.fromkeys(("version", "memory_model"))
    refusals = {"refusals": [reason] * cases, "padded_d_models": [None] * cases}
    return {"name": name, "about": "", "unavailable": reason, "compiles": False} | nothing | refusals


def make_plan(request: Request, executor: LocalExecutor) -> Plan:
    """The plan of a request.

    Backends that the user named have a record for every case, `unsupported` where it must be; of backends that nobody
    named, the ones that cannot run here are left out, and so are cases they cannot take.

    Raises:
        RequestError: the worker cannot start, a backend cannot be loaded, or nothing is left to run.
    """
    cases = request.cases()
    if not cases:
        raise RequestError(f"shard {request.shard[0]}/{request.shard[1]} of {len(request.grid.cases())} cases is empty")
    told = describe(executor, request.backends, request.sources, cases, request.timeout_s)
    machine = fingerprint() | {"software": told["software"], "threads": told["threads"]}
    limit_MiB = _memory_limit_MiB(request, machine)
    cells = [
        _cell(request, case, backend, index, machine["physical_cores"], limit_MiB)
        for index, case in enumerate(cases)
        for backend in told["backends"]
        if request.named or not backend["refusals"][index]
    ]
    at_work = {cell.backend for cell in cells}
    left_out = {
        backend["name"]: backend["refusals"][0] for backend in told["backends"] if backend["name"] not in at_work
    }
    if not request.named:
        left_out |= backends.refused_plugins()
    if not cells:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise RequestError(f"no backend can run any case on {request.device} ({reasons})")
    return Plan(request, machine, tuple(cells), left_out, limit_MiB)


def _cell(
    request: Request, case: Case, backend: dict[str, Any], index: int, cores: int, limit_MiB: float | None
) -> Cell:
    """The cell of a backend, as it was told of, on the case of that index."""
    refusal, padded = backend["refusals"][index], backend["padded_d_models"][index]
    family, device = backend["memory_model"], request.device.split(":")[0]
    bytes_ = forecast.memory_bytes(case, family, device, backward=request.backward) or ()
    peaks = [peak / forecast.MiB for peak in bytes_ if peak is not None]
    fits = not limit_MiB or max(peaks, default=0) <= limit_MiB
    seconds = forecast.seconds(
        case, family, device, cores, backward=request.backward, budget_s=request.budget_s, fits=fits
    )
    expected_s = 0.0 if refusal else seconds
    return Cell(case, backend["name"], backend["version"], refusal, tuple(peaks), fits, expected_s, padded)


def _memory_limit_MiB(request: Request, machine: dict[str, Any]) -> float | None:
    if request.memory_limit_bytes:
        return request.memory_limit_bytes / forecast.MiB
    if request.device == "cpu":
        return default_memory_limit_bytes() / forecast.MiB
    index = int(request.device.partition(":")[2] or 0)
    gpus = machine["gpus"]
    return gpus[index]["memory_MiB"] if index < len(gpus) else None
