"""A sweep from Python; the command line is a dress over it."""

from __future__ import annotations

import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attnbench import backends, calibration, machine
from attnbench.errors import DiskFull, Interrupted, RequestError
from attnbench.executors.local import LocalExecutor
from attnbench.grid import Grid, Spec, preset
from attnbench.plan import Plan, make_plan
from attnbench.progress import Display, display
from attnbench.published import is_published
from attnbench.report import check_layout, documents
from attnbench.request import DEFAULT_BUDGET_S, DEFAULT_TIMEOUT_S, Request, expand_backends, parse_device
from attnbench.result import Result, load
from attnbench.runner import sweep
from attnbench.store import Header, Store, refuse_occupied

SECONDS = ("start", "calibration", "compile", "correctness", "memory", "timing", "idle", "whole")
"""Where the wall time of a run goes."""


def make_request(
    grid: Grid | Spec | str | Mapping[str, Any] = "seed",
    backends: Sequence[str] = (),
    *,
    device: str | None = None,
    budget_s: float | None = None,
    **settings: Any,
) -> Request:
    """A request with every default filled in.

    `grid` is a `Grid`, a preset's name, or a mapping of dimensions to values; `settings` are further fields of `Request`.

    Raises:
        RequestError: anything in it cannot be had.
    """
    spec = _spec(grid)
    if isinstance(backends, str):
        raise RequestError(f"backends = {backends!r} is one name; give a list of them")
    device = parse_device(device) if device is not None else machine.best_device()
    chosen = tuple(backends) or spec.backends
    names = expand_backends(chosen)
    sources = {name: source for name in names if (source := _backend_source(name))}
    given: dict[str, Any] = {
        "budget_s": budget_s if budget_s is not None else DEFAULT_BUDGET_S[device.split(":")[0]]
    } | settings
    return Request(spec.grid, spec.name, names, sources, device, named=bool(chosen), **given)


def _spec(grid: Grid | Spec | str | Mapping[str, Any]) -> Spec:
    if isinstance(grid, str):
        return preset(grid)
    if isinstance(grid, Spec):
        return grid
    values = grid.__dict__ if isinstance(grid, Grid) else grid
    if not isinstance(values, Mapping):
        raise RequestError(f"grid = {grid!r} is no Grid, preset name, or mapping of dimensions to values")
    return Spec(Grid.from_dict(values))


def _backend_source(name: str) -> str | None:
    return backends.source_of(name)


def run(
    grid: Grid | Spec | str | Mapping[str, Any] = "seed",
    backends: Sequence[str] = (),
    *,
    device: str | None = None,
    passes: str = "backward",
    protocol: str = "default",
    clock: str = "sustained",
    warm_cache: bool = False,
    graph: bool = False,
    budget_s: float | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    memory_limit_bytes: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    quiet: bool = True,
) -> Result:
    """Measures every backend on every case of a grid, each cell in a worker process.

    Args:
        grid: a `Grid`, the name of a preset, or a mapping such as `{"seq_len": [256, 1024], "d_model": 64}`.
        backends: names, `FILE.py:function`, or functions decorated by `attnbench.backend`; all that can run if empty.
        device: `cpu`, `cuda` or `cuda:N`; the best one here if None.
        passes: `backward` (forward too) or `forward` alone.
        protocol: `default`, or `seed` for the procedure of the table attnbench began with.
        clock: regime of a GPU's clocks: `sustained`, warmed until they have settled under the load, or `burst`.
        warm_cache: leave a GPU's L2 cache as the call before left it.
        graph: measure each case inside a CUDA graph as well.
        budget_s: seconds to spend on samples of one cell.
        timeout_s: seconds after which a cell is given up.
        memory_limit_bytes: what a worker may hold, on CPU in all and on CUDA on the device.
        seed: of the random inputs.
        out: the run directory; a new one under `runs/` if None.
        resume: go on with the run in `out`.
        quiet: show no progress.

    Raises:
        RequestError: the request cannot be carried out as asked.
        DiskFull: a record could not be written; the ones before it are safe.
        Interrupted: Ctrl-C; the finished cells are safe.
    """
    request = make_request(
        grid, backends, device=device, passes=passes, protocol=protocol, clock=clock, warm_cache=warm_cache, graph=graph,
        budget_s=budget_s, timeout_s=timeout_s, memory_limit_bytes=memory_limit_bytes, seed=seed,
    )  # fmt: skip
    directory = Path(out) if out is not None else default_directory(request)
    if resume:
        return resume_run(directory, request, quiet=quiet)
    return start_run(directory, request, quiet=quiet)


def default_directory(request: Request) -> Path:
    """runs/GRID-DEVICE-TIME."""
    device = request.device.replace(":", "")
    name = re.sub(r"[^\w-]+", "-", request.name).strip("-") or "grid"
    return Path("runs") / f"{name[:60]}-{device}-{datetime.now().strftime('%Y%m%d-%H%M%S')}"


def start_run(directory: Path, request: Request, *, quiet: bool, layout: str = "full") -> Result:
    """Plans and carries out a new run. Raises as `run` does."""
    refuse_occupied(directory)
    check_layout(layout, request.backends, request.cases())

    def create(plan: Plan) -> tuple[Store, float]:
        refuse_occupied(directory)
        ceilings: dict[str, Any]
        try:
            ceilings = calibration.ceilings(request.device)
        except RequestError as error:  # the sweep is worth having without floors
            ceilings = {"reason": str(error)}
        return Store.create(directory, _header(plan, ceilings)), ceilings.get("seconds", 0.0)

    return _carry_out(request, create, quiet, layout)


def resume_run(directory: Path, request: Request | None, *, quiet: bool, layout: str = "full") -> Result:
    """Goes on with the run in a directory; `request` (None: whatever it was) must be the one it was started with.

    Raises:
        RequestError: the request, the machine or its software is another; and as `run` does.
    """
    if is_published(directory):
        raise RequestError(f"{directory} is a published run, and finished; --out takes a directory")
    before = load(directory)
    asked = Request.from_dict(before.header.request)
    if request and (difference := asked.difference(request)):
        raise RequestError(f"{directory} was started with another request: {difference}; give none to go on with it")
    if difference := machine.difference(before.header.machine, machine.fingerprint()):
        raise RequestError(
            f"{directory} was measured elsewhere: {difference}; a run goes on where it began, start a new one"
        )
    check_layout(layout, asked.backends, asked.cases())
    if before.complete:
        return before
    try:
        return _carry_out(asked, lambda plan: (_reopen(directory, plan), 0.0), quiet, layout)
    except Interrupted:
        raise
    except KeyboardInterrupt:  # before the first new cell
        raise Interrupted(directory, len(before.records), before.header.cells) from None


def _reopen(directory: Path, plan: Plan) -> Store:
    """The run to go on with. Raises `RequestError` where a backend has become another since."""
    store = Store.resume(directory)
    now = {cell.backend: cell.version for cell in plan.cells}
    for record in store.records:
        if record.backend_version and now.get(record.backend) not in (None, record.backend_version):
            store.close()
            raise RequestError(
                f"backend {record.backend!r} was {record.backend_version} and is {now[record.backend]}; "
                "a run measures one version of each, start a new one"
            )
    return store


def _header(plan: Plan, ceilings: dict[str, Any]) -> Header:
    return Header(
        run_id=uuid.uuid4().hex[:12],
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        request=plan.request.to_dict(),
        machine=plan.machine,
        attnbench=_version(),
        cells=len(plan.cells),
        ceilings={name: value for name, value in ceilings.items() if name != "seconds"},
    )


def _version() -> str:
    from attnbench import __version__

    return __version__


def _carry_out(request: Request, open_store: Callable[[Plan], tuple[Store, float]], quiet: bool, layout: str) -> Result:
    """Plans, measures and reports. `open_store` gives the store, and the seconds that calibration took before it."""
    if os.environ.get("ATTNBENCH_WORKER"):
        raise RequestError(
            "attnbench.run was called while a worker imported your file; put the call under: if __name__ == '__main__'"
        )
    began = time.monotonic()
    with LocalExecutor(request) as executor:
        plan = make_plan(request, executor)
        planned_s = time.monotonic() - began - executor.starting_s
        opened, calibration_s = open_store(plan)
        with opened as store:
            shown: Display = display(plan, store.done, quiet=quiet)

            def note_the_end() -> None:
                """Adds what is known of this part of a run to that of the parts before it."""
                spent: dict[str, float] = dict(executor.spent_s)
                spent["start"] = spent.get("start", 0.0) + executor.starting_s + planned_s
                spent["calibration"] = calibration_s
                whole = time.monotonic() - began
                spent |= {"idle": max(0.0, whole - sum(spent.values())), "whole": whole}
                before = store.header.seconds or {}
                seconds = {name: round(before.get(name, 0) + spent.get(name, 0), 1) for name in SECONDS}
                pulses_ms = (*store.header.pulses_ms, *(round(pulse, 4) for pulse in executor.pulses_ms))
                store.finish(replace(store.header, seconds=seconds, pulses_ms=pulses_ms))

            try:
                with shown:
                    sweep(plan, executor, store, shown)
            except KeyboardInterrupt:
                executor.stop()
                with suppress(DiskFull):
                    note_the_end()
                raise Interrupted(store.directory, len(store.records), len(plan.cells)) from None
            note_the_end()
            result = Result(store.directory, store.header, store.records)
            written, missing = documents(result, layout)
            for name, text in written.items():
                store.write(name, text)
            if missing and not quiet:
                print(f"attnbench: report.html holds tables alone: {missing}", file=sys.stderr)  # noqa: T201
    return result
