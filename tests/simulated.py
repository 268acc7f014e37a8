"""Runs by simulation: true times, a drift of the whole run and of each cell in it, rounds about that, samples about those.

Deviations are relative and lognormal. `CPU` and `GPU` have the deviations seen between repeated runs on a shared CPU and
between cells of the same kernels on an H200.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from attnbench.noise import noise
from attnbench.record import Record, summary
from attnbench.store import Header, Run
from conftest import record, small


@dataclass(frozen=True)
class Machine:
    """Standard deviations: of a run, of a cell in a run, of a round, of a sample; and how many samples and rounds there are."""

    device: str
    run: float
    cell: float
    round: float
    sample: float
    samples: int = 20
    rounds: int = 3


CPU = Machine("cpu", run=0.018, cell=0.018, round=0.015, sample=0.03, rounds=10)
GPU = Machine("cuda", run=0.002, cell=0.003, round=0.003, sample=0.004)

Factor = Callable[[int, str], float]
"""By what a cell's true time is multiplied, by its number and pass."""

BACKENDS = ("eager", "sdpa", "flex")


def no_change(_cell: int, _what: str) -> float:
    return 1.0


def simulated(
    machine: Machine, seed: int, factor: Factor = no_change, *, cells: int = 48, number: int = 0
) -> Run:  # fmt: skip
    """A run of `cells` cells with a forward and a backward each, from 0.2 ms up; `number` is its place in a series."""
    rng = random.Random(f"{seed}/{number}")
    of_run = rng.lognormvariate(0, machine.run)
    records = [_cell(machine, rng, index, of_run, factor) for index in range(cells)]
    header = Header(
        f"r{number}", f"2026-01-{number + 1:02}T00:00:00+00:00", {"device": machine.device, "protocol": "default"},
        {"hostname": "h"}, "0.1.0", cells,
    )  # fmt: skip
    return Run(Path(f"run{number}"), header, records)


def _cell(machine: Machine, rng: random.Random, index: int, of_run: float, factor: Factor) -> Record:
    case = small(seq_len=64 * (1 + index // len(BACKENDS)), kv_len=64)
    of_cell = rng.lognormvariate(0, machine.cell)
    fields: dict[str, object] = {}
    counts: list[dict[str, int]] = [{} for _ in range(machine.rounds)]
    for name, ms in (("forward", 0.2 * 1.05**index), ("backward", 0.5 * 1.05**index)):
        true = ms * factor(index, name) * of_run * of_cell
        rounds = [_round(machine, rng, true) for _ in counts]
        fields |= summary(name, [sample for taken in rounds for sample in taken]) | {f"{name}_noise": noise(rounds)}
        for count, taken in zip(counts, rounds, strict=True):
            count[name] = len(taken)
    windows = tuple({"round": number, "samples": count} for number, count in enumerate(counts))
    made = record(case, BACKENDS[index % len(BACKENDS)], windows=windows, **fields)
    return made.but(device=machine.device)


def _round(machine: Machine, rng: random.Random, ms: float) -> list[float]:
    centre = ms * rng.lognormvariate(0, machine.round)
    return [centre * rng.lognormvariate(0, machine.sample) for _ in range(machine.samples)]


def scaled(made: Record, factor: float) -> Record:
    """A record whose every sample took `factor` times as long."""
    changes: dict[str, object] = {}
    for name in ("forward", "backward", "forward_backward"):
        if samples := getattr(made, f"{name}_samples_ms"):
            changes[f"{name}_samples_ms"] = longer = tuple(factor * sample for sample in samples)
            changes[f"{name}_ms"] = statistics.median(longer)
    return made.but(**changes)


def share(verdicts: Sequence[str | None], verdict: str) -> float:
    return verdicts.count(verdict) / len(verdicts)
