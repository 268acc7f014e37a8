"""`attnbench doctor`: the machine, and what about it would spoil a benchmark."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from attnbench import machine
from attnbench.cli.console import show
from attnbench.doctor import Trouble, diagnose, gpu_views
from attnbench.errors import printable


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print facts and troubles as JSON.")
def command(as_json: bool) -> None:
    """What about this machine would spoil a benchmark, and how to mend it. Changes nothing."""
    facts = machine.fingerprint()
    troubles = diagnose(facts)
    told = {"facts": facts, "troubles": [asdict(trouble) for trouble in troubles]}
    show(json.dumps(told, indent=1) if as_json else doctor_text(facts, troubles))


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
    whole = dict.fromkeys(_ABSENT) | facts | facts["host_state"] | facts["packages"]
    subjects = [*((_GPU_LINES, _words(gpu)) for gpu in gpu_views(facts)), (_MACHINE_LINES, _words(whole))]
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
