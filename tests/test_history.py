"""Series of runs: steps found where they are, none where there are none, drift told from steps, the newest run judged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from attnbench.analysis.history import History, history
from attnbench.errors import RequestError
from attnbench.report.history import headline, render
from attnbench.store import Run, Store
from simulated import CPU, GPU, Machine, simulated

LEVELS = Callable[[int, int], float]
"""By what a cell's true time is multiplied, by its number and that of the run."""


def series_of(machine: Machine, seed: int, runs: int, level: LEVELS, cells: int = 12) -> list[Run]:
    return [
        simulated(machine, seed, lambda cell, _, n=n: level(cell, n), cells=cells, number=n) for n in range(runs)
    ]  # fmt: skip


def found_in(machine: Machine, seeds: Sequence[int], runs: int, level: LEVELS, threshold: float) -> list[History]:
    return [history(series_of(machine, seed, runs, level), threshold) for seed in seeds]


def unchanged(_cell: int, _run: int) -> float:
    return 1.0


def third(cell: int) -> bool:
    return cell % 3 == 0


@pytest.mark.parametrize(("machine", "threshold"), [(GPU, 0.02), (CPU, 0.1), (CPU, 0.05)])
@pytest.mark.parametrize("runs", [3, 8])
def test_noise_alone_makes_no_change_points(machine: Machine, threshold: float, runs: int) -> None:
    found = found_in(machine, range(4), runs, unchanged, threshold)
    series = sum(len(one.series) for one in found)
    assert series == 4 * 24
    assert sum(len(one.shifts) for one in found) <= 0.02 * series
    assert sum(one.trend is not None for told in found for one in told.series) <= 0.02 * series
    assert sum(len(one.regressions) for one in found) <= 0.02 * series


@pytest.mark.parametrize(
    ("machine", "factor", "threshold", "least"),
    [(GPU, 1.05, 0.02, 0.98), (GPU, 0.95, 0.02, 0.98), (CPU, 1.2, 0.1, 0.9)],
)
def test_a_step_is_found_at_its_run_and_in_its_cells(
    machine: Machine, factor: float, threshold: float, least: float
) -> None:
    found = found_in(machine, range(4), 8, lambda cell, n: factor if third(cell) and n >= 5 else 1.0, threshold)
    stepped = [one for told in found for k, one in enumerate(told.series) if third(k // 2)]
    others = [one for told in found for k, one in enumerate(told.series) if not third(k // 2)]
    verdict = "slower" if factor > 1 else "faster"
    right = [[(shift.run, shift.verdict) for shift in one.shifts] == [(5, verdict)] for one in stepped]
    assert sum(right) >= least * len(right)
    ratios = [one.shifts[0].ratio or 0 for one, hit in zip(stepped, right, strict=True) if hit]
    assert sum(ratios) / len(ratios) == pytest.approx(factor, rel=0.02)
    assert sum(len(one.shifts) for one in others) <= 0.02 * len(others)
    assert sum(len(one.regressions) for one in found) <= 0.02 * len(stepped), (
        "what changed before the newest run is over"
    )


def test_two_steps_are_both_found_and_what_came_and_went_too() -> None:
    def level(cell: int, n: int) -> float:
        return (1.0, 1.1, 1.2)[(n >= 3) + (n >= 6)] if cell % 2 else 1.15 if 3 <= n < 5 else 1.0

    (found,) = found_in(GPU, [0], 9, level, 0.02)
    runs = [[(shift.run, shift.verdict) for shift in one.shifts] for one in found.series]
    assert all(
        told == ([(3, "slower"), (6, "slower")] if k // 2 % 2 else [(3, "slower"), (5, "faster")])
        for k, told in enumerate(runs)
    )


def test_a_steady_drift_is_no_row_of_steps() -> None:
    found = found_in(GPU, range(3), 8, lambda cell, n: 1.02**n if third(cell) else 1.0, 0.02)
    drifting = [one for told in found for k, one in enumerate(told.series) if third(k // 2)]
    steady = [one.trend for one in drifting if one.trend]
    assert len(steady) >= 0.95 * len(drifting)
    assert all(trend == pytest.approx(1.02**7, rel=0.03) for trend in steady)
    assert not [shift for one in drifting if one.trend for shift in one.shifts]
    assert "## What moved steadily" in render(found[0])
    others = [one for told in found for k, one in enumerate(told.series) if not third(k // 2)]
    assert sum(one.trend is not None for one in others) <= 0.02 * len(others)


@pytest.mark.parametrize("runs", [2, 3, 8])
def test_the_newest_run_is_judged_by_what_was_before_it(runs: int) -> None:
    def level(cell: int, n: int) -> float:
        return (1.3 if n >= 1 and runs > 2 else 1.0) * (1.05 if third(cell) and n == runs - 1 else 1.0)

    (found,) = found_in(GPU, [1], runs, level, 0.02)
    assert found.exit_code == 1
    worse = {one.cell_id for one in found.regressions}
    assert worse == {one.cell_id for k, one in enumerate(found.series) if third(k // 2)}
    assert all(one.ratio == pytest.approx(1.05, rel=0.02) for one in found.regressions), (
        "and not by what was before that"
    )
    assert headline(found).startswith(f"{len(found.regressions)} regressions in the newest run, run{runs - 1};")
    assert "## Regressions of the newest run" in render(found)


def test_what_noise_may_hide_is_unclear_in_the_newest_run() -> None:
    (found,) = found_in(CPU, [0], 6, lambda cell, n: 1.05 if third(cell) and n == 5 else 1.0, 0.03)
    assert found.exit_code == 0
    unclear = [
        one for k, one in enumerate(found.series) if third(k // 2) and one.newest and one.newest.verdict == "unclear"
    ]
    assert len(unclear) >= 6
    assert (
        f"Unclear in the newest run ({sum(one.newest.verdict == 'unclear' for one in found.series if one.newest)})"
        in (render(found))
    )


def test_runs_are_ordered_by_their_start_and_gaps_are_gaps() -> None:
    runs = series_of(GPU, 0, 6, lambda cell, n: 1.1 if n >= 4 else 1.0)
    lost = runs[2].records[0]
    failed = lost.but(status="oom", phase="forward", forward_ms=None, backward_ms=None)
    runs[2] = replace(runs[2], records=[failed, *runs[2].records[2:]])
    found = history([runs[n] for n in (3, 0, 5, 1, 4, 2)], 0.02)
    assert found.runs == [f"run{n}" for n in range(6)]
    assert found.series[0].times_ms[2] is None
    assert found.series[2].times_ms[2] is None
    assert all([(shift.run, shift.verdict) for shift in one.shifts] == [(4, "slower")] for one in found.series)
    statuses = [(one.run, one.verdict) for one in found.outcomes if one.cell_id == lost.cell_id]
    assert statuses == [(2, "broke"), (3, "mended")]
    assert found.exit_code == 0


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"status": "oom", "phase": "backward"}, "broke"),
        ({"status": "incorrect", "reason": "dq is off"}, "broke"),
        ({"backward_peak_MiB": 120.0}, "more memory"),
        ({"backward_peak_MiB": 80.0}, "less memory"),
    ],
)
def test_status_and_memory_of_the_newest_run(changes: dict[str, object], verdict: str) -> None:
    runs = series_of(GPU, 0, 4, unchanged)
    runs = [replace(run, records=[one.but(backward_peak_MiB=100.0) for one in run.records]) for run in runs]
    runs[3] = replace(runs[3], records=[runs[3].records[0].but(**changes), *runs[3].records[1:]])
    found = history(runs, 0.02)
    assert [(one.run, one.verdict) for one in found.outcomes] == [(3, verdict)]
    assert found.exit_code == (verdict in ("broke", "more memory"))
    assert verdict in render(found)
    before = replace(runs[3], header=replace(runs[3].header, started_at="2025"))
    assert history([before, *runs[:3]], 0.02).exit_code == 0, "it is the oldest run then"


def test_what_differs_between_runs_is_said_first_and_beside_the_change() -> None:
    runs = series_of(GPU, 0, 4, lambda cell, n: 1.1 if n >= 2 else 1.0)
    for n in (2, 3):
        runs[n] = replace(runs[n], header=replace(runs[n].header, machine={"hostname": "other"}))
    found = history(runs, 0.02)
    assert found.notices == ["run1 → run2: The machines differ: hostname was 'h' and is 'other'."]
    assert {shift.note for shift in found.shifts} == {"other machine, software or settings than the run before"}
    assert render(found).splitlines()[2] == "> [!WARNING]"


def test_the_json_has_all_of_it() -> None:
    (found,) = found_in(GPU, [0], 4, lambda cell, n: 1.1 if n == 3 else 1.0, 0.02)
    told = json.loads(render(found, "json"))
    assert (told["exit_code"], len(told["regressions"]), told["runs"]) == (1, 24, ["run0", "run1", "run2", "run3"])
    assert len(told["series"][0]["times_ms"]) == 4
    assert told["series"][0]["shifts"][0]["run"] == 3


@pytest.mark.parametrize(
    ("numbers", "complaint"),
    [((0,), "takes two runs or more"), ((0, 1, 0), "run0 and run0 are the same run"), ((), "takes two runs or more")],
)
def test_what_is_no_series_is_refused(numbers: tuple[int, ...], complaint: str) -> None:
    runs = series_of(GPU, 0, 2, unchanged, cells=2)
    with pytest.raises(RequestError, match=complaint):
        history([runs[n] for n in numbers], 0.02)
    foreign = replace(runs[1], records=[one.but(cell_id="other") for one in runs[1].records])
    with pytest.raises(RequestError, match="no cell is in two of these runs"):
        history([runs[0], foreign], 0.02)


def test_the_command_end_to_end(tmp_path: Path) -> None:
    for run in series_of(GPU, 0, 3, lambda cell, n: 1.1 if n == 2 else 1.0, cells=8):
        with Store.create(tmp_path / str(run.directory), run.header) as store:
            for one in run.records:
                store.append(one.but(run_id=run.header.run_id))
    command = [sys.executable, "-m", "attnbench", "compare"]
    places = [str(tmp_path / f"run{n}") for n in (2, 0, 1)]

    def asked(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *args], capture_output=True, text=True, check=False)

    done = asked("--history", *places)
    assert done.returncode == 1
    assert done.stdout.startswith("# 3 runs, one after the other\n\n**16 regressions in the newest run, ")
    assert done.stderr.startswith("\n16 regressions in the newest run, ")
    done = asked("--history", *places[1:], "--format", "json")
    assert (done.returncode, json.loads(done.stdout)["regressions"]) == (0, [])
    done = asked(*places)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "attnbench: compare takes two runs, A and B, and was given 3; for more, add --history, and for two backends of one "
        "run --backend OLD --backend NEW\n"
    )
