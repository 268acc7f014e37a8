"""From a plan to records: the order of cells, their rounds, and what becomes of those that fail."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import median
from typing import Any, Protocol

from attnbench.case import Case
from attnbench.executors.local import LocalExecutor, WorkerLost
from attnbench.limits import Ceilings, judged
from attnbench.noise import by_round, noise
from attnbench.plan import Cell, Plan
from attnbench.record import Record, summary
from attnbench.request import Request
from attnbench.store import Store
from attnbench.tags import tagged

ROUNDS, CPU_ROUND_S = 3, 0.1
"""Visits of a cell, and how long one lasts on a CPU, where there are as many as its budget has room for, if that is more. The
backends of a case are visited in turn, in a new random order each time, so that drift of the machine's speed falls on all of
them alike. For as long as a visit lasts a shared CPU may be slow, and be fast in the next: how well a time is known there is a
matter of their number."""


class Watcher(Protocol):
    """Whoever wants to know how a sweep goes on."""

    def working(self, cell: Cell) -> None: ...

    def finished(self, cell: Cell, record: Record) -> None: ...


@dataclass
class _Visits:
    """What the visits of one cell have brought so far."""

    cell: Cell
    fields: dict[str, Any] = field(default_factory=dict)
    samples_ms: dict[str, list[float]] = field(default_factory=dict)
    windows: list[dict[str, Any]] = field(default_factory=list)
    seen_ms: dict[str, list[float]] = field(default_factory=dict)
    started_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    seconds: float = 0.0
    count: int = 0
    done: bool = False

    @property
    def sampled_s(self) -> float:
        """How long the samples took on a CPU, where a whole step is a forward and a backward that are samples of their own."""
        return sum(self.samples_ms.get("forward_backward") or self.samples_ms.get("forward", ())) / 1e3


def sweep(plan: Plan, executor: LocalExecutor, store: Store, watcher: Watcher) -> None:
    """Runs every cell of the plan that the store does not hold yet, and appends its record as it ends.

    Raises:
        DiskFull: a record could not be written.
        KeyboardInterrupt: as the user wished; the worker is still at work then, and ends with its executor.
    """
    done = store.done
    for case, cells in plan.by_case():
        _run_case(case, [cell for cell in cells if cell.id not in done], plan, executor, store, watcher)


def rounds_of(request: Request) -> int:
    """How often a cell is visited, unless its samples spend the budget sooner."""
    if request.protocol == "seed":
        return 1
    return max(ROUNDS, round(request.budget_s / CPU_ROUND_S)) if request.device == "cpu" else ROUNDS


def _run_case(
    case: Case, cells: list[Cell], plan: Plan, executor: LocalExecutor, store: Store, watcher: Watcher
) -> None:
    order = random.Random(f"{plan.request.seed}/{case.id}")
    at_work = [_Visits(cell) for cell in cells]
    while at_work:
        order.shuffle(at_work)
        for visits in at_work:
            watcher.working(visits.cell)
            _visit(visits, plan, executor)
            if visits.done:
                record = _record(visits, plan, store)
                store.append(record)
                watcher.finished(visits.cell, record)
        at_work = [visits for visits in at_work if not visits.done]


def _visit(visits: _Visits, plan: Plan, executor: LocalExecutor) -> None:
    """One visit of a cell; sets `done` where it was the last."""
    cell, request = visits.cell, plan.request
    if cell.refusal:
        visits.fields = {"status": "unsupported", "reason": cell.refusal}
        visits.done = True
        return
    rounds = rounds_of(request)
    message = {
        "task": "visit",
        "case": cell.case.to_dict(),
        "backend": cell.backend,
        "source": request.sources.get(cell.backend),
        "first": visits.count == 0,
        "last": visits.count == rounds - 1,
        "budget_s": request.budget_s / rounds,
    }
    began, starting_s = time.monotonic(), executor.starting_s
    reply: dict[str, Any]
    try:
        reply = executor.ask(message, max(0.0, request.timeout_s - visits.seconds), cell.backend)
        if _lacks_memory_of_the_gpu(reply, request.device) and executor.end_others(cell.backend):
            spent = visits.seconds + time.monotonic() - began
            reply = executor.ask(message, max(0.0, request.timeout_s - spent), cell.backend)
    except WorkerLost as lost:
        reply = {"fields": lost.fields}
        if lost.fields["status"] == "timeout":
            lost.fields["reason"] = f"gave no result within {request.timeout_s:.4g} s; see --timeout"
    visits.seconds += time.monotonic() - began - (executor.starting_s - starting_s)
    visits.fields |= reply["fields"]
    visits.windows += [window | {"round": visits.count} for window in reply.get("windows", ())]
    for name, samples in reply.get("samples_ms", {}).items():
        visits.samples_ms.setdefault(name, []).extend(samples)
    for name, seen in reply.get("seen_ms", {}).items():
        visits.seen_ms.setdefault(name, []).append(seen)
    visits.count += 1
    spent = visits.count >= ROUNDS and visits.sampled_s >= request.budget_s
    visits.done = "status" in visits.fields or visits.count == rounds or spent or reply.get("done", False)


def _lacks_memory_of_the_gpu(reply: dict[str, Any], device: str) -> bool:
    """It may be that other workers hold what it needs: those of a framework that gives nothing back."""
    return reply["fields"].get("status") == "oom" and device.startswith("cuda")


def _record(visits: _Visits, plan: Plan, store: Store) -> Record:
    request, cell = plan.request, visits.cell
    seeds_own = request.protocol == "seed"
    fields = {"status": "ok", "backend_version": cell.version, "padded_d_model": cell.padded_d_model} | visits.fields
    if fields["status"] == "ok":
        for name, samples in visits.samples_ms.items():
            fields |= summary(name, samples, mean=seeds_own)
            fields[f"{name}_noise"] = noise(by_round(visits.windows, samples, name))
        fields |= {name: median(seen) for name, seen in visits.seen_ms.items()}
        fields |= _state(visits.windows) | {"windows": tuple(visits.windows)}
    else:  # a cell that failed on a later visit shows no time of the earlier ones
        fields = {name: value for name, value in fields.items() if not name.endswith("_ms") and name != "tags"}
    for name, value in fields.items():
        if isinstance(value, list):
            fields[name] = tuple(value)
    record = Record.of(
        cell.case, cell.backend, run_id=store.header.run_id, device=request.device,
        started_at=visits.started_at, seconds=round(visits.seconds, 3), **fields,
    )  # fmt: skip
    if store.header.ceilings and not seeds_own:
        record = judged(record, Ceilings.from_dict(store.header.ceilings), warm_cache=request.warm_cache)
    return tagged(record)


def _state(windows: list[dict[str, Any]]) -> dict[str, float]:
    """Medians of the device's state over the windows that were kept."""
    names = ("sm_clock_MHz", "power_W", "temperature_C")
    kept = [window for window in windows if "discarded" not in window]
    known = {name: [window[name] for window in kept if name in window] for name in names}
    return {name: median(values) for name, values in known.items() if values}
