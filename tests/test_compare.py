"""Verdicts between two runs: every one of them, each guard tripped and silent, and noise that is no regression."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist, stdev
from typing import Any

import pytest

from attnbench.analysis.compare import PASSES, Comparison, Finding, agreement, compare, compare_backends
from attnbench.analysis.verdict import (
    MOST_DRIFT,
    USUAL_DRIFT,
    Change,
    drift,
    judge_time,
    noise_of,
    parse_threshold,
    with_certainty,
)
from attnbench.case import Case
from attnbench.errors import RequestError
from attnbench.record import Record, summary
from attnbench.report.comparison import headline, render
from attnbench.result import load
from attnbench.store import Header, Run, Store
from conftest import record, small
from simulated import CPU, GPU, Factor, Machine, no_change, scaled, share, simulated

RESULTS = Path(__file__).parents[1] / "results"
REQUEST = {"device": "cuda", "protocol": "default", "clock": "sustained", "budget_s": 0.5}
MACHINE = {"hostname": "h", "packages": {"torch": "2.13.0"}, "driver": "1"}


def cell(forward_ms: float | None = 1.0, *, case: Case | None = None, backend: str = "eager", **outcome: Any) -> Record:
    """A cell on a GPU with a forward that is known to 0.1 %."""
    given: dict[str, Any] = {"forward_ms": forward_ms, "forward_noise": 0.001} | outcome
    return record(case, backend, **given).but(device="cuda")


def run_of(records: Iterable[Record], name: str = "a", **header: Any) -> Run:
    records = list(records)
    given: dict[str, Any] = {"request": REQUEST, "machine": MACHINE, "attnbench": "0.1.0", "cells": len(records)}
    return Run(Path(name), Header("r", "2026-01-01T00:00:00+00:00", **given | header), records)


def compared(before: Record, after: Record, threshold: float = 0.02) -> Comparison:
    return compare(run_of([before]), run_of([after], "b"), threshold)


def verdicts(before: Record, after: Record, threshold: float = 0.02) -> dict[str, str | None]:
    return {finding.what: finding.verdict for finding in compared(before, after, threshold).findings}


# --- times ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after_ms", "noise_of_each", "verdict"),
    [
        (1.0, 0.001, "same"),
        (1.019, 0.001, "same"),
        (1 / 1.019, 0.001, "same"),
        (1.021, 0.001, "slower"),
        (1 / 1.021, 0.001, "faster"),
        (
            1.03,
            0.0100,
            "slower",
        ),  # √(2·0.0100² + 0.005²) is 1.5 %, the 0.5 % being drift, and log 1.03 is 1.97 times it
        (1.03, 0.0102, "unclear"),  # and here 1.94 times: p is 0.052
        (1 / 1.03, 0.0100, "faster"),
        (1 / 1.03, 0.0102, "unclear"),
        (1.0, 0.0099, "same"),  # twice the uncertainty is 2.97 %, and one and a half thresholds are 3 %
        (1.0, 0.0101, "unclear"),
        (1.019, 0.0015, "same"),
        (1.019, 0.0018, "unclear"),
        (10.0, 0.1, "slower"),
    ],
)
def test_a_time_is_judged_by_threshold_and_noise(after_ms: float, noise_of_each: float, verdict: str) -> None:
    assert verdicts(cell(forward_noise=noise_of_each), cell(after_ms, forward_noise=noise_of_each)) == {
        "forward": verdict
    }


def test_the_threshold_is_the_users() -> None:
    assert verdicts(cell(), cell(1.03), threshold=0.05) == {"forward": "same"}
    assert verdicts(cell(), cell(1.03), threshold=0.029) == {"forward": "slower"}


@pytest.mark.parametrize(
    ("device", "before_ms", "after_ms", "verdict"),
    [
        ("cuda", 0.0100, 0.0119, "same"),
        ("cuda:1", 0.0100, 0.0119, "same"),
        ("cuda", 0.0119, 0.0100, "same"),
        ("cuda", 0.0980, 0.1001, "slower"),
        ("cuda", 0.0100, 0.0121, "slower"),
        ("cpu", 0.0100, 0.0119, "slower"),
    ],
)
def test_what_events_cannot_tell_apart_is_the_same(
    device: str, before_ms: float, after_ms: float, verdict: str
) -> None:
    found = compared(cell(before_ms).but(device=device), cell(after_ms).but(device=device))
    assert [finding.verdict for finding in found.findings] == [verdict]
    assert ("0.002 ms cannot be told apart" in render(found)) == (verdict == "same")


@pytest.mark.parametrize(("after_ms", "verdict"), [(0.0148, "same"), (0.0152, "slower")])
def test_gaps_between_launches_are_no_change_of_a_launch_bound_cell(after_ms: float, verdict: str) -> None:
    assert verdicts(cell(0.01, tags=("launch_bound",)), cell(after_ms, tags=("launch_bound",))) == {"forward": verdict}


@pytest.mark.parametrize(
    ("clocks_MHz", "after_ms", "verdict"),
    [
        ((1980.0, 1980.0), 1.05, "slower"),
        ((1980.0, 1980.0 / 1.038), 1.05, "slower"),
        ((1980.0, 1980.0 / 1.041), 1.05, "unclear"),
        ((1980.0 / 1.041, 1980.0), 1.05, "unclear"),
        ((1980.0, None), 1.05, "slower"),
        ((None, None), 1.0, "same"),
        ((1980.0, 1965.0), 1.0, "same"),
        ((1980.0, 1900.0), 1.0, "unclear"),  # a slow-down of 4 % may hide behind a clock that differs by as much
    ],
)
def test_a_clock_that_differs_explains_as_much(clocks_MHz: tuple[Any, Any], after_ms: float, verdict: str) -> None:
    before, after = (cell(ms, sm_clock_MHz=clock) for ms, clock in zip((1.0, after_ms), clocks_MHz, strict=True))
    found = compared(before, after)
    assert [finding.verdict for finding in found.findings] == [verdict]
    differ = None not in clocks_MHz and clocks_MHz[0] != clocks_MHz[1]
    assert ("The SM clock differed in 1 cells" in render(found)) == differ
    assert ("SM clock 1980 →" in str(found.findings[0].note)) == (differ and clocks_MHz[0] == 1980)


def test_each_pass_has_its_verdict_and_the_whole_step_none() -> None:
    passes = ("forward", "backward", "forward_backward")
    before, after = (
        cell(backward_noise=0.001).but(**{f"{name}_ms": ms for name, ms in zip(passes, times, strict=True)})
        for times in ((1.0, 2.0, 3.0), (1.0, 2.5, 3.5))
    )
    assert verdicts(before, after) == {"forward": "same", "backward": "slower", "forward_backward": None}
    assert [(mean.what, round(mean.ratio, 3)) for mean in compared(before, after).means] == [
        ("forward", 1.0),
        ("backward", 1.25),
        ("forward_backward", 1.167),
    ]


def test_a_time_that_one_run_lacks_does_not_pass_for_the_same() -> None:
    found = compared(cell(backward_ms=1.0, backward_noise=0.001), cell())
    assert [(one.what, one.verdict, one.note) for one in found.findings][1:] == [
        ("backward", "unclear", "not measured in B")
    ]
    assert compared(cell(None), cell()).findings[0].note == "not measured in A"
    assert not compared(cell(None), cell(None)).findings


def test_noise_is_told_or_else_comes_from_the_samples() -> None:
    samples = tuple(1 + 0.0001 * (index % 21 - 10) for index in range(210))
    error = 1.2533 * 1.4826 * 0.0005 / 210**0.5
    assert noise_of(cell(forward_noise=None, forward_samples_ms=samples), "forward") == pytest.approx(error, rel=1e-6)
    assert noise_of(cell(forward_noise=0.004, forward_samples_ms=samples), "forward") == 0.004
    assert noise_of(cell(forward_noise=0.004), "forward") == 0.004


@pytest.mark.parametrize(("device", "samples", "floor"), [("cuda", 1, 0.01), ("cuda:0", 4, 0.0025), ("cpu", 2, 0.025)])
def test_few_samples_are_not_believed_to_agree(device: str, samples: int, floor: float) -> None:
    for told in (None, 0.0):
        few = cell(forward_noise=told, forward_samples_ms=(1.0,) * samples).but(device=device)
        assert noise_of(few, "forward") == floor


def test_no_noise_and_no_samples_is_taken_for_a_lone_sample() -> None:
    assert noise_of(cell(forward_noise=None), "forward") == 0.01


# --- status and memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ({"status": "ok"}, {"status": "oom", "phase": "forward", "reason": "no\nroom"}, "broke"),
        ({"status": "ok"}, {"status": "unsupported"}, "broke"),
        ({"status": "timeout"}, {"status": "ok"}, "mended"),
        ({"status": "unsupported"}, {"status": "ok"}, "mended"),
        ({"status": "oom"}, {"status": "crash"}, "changed"),
        ({"status": "oom", "phase": "forward"}, {"status": "oom", "phase": "backward"}, "changed"),
    ],
)
def test_a_status_that_changes(before: dict[str, Any], after: dict[str, Any], verdict: str) -> None:
    found = compared(cell(None, **before), cell(None, **after))
    assert [(one.what, one.verdict) for one in found.findings] == [("status", verdict)]
    assert found.exit_code == (verdict == "broke")
    assert verdict in render(found)


@pytest.mark.parametrize(("after_MiB", "verdict"), [(8.9, "same"), (9.1, "more memory")])
def test_a_resident_set_is_not_as_exact(after_MiB: float, verdict: str) -> None:
    before, after = (cell(None, forward_peak_MiB=peak).but(device="cpu") for peak in (5.0, after_MiB))
    assert verdicts(before, after) == {"forward peak": verdict}


def test_failures_that_stay_are_counted_and_what_is_unsupported_is_not() -> None:
    cells = [
        cell(None, case=small(seq_len=n, kv_len=n), status=status)
        for n, status in enumerate(("oom", "oom", "error", "unsupported"), 1)
    ]
    found = compare(run_of(cells), run_of(cells), 0.02)
    assert (found.findings, found.exit_code, found.failed_alike) == ([], 0, {"oom": 2, "error": 1})
    assert "Failed alike in both: 2 oom, 1 error." in render(found)
    assert headline(found) == "No regressions: nothing to compare."


@pytest.mark.parametrize(
    ("before_MiB", "after_MiB", "threshold", "verdict"),
    [
        (100.0, 102.1, 0.02, "more memory"),
        (100.0, 101.9, 0.02, "same"),
        (102.1, 100.0, 0.02, "less memory"),
        (1000.0, 1009.0, 0.001, "same"),  # never less than 1 %
        (1000.0, 1011.0, 0.001, "more memory"),
        (10.0, 10.9, 0.02, "same"),  # never less than 1 MiB
        (10.0, 11.1, 0.02, "more memory"),
        (0.0, 5.0, 0.02, "more memory"),
        (None, 5.0, 0.02, "unclear"),
    ],
)
def test_memory(before_MiB: float | None, after_MiB: float, threshold: float, verdict: str) -> None:
    for field, what in (("forward_peak_MiB", "forward peak"), ("backward_peak_MiB", "backward peak")):
        before, after = (cell(None).but(**{field: peak}) for peak in (before_MiB, after_MiB))
        assert verdicts(before, after, threshold) == {what: verdict}
        assert compared(before, after, threshold).exit_code == (verdict == "more memory")


# --- whole runs -------------------------------------------------------------------------------------------------------


def shares(machine: Machine, seeds: Iterable[int], factor: Factor, threshold: float) -> dict[str, float]:
    """The share of each verdict on times that `factor` changes, over pairs of simulated runs."""
    found: list[str | None] = []
    for seed in seeds:
        a, b = simulated(machine, seed), simulated(machine, seed, factor, number=1)
        touched = {
            (one.cell_id, what) for n, one in enumerate(a.records) for what in PASSES if factor(n, what) != 1
        }  # fmt: skip
        found += [
            one.verdict
            for one in compare(a, b, threshold).findings
            if one.what in PASSES and (not touched or (one.cell_id, one.what) in touched)
        ]
    return {verdict: share(found, verdict) for verdict in ("slower", "faster", "same", "unclear")}


def some(factor: float) -> Factor:
    """A slow-down of every eighth cell."""
    return lambda cell, _: factor if cell % 8 == 0 else 1.0


def every(factor: float) -> Factor:
    return lambda *_: factor


@pytest.mark.parametrize(("machine", "threshold"), [(CPU, 0.1), (CPU, 0.05), (GPU, 0.02)])
def test_noise_alone_is_no_regression(machine: Machine, threshold: float) -> None:
    found = shares(machine, range(48), no_change, threshold)
    assert found["slower"] <= 0.01
    assert found["faster"] <= 0.01
    assert found["same"] >= (0.0 if threshold == 0.05 else 0.5), "noise of a CPU leaves no room within 5 %"


@pytest.mark.parametrize(
    ("machine", "threshold", "factor", "least"),
    [
        (GPU, 0.02, some(1.05), 0.99),
        (GPU, 0.02, every(1.05), 0.99),
        (CPU, 0.1, some(1.2), 0.75),
        (CPU, 0.1, every(1.2), 0.75),
    ],
)
def test_what_was_made_slower_is_found(machine: Machine, threshold: float, factor: Factor, least: float) -> None:
    found = shares(machine, range(8), factor, threshold)
    assert found["slower"] >= least
    assert found["same"] <= (0.05 if machine is CPU else 0.0), "two runs may drift so far as to hide it"
    assert found["faster"] == 0


def test_five_per_cent_are_not_claimed_where_runs_drift_by_as_much() -> None:
    found = shares(CPU, range(8), some(1.05), 0.02)
    assert found["unclear"] >= 0.9


H200 = [f"seed-{kind}-h200-2026-11-24" for kind in ("bf16", "fp32-ieee", "fp32-tf32")]


def the_same_kernels_twice() -> tuple[Run, Run]:
    """Two runs of which nothing differs but noise: SDPA as the dispatcher chose it, and pinned to that same choice.

    Measured apart, in the published runs: other rounds, other moments, the same kernels by their names.
    """
    before, after = [], []
    for name in H200:
        records = {(one.case, one.backend): one for one in load(RESULTS / name).records}
        for (case, backend), one in records.items():
            for pinned in ("sdpa-cudnn", "sdpa-efficient"):
                twin = records.get((case, pinned))
                if (
                    backend == "sdpa" and twin and one.status == twin.status == "ok"
                    and one.kernels_forward == twin.kernels_forward and one.kernels_backward == twin.kernels_backward
                ):  # fmt: skip
                    before.append(one)
                    after.append(twin.but(backend="sdpa", cell_id=one.cell_id))
    return run_of(before), run_of(after, "b")


def test_the_same_kernels_are_no_regression_on_an_h200_and_five_per_cent_are_one() -> None:
    a, b = the_same_kernels_twice()
    assert len(a.records) > 50
    found = compare(a, b, 0.02)
    assert [one for one in found.regressions if one.what in PASSES] == []
    assert found.drift < 0.005
    touched = {one.cell_id for one in b.records[::3]}
    slower = [scaled(one, 1.05) if one.cell_id in touched else one for one in b.records]
    times = [one for one in compare(a, run_of(slower, "b"), 0.02).findings if one.what in PASSES]
    clear = [one for one in times if one.cell_id in touched and 2 * one.resolution + one.clock < 0.05]
    assert len(clear) > 12
    assert share([one.verdict for one in clear], "slower") >= 0.9
    assert not [one for one in times if one.cell_id not in touched and one.verdict == "slower"]


REPEATED = [f"repeat-bf16-{which}-h200-2026-11-25" for which in "ab"]


def test_two_runs_apart_on_an_h200_have_no_regression() -> None:
    a, b = (load(RESULTS / name) for name in REPEATED)
    found = compare(a, b, 0.02)
    assert found.exit_code == 0
    assert found.agreement.medians > 100
    assert found.agreement.within[0.015] >= 0.95


@pytest.mark.parametrize(("factor", "least"), [(1.05, 0.9), (1.2, 1.0)])
def test_a_slower_backend_is_found_between_two_runs_apart(factor: float, least: float) -> None:
    a, b = (load(RESULTS / name) for name in REPEATED)
    found: list[str | None] = []
    for backend in ("eager", "sdpa-flash", "sdpa-cudnn"):
        slower = [scaled(one, factor) if one.backend == backend else one for one in b.records]
        times = [one for one in compare(a, replace(b, records=slower), 0.02).findings if one.what in PASSES]
        assert not [one for one in times if one.backend != backend and one.verdict == "slower"]
        found += [one.verdict for one in times if one.backend == backend and number_of(one.before) > 0.1]
    assert len(found) > 60
    assert share(found, "slower") >= least


# --- two backends of one run ------------------------------------------------------------------------------------------


def in_turns(seed: int, factor: float, *, device: str = "cpu", rounds: int = 10, restless: float = 0.2) -> Run:
    """A run of twelve cases by `old` and `new`: what the machine does in a round it does to both, and a little to each."""
    rng, records = random.Random(seed), []
    for index in range(12):
        case, of_rounds = small(seq_len=64 * (index + 1)), [rng.lognormvariate(0, restless) for _ in range(rounds)]
        for backend, times in (("old", 1.0), ("new", factor if index % 3 == 0 else 1.0)):
            samples = [times * one * rng.lognormvariate(0, 0.01) for one in of_rounds for _ in range(20)]
            windows = tuple({"round": number, "samples": {"forward": 20}} for number in range(rounds))
            made = record(case, backend, windows=windows, **summary("forward", samples))
            records.append(made.but(device=device))
    return run_of(records)


@pytest.mark.parametrize(("factor", "least"), [(1.05, 0.95), (1.2, 1.0)])
def test_rounds_that_go_in_turns_show_what_the_machine_hides(factor: float, least: float) -> None:
    found: list[str | None] = []
    for seed in range(10):
        run = in_turns(seed, factor)
        told = [one.verdict for one in compare_backends(run, "old", "new", 0.02).findings if one.what == "forward"]
        found += told[::3]
        assert not {"slower", "faster"} & {verdict for n, verdict in enumerate(told) if n % 3}
    assert share(found, "slower") >= least


def test_what_is_no_slower_in_the_same_rounds_is_no_regression() -> None:
    comparisons = [compare_backends(in_turns(seed, 1.0), "old", "new", 0.02) for seed in range(20)]
    assert sum(len(one.regressions) for one in comparisons) <= 0.01 * 12 * 20
    assert all(one.drift == 0 and one.in_rounds for one in comparisons)
    assert "measured in turns" in render(comparisons[0])


def test_a_backend_is_compared_where_it_fails_too() -> None:
    case, other = small(), small(seq_len=99)
    cells = [cell(case=case), cell(None, case=case, backend="new", status="incorrect"), cell(case=other, backend="new")]
    found = compare_backends(run_of(cells), "eager", "new", 0.02)
    assert [(one.backend, one.verdict) for one in found.regressions] == [("eager → new", "broke")]
    assert list(found.only_after) == ["eager → new"]


def test_five_per_cent_show_in_a_run_on_an_h200_and_nothing_does_not() -> None:
    run = load(RESULTS / "all-bf16-h200-2026-11-25")
    for factor, least, most in ((1.05, 0.9, 1.0), (1.0, 0.0, 0.0)):
        found = compare_backends(scaled_backend(run, "sdpa-flash", factor), "sdpa-flash", "sdpa-flash-longer", 0.02)
        times = [one for one in found.findings if one.what in PASSES and number_of(one.before) > 0.1]
        assert len(times) > 20
        assert least <= share([one.verdict for one in times], "slower") <= most
        assert bool(found.regressions) is (factor > 1)


def scaled_backend(run: Run, backend: str, factor: float) -> Run:
    """The run with a backend once more, all of whose samples took so many times as long."""
    longer = [scaled(one, factor).but(backend=f"{backend}-longer") for one in run.records if one.backend == backend]
    return Run(run.directory, run.header, [*run.records, *longer])


def number_of(value: object) -> float:
    assert isinstance(value, float)
    return value


def change_of(rounds_ms: tuple[tuple[float, ...], tuple[float, ...]], each: int = 10) -> Finding:
    """What is found between two cells whose rounds lie where they are told to, samples scattering by 0.1 %."""
    cells = []
    for centres in rounds_ms:
        samples = [ms * (1 + 0.001 * (n % 5 - 2)) for ms in centres for n in range(each)]
        windows = tuple({"round": n, "samples": {"forward": each}} for n in range(len(centres)))
        cells.append(cell(windows=windows, **summary("forward", samples)))
    return compared(*cells).findings[0]


def test_rounds_are_the_units_however_many_samples_they_have() -> None:
    apart = ((1.0, 1.04, 0.96), (1.05, 1.09, 1.01))
    assert change_of(apart).verdict == "unclear"
    assert change_of(apart, each=300).verdict == "unclear"
    close = ((1.0, 1.001, 0.999), (1.05, 1.051, 1.049))
    assert change_of(close).verdict == "slower"
    known = change_of(apart).uncertainty
    assert known == pytest.approx((2 * 0.04**2 / 3 + 0.005**2) ** 0.5, rel=0.05)


def certain(changes: list[Change]) -> list[Change]:
    return with_certainty(changes, drift([one.log_ratio for one in changes], "cuda"))


def test_a_change_must_show_in_the_samples_too() -> None:
    one = Change("c", "forward", 0.1, ((1e-6, 2), (1e-6, 2)), ((1.0, 2.0) * 10, (1.0, 2.0) * 10))
    assert judge_time(certain([one])[0], 0.02) == "unclear"
    apart = replace(one, samples_ms=((1.0,) * 20, (1.1,) * 20))
    assert judge_time(certain([apart])[0], 0.02) == "slower"


def test_many_cells_need_more_certainty_than_one() -> None:
    one = Change("c", "forward", 0.03, ((1e-4, math.inf), (0.0, math.inf)), ((), ()))
    quiet = replace(one, log_ratio=0.0001)
    assert certain([one])[0].p == pytest.approx(2 * NormalDist().cdf(-0.03 / (1e-4 + 0.005**2) ** 0.5))
    alone, *_ = certain([one, *[quiet] * 99])
    assert alone.p > 0.05 > certain([one])[0].p
    assert all(found.p < 0.05 for found in certain([one] * 100)), "all of them are no chance"
    assert certain([]) == []


def test_the_drift_between_runs_is_that_of_most_cells() -> None:
    rng = random.Random(0)
    ratios = [rng.gauss(0, 0.002) for _ in range(200)]
    assert drift(ratios, "cuda") == pytest.approx(2**0.5 * 0.002, rel=0.2)
    assert drift([ratio + 0.3 for ratio in ratios], "cuda") == pytest.approx(drift(ratios, "cuda"))
    assert drift([*ratios, *[0.3] * 90], "cuda") < 2 * drift(ratios, "cuda"), "what changed is no drift"
    assert drift([10 * ratio for ratio in ratios], "cuda") == MOST_DRIFT["cuda"]
    assert drift(ratios[:7], "cpu") == USUAL_DRIFT["cpu"] < MOST_DRIFT["cpu"]


def test_without_scipy_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(
        RequestError, match=r"^comparing runs needs scipy; install it by: pip install 'attnbench\[report"
    ):
        compared(cell(), cell())


@pytest.mark.parametrize(("then", "loaded"), [("", False), ("verdict.statistics_library()", True)])
def test_scipy_is_loaded_where_it_is_needed(then: str, loaded: bool) -> None:
    code = f"import sys, attnbench.cli.compare; from attnbench.analysis import verdict\n{then}\nprint('scipy' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str(loaded)


@pytest.mark.parametrize(
    ("after", "verdict"),
    [(1.9e-3, None), (2.1e-3, "less accurate"), (0.51e-3, None), (0.49e-3, "more accurate")],
)
def test_an_error_that_grew_is_told_and_is_no_regression(after: float, verdict: str | None) -> None:
    for name in ("out", "dq", "dk", "dv"):
        a, b = (cell().but(**{f"error_{name}": error}) for error in (1e-3, after))
        found = compared(a, b)
        assert [one.verdict for one in found.findings if one.what == f"error of {name}"] == [verdict] * bool(verdict)
        assert found.exit_code == 0
        assert ("both within the tolerance" in render(found)) == bool(verdict)


def test_a_result_that_became_wrong_is_a_regression() -> None:
    found = compared(cell(), cell(None, status="incorrect", reason="dq off by 0.5", error_dq=0.5))
    assert (found.exit_code, [one.verdict for one in found.regressions]) == (1, ["broke"])
    assert "dq off by 0.5" in render(found).split("<details>")[0]


def test_means_are_over_cells_that_both_have_with_their_interval() -> None:
    cases = [small(seq_len=n, kv_len=n) for n in range(1, 12)]
    ratios = [1.1, 1.2, 1.3] * 3
    before = [cell(1.0, case=case) for case in cases]
    after = [cell(ratio, case=case) for ratio, case in zip(ratios, cases, strict=False)]
    failed = [cell(None, case=cases[9], status="oom"), cell(1e9, case=small(seq_len=99, kv_len=99))]
    (mean,) = compare(run_of(before), run_of([*after, *failed], "b"), 0.02).means
    assert (mean.backend, mean.cells, mean.ratio) == ("eager", 9, pytest.approx((1.1 * 1.2 * 1.3) ** (1 / 3)))
    assert mean.interval
    low, high = mean.interval
    logs = [math.log(ratio) for ratio in ratios]
    own = stdev(logs) / 3
    assert math.log(high / low) / 2 == pytest.approx(2.306 * (own**2 + 0.005**2 * 2 / 3) ** 0.5, rel=0.01)
    two = compare(run_of([*before, cell(backend="sdpa")]), run_of([*after, cell(2.0, backend="sdpa")], "b"), 0.02)
    assert [(one.backend, one.cells) for one in two.means] == [(None, 10), ("eager", 9), ("sdpa", 1)]
    assert two.means[2].interval is None


def test_agreement_is_of_medians_long_enough_to_mean_something() -> None:
    times = [(0.05, 0.09), (0.11, 0.09), (1.0, 1.004), (1.0, 1.012), (1.04, 1.0), (1.0, 1.2)]
    cases = [small(seq_len=index + 1, kv_len=64) for index in range(len(times))]
    a, b = (run_of([cell(pair[side], case=case) for pair, case in zip(times, cases, strict=True)]) for side in (0, 1))
    found = agreement(a, b)
    assert (found.medians, dict(found.within)) == (4, {0.005: 0.25, 0.01: 0.25, 0.015: 0.5, 0.02: 0.5, 0.05: 0.75})
    assert found.worst
    assert found.worst.cell_id == b.records[-1].cell_id
    assert agreement(a, b, floor_ms=0.04).medians == 6
    assert agreement(a, b, floor_ms=5).worst is None
    text = render(compare(a, b, 0.02))
    assert "Of 4 medians above 0.1 ms agree 25 % within 0.5 %, 25 % within 1 %, 50 % within 1.5 %" in text
    assert f"the furthest apart: {found.worst.cell_id} forward, 20 %." in text


def test_the_document_names_what_matters() -> None:
    cases = [small(seq_len=n, kv_len=n) for n in range(1, 11)]
    a = run_of([cell(1.0, case=case) for case in cases])
    after = [cell(4 / 3, case=cases[0]), cell(0.5, case=cases[1]), cell(None, case=cases[2], status="crash")]
    b = run_of([*after, cell(case=cases[0], backend="mine.py:fast")], "b")
    found = compare(a, b, 0.02)
    assert [(one.verdict, one.cell_id) for one in found.regressions] == [
        ("broke", a.records[2].cell_id),
        ("slower", a.records[0].cell_id),
    ]
    assert {name: len(cells) for name, cells in found.only_before.items()} == {"eager": 7}
    assert found.only_after == {"mine.py:fast": [b.records[-1].cell_id]}
    text = render(found)
    assert "2 regressions: 1 slower, 1 broke, 1 faster." in text
    assert re.search(r"\| status  \| +ok +\| +crash +\|", text)
    assert re.search(r"\| forward \| +1 +\| +1\.33333 +\|", text), "six digits beside a status, too"
    assert f"The worst time: {a.records[0].cell_id} forward, 1 → 1.33333 ms, 1.333 ± 0.52 % (slower)." in text
    assert b.records[-1].cell_id in text
    assert "and others" in text
    titles = re.findall(r"^## .*|(?<=<summary>)[^<]*", text, re.MULTILINE)
    assert titles == [
        "## Regressions", "Improvements (1)", "By backend and pass", "In one run alone", "Every time (2)",
        "How it was judged",
    ]  # fmt: skip
    assert text.count("<details>") == text.count("</details>") == 5
    given = json.loads(render(found, "json"))
    assert (given["exit_code"], given["counts"]) == (1, {"slower": 1, "broke": 1, "faster": 1})
    assert given["regressions"][0]["note"] is None
    assert given["only_before"]["eager"][0] == a.records[3].cell_id
    assert given["agreement"]["within"]["0.05"] == 0.0


def notices(**header: Any) -> Counter[str]:
    lines = compare(run_of([cell()]), run_of([cell()], "b", **header), 0.02).notices
    return Counter(" ".join(line.split()[:2]) for line in lines)


def test_runs_that_differ_are_told_so_first() -> None:
    assert not notices()
    assert notices(machine=MACHINE | {"hostname": "other"}) == {"The machines": 1}
    assert notices(machine=MACHINE | {"driver": "2"}) == {"The software": 1}
    assert notices(attnbench="0.2.0") == {"The software": 1}
    assert notices(request=REQUEST | {"clock": "burst"}) == {"The settings": 1}
    assert notices(request=REQUEST | {"warm_cache": True}) == {"The settings": 1}
    assert not notices(request=REQUEST | {"warm_cache": False, "name": "other"}), "as where nobody asked"
    assert notices(cells=2) == {"b is": 1}
    found = compare(run_of([cell()]), run_of([cell()], request=REQUEST | {"budget_s": 9.0}), 0.02)
    warned = render(found).splitlines()[2:4]
    assert warned == ["> [!WARNING]", "> WARNING: The settings differ: budget_s was 0.5 and is 9.0."]
    versions = ("torch 2.13.0", "torch 2.14.0")
    before, after = (
        [cell(backend_version=version), cell(backend="sdpa", backend_version=version)] for version in versions
    )
    assert compare(run_of(before), run_of(after), 0.02).notices == [
        "The backends differ: eager, sdpa was torch 2.13.0 and is torch 2.14.0."
    ]


@pytest.mark.parametrize("name", [directory.name for directory in RESULTS.iterdir() if directory.is_dir()])
def test_a_published_run_is_the_same_as_itself(name: str) -> None:
    own = load(RESULTS / name)
    cells = f"{len(own.records)} of {own.header.cells} cells"
    found = compare(own, own, 0.02)
    assert set(found.counts) <= {"same", "unclear"}
    assert found.counts["same"] > 0
    assert found.notices == ([] if own.complete else 2 * [f"{own.directory} is not finished: it has {cells}."])
    assert found.agreement.within[0.005] == 1.0


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "fraction"), [("2%", 0.02), ("0.02", 0.02), (" .5 % ", 0.005), ("50%", 0.5)])
def test_thresholds(text: str, fraction: float) -> None:
    assert parse_threshold(text) == pytest.approx(fraction)


@pytest.mark.parametrize("text", ["", "0", "0%", "-1%", "-0.02", "nan", "inf", "two", "2", "100%", "2%%", "1e-2", "٢%"])
def test_what_is_no_threshold_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"write it like 2% or 0\.02"):
        parse_threshold(text)


def stored(directory: Path, *records: Record) -> Path:
    with Store.create(directory, run_of(records).header) as store:
        for one in records:
            store.append(one)
    return directory


def run_command(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "attnbench", "compare", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_exit_codes_end_to_end(tmp_path: Path) -> None:
    a, b = stored(tmp_path / "a", cell()), stored(tmp_path / "b", cell(1.1))
    done = run_command(a, b)
    assert (done.returncode, done.stderr) == (1, "\n1 regression: 1 slower.\n")
    assert done.stdout.startswith("# Two runs compared\n\n**1 regression: 1 slower.**\n\nA is ")
    done = run_command(b, a, "--format", "json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["counts"] == {"faster": 1}
    assert run_command(a, b, "--threshold", "20%").returncode == 0
    nearer = stored(tmp_path / "c", cell(1.03))
    assert run_command(a, nearer).returncode == 1, "2 % unless told otherwise"
    assert run_command(a, nearer, "--threshold", "5%").returncode == 0


def test_it_tells_how_well_times_are_known() -> None:
    noises = (0.001, 0.01, 0.05)
    cells = [cell(case=small(seq_len=64 * i), forward_noise=noise) for i, noise in enumerate(noises, 1)]
    found = compare(run_of(cells), run_of(cells, "b"), 0.02)
    middle = sorted(one.uncertainty or 0 for one in found.findings)[1]
    assert middle == pytest.approx(math.hypot(0.01, 0.01, USUAL_DRIFT["cuda"]))
    assert "Half of these times are known to ± 3 %, drift included." in render(found)


@pytest.mark.parametrize(
    ("b", "options", "complaint"),
    [
        ("nowhere", (), "nowhere does not exist"),
        ("empty", (), "empty is not a run directory: it has no run.json"),
        ("foreign", (), "have no cell in common"),
        ("unused", (), "have no cell in common"),
        ("a", ("--threshold", "0"), "threshold '0' is not a change above 0 and below 100 %"),
        ("a", ("--threshold=-2%",), "threshold '-2%' is not"),
        ("a", ("--format", "jsn"), "format 'jsn' is not known; did you mean 'json'?"),
        (
            "a",
            ("--backend", "eager", "--backend", "sdpa"),
            "two backends of one run, and was given 2 of 2; write: attnbench",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, b: str, options: tuple[str, ...], complaint: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from attnbench.cli import main

    stored(tmp_path / "a", cell())
    stored(tmp_path / "foreign", cell(backend="sdpa"))
    stored(tmp_path / "unused")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["attnbench", "compare", str(tmp_path / "a"), str(tmp_path / b), *options])
    with pytest.raises(SystemExit) as stop:
        main()
    told = capsys.readouterr()
    assert stop.value.code == 2
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert complaint in told.err


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (
            ("eager",),
            "compares two backends of one run, and was given 1 of 1; write: attnbench compare RUN --backend OLD",
        ),
        (("eager", "sdap"), "'sdap' is not known; did you mean 'sdpa'? there are: eager, sdpa, flex"),
        (("eager", "eager"), "backend eager is the same as itself; name two of eager, sdpa, flex"),
        (("eager", "flex"), "eager and flex have no case in common"),
        (("eager", "sdpa", "--history"), "and was given 2 of 1 with --history; write"),
    ],
)
def test_backends_that_cannot_be_compared_are_refused_in_a_line(
    tmp_path: Path, names: tuple[str, ...], complaint: str
) -> None:
    run = stored(tmp_path / "a", cell(), cell(backend="sdpa"), cell(backend="flex", case=small(seq_len=99)))
    more = [word for name in names for word in ((name,) if name.startswith("--") else ("--backend", name))]
    done = run_command(run, *more)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert complaint in done.stderr


def test_two_backends_of_a_run_end_to_end(tmp_path: Path) -> None:
    run = stored(tmp_path / "a", *in_turns(0, 1.2).records)
    done = run_command(run, "--backend", "old", "--backend", "new")
    assert (done.returncode, done.stderr) == (1, "\n4 regressions: 4 slower, 8 same.\n")
    assert done.stdout.startswith("# Two backends compared\n\n**4 regressions: 4 slower, 8 same.**\n\nA is old in ")
    assert "old → new" in done.stdout
    assert run_command(run, "--backend", "new", "--backend", "old").returncode == 0


def test_a_finding_counts_twofold_up_and_down_alike() -> None:
    ratios = [Finding("c", "b", "forward", 1.0, 1.0, None, ratio=ratio).excess for ratio in (2.0, 0.5)]
    assert ratios == [1.0, 1.0]
