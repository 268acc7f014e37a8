"""`attnbench plan`: what a sweep would do."""

from __future__ import annotations

import json
from typing import Any

import click

from attnbench.cli.console import show
from attnbench.cli.options import grid_options, measuring_options, request_from
from attnbench.executors.local import LocalExecutor
from attnbench.plan import Plan, make_plan
from attnbench.progress import clock
from attnbench.report.tables import Table, markdown_table


@click.command("plan")
@grid_options
@measuring_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def command(as_json: bool, **options: Any) -> None:
    """What `run` would do: its cells, forecasts of memory and time, and what cannot run. Runs nothing."""
    request = request_from(options)
    with LocalExecutor(request) as executor:
        planned = make_plan(request, executor)
    show(json.dumps(planned.to_dict(), indent=1) if as_json else plan_text(planned))


def plan_text(plan: Plan) -> str:
    """The plan for a reader: how much, how long, how much memory at most, what will not fit and what is left out."""
    request = plan.request
    backends = list(dict.fromkeys(cell.backend for cell in plan.cells))
    lengths = sorted({cell.case.seq_len for cell in plan.cells})
    runs = [cell for cell in plan.cells if not cell.refusal]
    cells, cases = f"{len(runs)} cells to run of {len(plan.cells)}", f"{len(request.cases())} cases"
    parts = [f"{cells} on {request.device}: {cases}, {len(backends)} backends, about {clock(plan.seconds)}."]

    def peak(backend: str, length: int) -> str | None:
        own = [cell for cell in runs if cell.backend == backend and cell.case.seq_len == length]
        peaks = [max(cell.peaks_MiB) for cell in own if cell.peaks_MiB]
        return f"{max(peaks):.0f}" if peaks else None

    rows = [[name, *(peak(name, length) for length in lengths)] for name in backends]
    parts.append("Forecast peak memory in MiB, the largest over the other dimensions, by seq_len:")
    parts.append(markdown_table(Table(["backend", *map(str, lengths)], rows)))
    if plan.memory_limit_MiB:
        parts.append(f"A worker may hold {plan.memory_limit_MiB:.0f} MiB.")
    if tight := plan.will_not_fit():
        worst: dict[str, list[str]] = {}
        for cell in tight:
            worst.setdefault(cell.backend, []).append(f"seq_len {cell.case.seq_len} d_model {cell.case.d_model}")
        parts.append("Will not fit, by the forecast (they are tried all the same):")
        parts += [f"  {name}: {', '.join(dict.fromkeys(shapes))}" for name, shapes in worst.items()]
    if refused := plan.refused():
        parts.append("Unsupported:")
        parts += [f"  {backend}: {reason} ({count} cells)" for (backend, reason), count in refused.items()]
    if plan.left_out:
        parts.append("Left out, since nobody asked for them by name:")
        parts += [f"  {backend}: {reason}" for backend, reason in plan.left_out.items()]
    return "\n".join(parts)
