"""What commands print on a terminal, reports aside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnbench.backends import BUILTIN
from attnbench.case import Case
from attnbench.doctor import Trouble, gpu_views
from attnbench.errors import printable
from attnbench.plan import Plan
from attnbench.progress import clock
from attnbench.record import cell_id
from attnbench.report.tables import Table, markdown_table


def backend_facts(told: Mapping[str, Any], asked: Mapping[str, Case]) -> dict[str, Any]:
    """What a worker told of a backend, for a reader: with each case that was asked about, why it is refused or None."""
    entry = BUILTIN.get(told["name"])
    answers = zip(asked, told["refusals"], told["padded_d_models"], strict=True)
    return {key: told[key] for key in ("name", "about", "version", "unavailable")} | {
        "by_default": entry is None or not entry.when_named,
        "cases": [
            {"case": text, "cell_id": cell_id(asked[text], told["name"]), "refused": reason, "padded_d_model": padded}
            for text, reason, padded in answers
        ],
    }


def backends_text(shown: list[dict[str, Any]], device: str) -> str:
    """A row for each backend; with a column for each case that was asked about, and then without what the backend is."""

    def answer(case: Mapping[str, Any]) -> str:
        padded = f", on {case['padded_d_model']} dimensions a head" if case["padded_d_model"] else ""
        return case["refused"] or f"yes{padded}"

    cases = [case["case"] for case in shown[0]["cases"]] if shown else []
    rows = [
        [backend["name"], *map(answer, backend["cases"])]
        if cases
        else [
            backend["name"],
            backend["unavailable"] or ("available" if backend["by_default"] else "available, runs only when named"),
            backend["version"],
            backend["about"],
        ]
        for backend in shown
    ]
    header = ["backend", *cases] if cases else ["backend", f"on {device}", "version", "what it is"]
    return markdown_table(Table(header, rows).without_empty_columns())


def ceilings_text(found: dict[str, Any], device: str) -> str:
    """The rates that a calibration found."""
    rates = [
        ("copy, bytes read and written", found["copy_bytes_per_s"], 1e9, "GB/s"),
        ("read", found["read_bytes_per_s"], 1e9, "GB/s"),
        *((f"matrix product, {name}", rate, 1e12, "TFLOP/s") for name, rate in found["matmul_flop_per_s"].items()),
        ("exponentials", found["exp_per_s"], 1e9, "G/s"),
        ("one launch", found["launch_ms"], 1e-3, "µs"),
    ]
    rows = [[what, f"{rate / unit:.4g}", name] for what, rate, unit, name in rates if rate]
    took = f" in {found['seconds']:.0f} s" if "seconds" in found else ""
    return f"Ceilings of {device}, measured{took}:\n{markdown_table(Table(['rate', 'highest', 'unit'], rows))}"


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


_GPU_LINES = (
    ("GPU {index}", "{name}, {memory_used_MiB} of {memory_MiB} MiB in use, {utilisation_percent} % busy"),
    ("", "other processes: {other_processes}; clock events: {clock_events}"),
    ("", "SM clock {sm_clock_MHz} MHz, at most {max_sm_clock_MHz}; {temperature_C} °C, slowed from {slowdown_C} on"),
    ("", "power limit {power_limit_W} W, by default {default_power_limit_W}, at most {max_power_limit_W}"),
    ("", "persistence {persistence}, ECC {ecc}, MIG {mig}, compute mode {compute_mode}"),
)
_MACHINE_LINES = (
    ("software", "driver {driver}, torch {torch} built for CUDA {torch_cuda}, triton {triton}, C++ compiler {cxx}"),
    ("CPU", "{cpu}; may use {usable_cores} of {machine_cores} cores, {usable_cpus} logical CPUs; SMT {smt}"),
    ("", "governor {governor}, load {load_1min}"),
    ("memory", "{memory_MiB} MiB; swapped out: {swap_used_MiB} MiB"),
    ("cgroup", "CPUs: {cgroup_cpus}; memory in MiB: {cgroup_memory_MiB}"),
)
_ABSENT = {"cgroup_cpus": "no quota", "cgroup_memory_MiB": "no limit"} | dict.fromkeys(
    ("driver", "torch", "triton", "torch_cuda", "cxx"), "none"
)
"""What it means that a fact is None, where that is known."""

_HEADINGS = {"spoils": "Spoils a benchmark:", "notes": "Good to know:"}


def doctor_text(facts: dict[str, Any], troubles: list[Trouble]) -> str:
    """The machine in a few lines, then each trouble in three: what was found, what it does, how to mend it."""
    machine = dict.fromkeys(_ABSENT) | facts | facts["host_state"] | facts["packages"]
    subjects = [*((_GPU_LINES, _words(gpu)) for gpu in gpu_views(facts)), (_MACHINE_LINES, _words(machine))]
    parts = [
        f"{label.format_map(words):9} {printable(line.format_map(words))}"
        for lines, words in subjects
        for label, line in lines
    ]
    for severity, heading in _HEADINGS.items():
        own = [trouble for trouble in troubles if trouble.severity == severity]
        parts += ["", heading] * bool(own)
        for trouble in own:
            lines = (printable(trouble.what), f"  effect: {trouble.effect}", f"  remedy: {trouble.remedy}")
            parts += ["", *(f"  {line}" for line in lines)]
    if all(trouble.severity != "spoils" for trouble in troubles):
        parts += ["", "Nothing was found that would spoil a benchmark."]
    return "\n".join(parts)


def _words(facts: dict[str, Any]) -> dict[str, str]:
    """Facts as a line tells them."""

    def word(name: str, value: Any) -> str:
        if value is None:
            return _ABSENT.get(name, "unknown")
        if isinstance(value, bool):
            return "on" if value else "off"
        if isinstance(value, list):
            return ", ".join(map(str, value)) or "none"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return {name: word(name, value) for name, value in facts.items()}
