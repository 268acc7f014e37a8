"""Which backend a run recommends: every rule tripped and silent, estimates of known error, code that computes it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench.analysis.estimate import Estimate, estimate
from attnbench.analysis.recommend import Recommendation, recommend
from attnbench.analysis.snippets import SNIPPETS, snippet
from attnbench.analysis.wish import Wish
from attnbench.backends import BUILTIN
from attnbench.case import Case
from attnbench.errors import RequestError
from attnbench.families import DETERMINISM, FIXED_ON_CPU, determinism
from attnbench.record import Record
from attnbench.report.recommendation import text
from attnbench.result import load
from attnbench.store import Header, Run, Store
from conftest import record, small

RESULTS = Path(__file__).parents[1] / "results"
STORED = sorted(directory.name for directory in RESULTS.iterdir() if directory.is_dir())
CUT_OFF = {"all-bf16-h200-2026-11-26"}
"""Without its last shape, so that no other can be told from all around it."""

WHOLE = [name for name in STORED if "protocol" not in name and name not in CUT_OFF]
"""Of the default protocol, with all of their shapes."""


def cell(backend: str, ms: float | None = 1.0, n: int = 64, *, d: int = 16, case: Case | None = None,
         **outcome: Any) -> Record:  # fmt: skip
    """A right cell of n queries and keys, whose step is known to 0.1 %."""
    told: dict[str, Any] = {"forward_backward_ms": ms, "forward_backward_noise": 0.001} | outcome
    return record(case or small(seq_len=n, kv_len=n, d_model=d), backend, **told)


def run_of(records: Iterable[Record], **request: Any) -> Run:
    records = list(records)
    asked = {"device": "cpu", "protocol": "default"} | request
    return Run(Path("a"), Header("r", "2026-01-01T00:00:00+00:00", asked, {}, "0.1.0", len(records)), records)


def recommended(records: Iterable[Record], **wish: Any) -> Recommendation:
    return recommend(run_of(records), Wish(**wish))


def names(found: Recommendation) -> list[str]:
    return [candidate.backend for candidate in found.candidates]


def reasons(found: Recommendation) -> dict[str, str]:
    return {one.backend: one.reason for one in found.left_out}


def power_law(backend: str, exponent: float, factor: float = 1e-6, lengths: Iterable[int] = (64, 128, 512, 1024),
              **outcome: Any) -> list[Record]:  # fmt: skip
    return [cell(backend, factor * n**exponent, n, **outcome) for n in lengths]


# --- a shape that was measured ----------------------------------------------------------------------------------------


def test_the_fastest_of_those_that_are_right() -> None:
    found = recommended([cell("eager", 2.0), cell("sdpa", 1.5), cell("naive", None, status="incorrect", reason="off")])
    assert (names(found), found.winner.ms, found.winner.seq_lens) == (["sdpa", "eager"], 1.5, (64,))
    assert found.runner_up
    assert found.margin(found.runner_up) == pytest.approx(1 / 3)
    assert reasons(found) == {"naive": "incorrect: off"}
    assert "fastest is sdpa: 1.5 ms. Next is eager, 33.3 % slower." in text(found)
    assert "not measured" not in text(found)


@pytest.mark.parametrize(
    ("ms", "noise", "samples_ms", "close"),
    [
        (1.0282, 0.01, (), True),  # twice 0.01·√2 is 2.83 %
        (1.0284, 0.01, (), False),
        (1.0282, 0.001, (), False),
        (1.14, None, (), True),  # a lone sample on a CPU is taken to be known to 5 %, hence twice 0.05·√2
        (1.15, None, (), False),
        (1.02, None, (0.9, 1.1) * 8, True),  # as scattered as the samples are
        (1.02, None, (1.0,) * 100, False),
    ],
)
def test_a_margin_within_the_noise_is_too_close_to_call(
    ms: float, noise: float | None, samples_ms: tuple[float, ...], close: bool
) -> None:
    known = {"forward_backward_noise": noise, "forward_backward_samples_ms": samples_ms}
    found = recommended([cell("eager", 1.0, **known), cell("sdpa", ms, **known)])
    assert found.runner_up
    assert found.too_close(found.runner_up) == close
    assert found.to_dict()["too_close_to_call"] == close
    assert ("Too close to call" in text(found)) == close


@pytest.mark.parametrize(
    ("wish", "fastest"),
    [({}, "step"), ({"what": "step"}, "step"), ({"what": "forward"}, "forward"), ({"what": "backward"}, "backward")],
)
def test_each_pass_has_its_own_fastest(wish: dict[str, str], fastest: str) -> None:
    cells = [
        cell("forward", 2.0, forward_ms=1.0, backward_ms=2.0),
        cell("backward", 2.0, forward_ms=2.0, backward_ms=1.0),
        cell("step", 1.0, forward_ms=2.0, backward_ms=2.0),
    ]
    assert recommended(cells, **wish).winner.backend == fastest


def test_it_needs_no_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert recommended(power_law("eager", 2.0), seq_len=200).winner.backend == "eager"


def test_a_run_of_forwards_is_asked_for_its_forwards() -> None:
    forwards = [cell("eager", None, forward_ms=2.0), cell("sdpa", None, forward_ms=1.0)]
    assert (recommended(forwards).what, recommended(forwards).winner.backend) == ("forward", "sdpa")
    with pytest.raises(RequestError, match="a has no time of pass 'step'; it has: forward"):
        recommended(forwards, what="step")
    assert reasons(recommended([*forwards, cell("naive")])) == {
        "eager": "this pass was not timed",
        "sdpa": "this pass was not timed",
    }


def test_the_backward_of_the_seeds_protocol_is_a_step() -> None:
    run = run_of([cell("naive", None, forward_ms=1.0, backward_ms=3.0)], protocol="seed")
    assert recommend(run, Wish()).winner.ms == 3.0
    with pytest.raises(RequestError, match="no time of pass 'backward'; it has: forward, step"):
        recommend(run, Wish(what="backward"))


def test_what_does_not_fit_is_told_by_how_much() -> None:
    cells = [
        cell("eager", 1.0, forward_peak_MiB=10.0, backward_peak_MiB=30.0),
        cell("sdpa", 2.0, forward_peak_MiB=9.0, backward_peak_MiB=20.0),
        cell("naive", 3.0),
    ]
    assert names(recommended(cells)) == ["eager", "sdpa", "naive"]
    found = recommended(cells, memory_bytes=29 << 20)
    assert names(found) == ["sdpa"]
    assert reasons(found) == {
        "eager": "its peak of 30 MiB is 1 MiB above the 29 MiB there are",
        "naive": "its memory was not measured, so it may not fit",
    }
    assert "No other backend is right and fits." in text(found)
    assert names(recommended(cells, memory_bytes=30 << 20)) == ["eager", "sdpa"]
    forward = [one.but(forward_ms=1.0) for one in cells]
    assert names(recommended(forward, what="forward", memory_bytes=10 << 20)) == ["eager", "sdpa"]
    with pytest.raises(RequestError, match=r"fits: its peak of 30 MiB is 29 MiB .* \(eager\); its peak of 20 MiB is"):
        recommended(cells, memory_bytes=1 << 20)


def test_the_fraction_of_the_limit_is_of_the_pass() -> None:
    cells = [cell("eager", 4.0, forward_ms=1.0, floor_forward_ms=0.5, floor_backward_ms=1.5)]
    assert recommended(cells).winner.limit == 0.5
    assert recommended(cells, what="forward").winner.limit == 0.5
    assert "50 %" in text(recommended(cells))
    assert recommended([cells[0].but(floor_backward_ms=None)]).winner.limit is None


def test_backends_that_were_asked_for_and_have_no_record_are_told() -> None:
    run = run_of([cell("eager"), cell("sdpa", n=128)], backends=["flex", "eager", "sdpa"])
    found = recommend(run, Wish(seq_len=64))
    assert reasons(found) == {"flex": "not measured", "sdpa": "not measured"}
    assert "Left out:\n- flex: not measured\n- sdpa: not measured" in text(found)


# --- which shape ------------------------------------------------------------------------------------------------------


def test_what_is_not_said_is_the_runs_own() -> None:
    assert recommended([cell("eager", case=small(causal=True, batch=3))]).case == small(causal=True, batch=3)
    decode = [cell("eager", case=small(seq_len=n, kv_len=256)) for n in (1, 2)]
    assert recommended(decode, seq_len=1).case.kv_len == 256
    cross = [cell("eager", case=small(kv_len=256)), cell("eager", n=128)]
    assert recommended(cross, seq_len=64).case.kv_len == 256
    assert recommended(cross, seq_len=128).case.kv_len == 128
    assert recommended(cross, seq_len=64, kv_len=256).winner.ms == 1.0


TWO_OF_EACH = [
    cell("eager", case=small(seq_len=n, kv_len=n, d_model=d, causal=causal, batch=batch))
    for n in (64, 128) for d in (16, 32) for causal in (False, True) for batch in (1, 2)
]  # fmt: skip
MIXED = [cell("eager", case=small(precision=precision)) for precision in ("ieee", "tf32")] + [
    cell("eager", case=small(dtype="bfloat16", heads=4)),
    cell("eager", case=small(dtype="bfloat16", heads=4, kv_len=128)),
]


@pytest.mark.parametrize(
    ("records", "wish", "complaint"),
    [
        (TWO_OF_EACH, {}, "mask full, causal; batch 1, 2; d_model 16, 32; seq_len 64, 128; choose by --causal or --"),
        (TWO_OF_EACH, {"batch": 1, "causal": True, "seq_len": 64}, "d_model 16, 32; choose by --d-model"),
        (MIXED, {"dtype": "bfloat16"}, "kv_len 64, 128; choose by --kv-len"),
        (MIXED, {"dtype": "float32"}, "precision ieee, tf32; choose by --precision"),
        (MIXED, {"dtype": "float16"}, "dtype float16 was not measured; a has dtype bfloat16, float32"),
        (MIXED, {"dtype": "bfloat16", "precision": "tf32"}, "tf32 was not measured with dtype bfloat16; a has"),
        (MIXED, {"causal": True}, "mask causal was not measured; a has mask full"),
        (MIXED, {"dtype": "float32", "heads": 4}, "heads 4 was not measured with dtype float32; a has heads 2"),
        (MIXED, {"dtype": "bfloat16", "seq_len": 64, "kv_len": 99}, "seq_len 64 with kv_len 99 was not measured"),
        ([], {}, "a has no records yet"),
        (MIXED, {"seq_len": 0}, "seq_len = 0 is not a whole number above zero"),
        (MIXED, {"kv_heads": -1}, "kv_heads = -1 is not a whole number above zero"),
        (MIXED, {"heads": 4, "kv_heads": 3}, "kv_heads = 3 does not divide heads = 4"),
        (MIXED, {"dtype": "bfloat61"}, "did you mean 'bfloat16'?"),
        (MIXED, {"precision": "exact"}, "precision 'exact' is not known"),
        (MIXED, {"what": "sideways"}, "pass 'sideways' is not known; there are: forward, backward, step"),
        ([cell("eager", None, status="oom", phase="forward")], {}, "is right for this and fits: oom(forward) (eager)"),
    ],
)  # fmt: skip
def test_what_a_run_cannot_answer_is_one_line(records: list[Record], wish: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RequestError) as error:
        recommended(records, **wish)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


# --- a shape that was not measured ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "used", "how"),
    [
        (256, (128, 512), "interpolated between seq_len 128 and 512"),
        (65, (64, 128), "interpolated between"),
        (2048, (512, 1024), "extrapolated, which is less certain, from seq_len 512 and 1024"),
        (32, (64, 128), "extrapolated"),
    ],
)
def test_a_power_law_is_met_exactly(n: int, used: tuple[int, ...], how: str) -> None:
    peaks = [one.but(forward_peak_MiB=one.seq_len / 4) for one in power_law("eager", 1.7)]
    found = recommended([*peaks, *power_law("sdpa", 2.0)], seq_len=n)
    first = next(one for one in found.candidates if one.backend == "eager")
    assert first.ms == pytest.approx(1e-6 * n**1.7)
    assert first.peak_MiB == pytest.approx(n / 4)
    assert first.error
    assert first.error.maximum == pytest.approx(0, abs=1e-12)
    assert (first.seq_lens, first.error.shapes) == (used, 2)
    assert f"seq_len {n} with d_model 16 was not measured: its times are {how}" in text(found)
    assert found.to_dict()["measured"] is False


def test_the_error_of_a_bent_law_is_told_and_counts_as_noise() -> None:
    bent = [cell("eager", 1.0 + (n / 512) ** 2, n) for n in (64, 128, 512, 1024)]
    slower = [cell("sdpa", 1.05 * (one.forward_backward_ms or 0), one.seq_len) for one in bent]
    found = recommended([*bent, *slower], seq_len=256)
    first, second = found.candidates
    times = [one.forward_backward_ms or 0 for one in bent]
    predicted = [times[0] ** (2 / 3) * times[2] ** (1 / 3), times[1] ** (1 / 3) * times[3] ** (2 / 3)]
    errors = [abs(guess / true - 1) for guess, true in zip(predicted, times[1:3], strict=True)]
    assert first.error
    assert (first.error.maximum, first.error.median) == pytest.approx((max(errors), sum(errors) / 2))
    assert first.noise == pytest.approx(math.hypot(1.4826 * sum(errors) / 2, 0.001 / math.sqrt(2)))
    assert found.too_close(second)
    measured = recommended([cell("eager"), cell("sdpa", 1.05)])
    assert not measured.too_close(measured.candidates[1])
    assert "2 measured shapes of eager came out wrong by" in text(found)


def test_an_error_that_nothing_tells_settles_nothing() -> None:
    found = recommended(
        [*power_law("eager", 2, lengths=(64, 128)), *power_law("sdpa", 2, 1e-3, (64, 128))], seq_len=100
    )
    assert (found.winner.error, found.winner.noise) == (None, None)
    assert found.too_close(found.candidates[1])
    assert "too few shapes were measured to leave one out" in text(found)
    assert "within an error that nothing here tells" in text(found)
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_both_neighbours_must_be_right() -> None:
    large = cell("eager", None, 1024, status="oom", phase="backward", reason="no\nroom")
    cells = [*power_law("eager", 2, lengths=(64, 128, 512)), large, *power_law("sdpa", 2.5)]
    assert names(recommended(cells, seq_len=256)) == ["eager", "sdpa"]
    found = recommended(cells, seq_len=600)
    assert (names(found), reasons(found)) == (["sdpa"], {"eager": "oom(backward): no room (seq_len 1024, d_model 16)"})
    assert names(recommended(cells, seq_len=2000)) == ["sdpa"]


@pytest.mark.parametrize(
    ("n", "complaint"),
    [
        (2049, "seq_len 2049 is more than 2 times the longest measured, 1024 (eager)"),
        (31, "seq_len 31 is less than 1/2 of the shortest measured, 64 (eager)"),
        (9**999, "is more than 2 times the longest"),
    ],
)
def test_beyond_twice_the_range_nothing_is_said(n: int, complaint: str) -> None:
    with pytest.raises(RequestError) as error:
        recommended(power_law("eager", 2), seq_len=n)
    assert complaint in str(error.value)


def test_lines_are_drawn_on_from_lengths_as_far_apart() -> None:
    dense = power_law("eager", 2, lengths=(64, 128, 1000, 1001))
    assert recommended(dense, seq_len=1002).winner.seq_lens == (1000, 1001)
    assert recommended(dense, seq_len=2000).winner.seq_lens == (128, 1001)
    assert recommended(dense, seq_len=40).winner.seq_lens == (64, 128)
    with pytest.raises(
        RequestError, match="no two lengths are measured that lie far enough apart to extrapolate to 100"
    ):
        recommended(power_law("eager", 2, lengths=(64, 66)), seq_len=100)


def test_a_d_model_between_two_is_interpolated_and_below_all_the_smallest_stands_in() -> None:
    cells = [*(cell("eager", d / 16, d=d) for d in (16, 32, 64)), *(cell("sdpa", 1.5, d=d) for d in (16, 64))]
    found = recommended(cells, d_model=24)
    assert [(one.backend, one.d_models, one.ms) for one in found.candidates] == [
        ("eager", (16, 32), pytest.approx(1.5)), ("sdpa", (16, 64), pytest.approx(1.5))
    ]  # fmt: skip
    assert found.candidates[0].error
    assert (found.candidates[0].kind, found.candidates[0].error.shapes) == ("between d_models", 1)
    assert "d_model 24 was not measured: its times are interpolated between d_model 16 and 32" in text(found)
    assert found.to_dict()["measured"] is False
    below = recommended(cells, d_model=8)
    assert [(one.kind, one.d_models, one.ms) for one in below.candidates] == [
        ("larger d_model", (16,), 1.0), ("larger d_model", (16,), 1.5)
    ]  # fmt: skip
    assert "d_model 16 stands in for it" in text(below)
    assert "was not measured" not in text(recommended(cells, d_model=16))
    assert reasons(recommended([*cells, cell("naive", d=16)], d_model=24)) == {
        "naive": "d_model 24 is above the largest measured, 16"
    }
    with pytest.raises(RequestError, match=r"d_model 65 is above the largest measured, 64 \(eager, sdpa\)"):
        recommended(cells, d_model=65)


def plane(backend: str, n: int, d: int) -> Record:
    """Times of which length and d_model are factors, each bent as it likes."""
    return cell(backend, (1.0 + (n / 512) ** 2) * (1.0 + d / 100), n, d=d)


@pytest.mark.parametrize("left_out", [(64, 16), (64, 32), (1024, 64), (256, 32), (512, 16), (256, 64)])
def test_a_shape_beside_others_is_blended_from_them(left_out: tuple[int, int]) -> None:
    shapes = [(n, d) for n in (64, 256, 512, 1024) for d in (16, 32, 64)]
    cells = [plane("eager", n, d).but(forward_peak_MiB=n * d / 64) for n, d in shapes if (n, d) != left_out]
    found = recommended(cells, seq_len=left_out[0], d_model=left_out[1])
    assert found.winner.kind == "beside"
    assert found.winner.ms == pytest.approx(plane("eager", *left_out).forward_backward_ms)
    assert found.winner.peak_MiB == pytest.approx(left_out[0] * left_out[1] / 64)
    assert found.winner.error
    assert found.winner.error.maximum == pytest.approx(0, abs=1e-9)
    assert "its times are estimated from those beside it, at seq_len" in text(found)


def test_at_an_edge_the_nearer_of_two_counts_by_the_square_of_its_distance() -> None:
    shapes = [(n, d) for n in (256, 1024, 4096) for d in (16, 32, 64) if (n, d) != (256, 16)]
    found = recommended([cell("eager", 1.0, n, d=d) for n, d in shapes], seq_len=256, d_model=16)
    assert found.winner.shapes == tuple(sorted(shapes))
    for other, weight in (((1024, 16), 0.8), ((256, 32), 0.8), ((1024, 32), -0.64), ((4096, 64), -0.04)):
        cells = [cell("eager", 2.0 if (n, d) == other else 1.0, n, d=d) for n, d in shapes]
        assert recommended(cells, seq_len=256, d_model=16).winner.ms == pytest.approx(2.0**weight)


def test_at_an_edge_the_nearest_alone_counts_where_the_next_has_no_corner() -> None:
    shapes = [(n, d) for n in (256, 1024, 4096) for d in (16, 32) if (n, d) not in ((256, 16), (4096, 32))]
    found = recommended([plane("eager", n, d) for n, d in shapes], seq_len=256, d_model=16)
    assert found.winner.shapes == ((256, 32), (1024, 16), (1024, 32))
    assert found.winner.ms == pytest.approx(plane("eager", 256, 16).forward_backward_ms)


def test_who_is_wrong_at_another_d_model_is_judged_by_the_shapes_of_this_one() -> None:
    """As where a kernel has a fault at one width of heads."""
    lengths, widths = (64, 256, 512, 1024), (16, 32, 64)
    cells = [
        cell("eager", None, n, d=d, status="incorrect") if d == 16 else plane("eager", n, d)
        for n in lengths for d in widths if (n, d) != (256, 32)
    ]  # fmt: skip
    found = recommended(cells, seq_len=256, d_model=32)
    assert found.winner.shapes == ((64, 32), (64, 64), (256, 64), (512, 32), (512, 64))
    assert found.winner.ms == pytest.approx(plane("eager", 256, 32).forward_backward_ms, rel=0.3)
    for d_model in (16, 24):
        with pytest.raises(RequestError, match="incorrect"):
            recommended(cells, seq_len=256, d_model=d_model)


def test_neither_length_nor_d_model_measured_is_estimated_along_both() -> None:
    cells = [cell("eager", n**2 * d * 1e-6, n, d=d) for n in (64, 128, 512) for d in (16, 64, 128)]
    found = recommended(cells, seq_len=300, d_model=32)
    assert (found.winner.kind, found.winner.seq_lens, found.winner.d_models) == ("far", (128, 512), (16, 64))
    assert found.winner.ms == pytest.approx(300**2 * 32e-6)
    assert "estimated, which is less certain, from seq_len 128 and 512 and d_model 16 and 64" in text(found)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, unique=True), st.tuples(
    st.integers(1, 300), st.integers(1, 300)))  # fmt: skip
def test_weights_sum_to_one_and_are_of_measured_shapes(measured: list[tuple[int, int]], shape: tuple[int, int]) -> None:
    made = estimate(measured, shape)
    if isinstance(made, Estimate):
        assert sum(made.weights.values()) == pytest.approx(1)
        assert set(made.weights) <= set(measured)
        assert (made.kind == "measured") == (shape in measured)


CLOSE = 0.05
"""How much slower than the best the recommended backend may be, where the shape was left out of the run."""


FIELD = {"forward": "forward_ms", "backward": "backward_ms", "step": "forward_backward_ms"}


def losses(run: Run, what: str, hide: Callable[[Case, Case], bool]) -> dict[Case, float | None]:
    """How much slower than the fastest the backend is that is recommended for each case without those that `hide` takes.

    None where nothing can be said of it.
    """
    times: dict[Case, dict[str, float]] = {}
    for one in run.records:
        if one.status == "ok":
            times.setdefault(one.case, {})[one.backend] = getattr(one, FIELD[what])
    found: dict[Case, float | None] = {}
    for case, by_backend in times.items():
        rest = replace(run, records=[one for one in run.records if not hide(one.case, case)])
        try:
            chosen = recommend(rest, Wish(**case.to_dict(), what=what)).winner.backend
        except RequestError:
            found[case] = None
        else:
            found[case] = by_backend.get(chosen, math.inf) / min(by_backend.values()) - 1
    return found


def inner(case: Case) -> bool:
    return 256 < case.seq_len < 16384 and 16 < case.d_model < 128


@pytest.mark.parametrize("what", ["forward", "backward", "step"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_shape_left_out_is_recommended_nearly_the_best(name: str, what: str) -> None:
    found = losses(load(RESULTS / name), what, lambda one, case: one == case)
    for title, told in (
        ("inner", [loss for case, loss in found.items() if inner(case)]),
        ("edge", [loss for case, loss in found.items() if not inner(case)]),
        ("all", list(found.values())),
    ):
        close = sum(loss is not None and loss <= CLOSE for loss in told)
        print(f"{name} {what}: {close} of {len(told)} {title} shapes within {CLOSE:.0%}")
        assert close >= 0.9 * len(told) or title != "all"
    assert len(found) == 20


def test_a_length_left_out_altogether_is_recommended_nearly_the_best_or_too_close_to_call() -> None:
    """Of lengths between measured ones."""
    told: list[float] = []
    for name in WHOLE:
        run = load(RESULTS / name)
        for what in ("forward", "backward", "step"):
            for case, loss in losses(run, what, lambda one, case: one.seq_len == case.seq_len).items():
                if 256 < case.seq_len < 16384:
                    assert loss is not None
                    told.append(loss)
                    assert loss <= CLOSE or admits(run, what, case), (name, what, case)
    close = sum(loss <= CLOSE for loss in told)
    print(f"{close} of {len(told)} within {CLOSE:.0%}, their lengths lying between measured ones")
    assert close >= 0.9 * len(told)


def admits(run: Any, what: Any, case: Case) -> bool:
    """Whether the fastest is too close to call with what is recommended where its length was left out."""
    rest = replace(run, records=[one for one in run.records if one.seq_len != case.seq_len])
    found = recommend(rest, Wish(**case.to_dict(), what=what))
    times = {one.backend: getattr(one, FIELD[what]) for one in run.records if one.case == case and one.status == "ok"}
    fastest = min(times, key=lambda backend: times[backend])
    return any(found.too_close(one) for one in found.candidates if one.backend == fastest)


TIMES = st.dictionaries(st.sampled_from(list(BUILTIN)), st.tuples(st.floats(1e-3, 1e4), st.floats(0, 0.5)), min_size=1)


@given(TIMES, TIMES, st.integers(64, 128))
def test_no_candidate_is_faster_and_estimates_lie_between_what_was_measured(
    short: dict[str, tuple[float, float]], long: dict[str, tuple[float, float]], n: int
) -> None:
    cells = [
        cell(backend, ms, length, forward_backward_noise=noise)
        for length, times in ((64, short), (128, long))
        for backend, (ms, noise) in times.items()
    ]
    try:
        found = recommended(cells, seq_len=n)
    except RequestError:
        assert 64 < n < 128
        assert not set(short) & set(long)
        return
    for candidate in found.candidates:
        assert candidate.ms >= found.winner.ms
        assert found.margin(candidate) >= 0
        if len(candidate.seq_lens) == 2:
            ends = sorted((short[candidate.backend][0], long[candidate.backend][0]))
            assert ends[0] * (1 - 1e-9) <= candidate.ms <= ends[1] * (1 + 1e-9)
    assert len(found.candidates) + len(found.left_out) == len(set(short) | set(long))
    assert text(found)


@pytest.mark.parametrize("name", STORED)
def test_published_runs_recommend_their_least_times(name: str) -> None:
    run = load(RESULTS / name)
    assert run.complete is (name not in CUT_OFF)
    step = "backward_ms" if run.header.request["protocol"] == "seed" else "forward_backward_ms"
    times: dict[Case, dict[str, float]] = {}
    for one in run.records:
        if one.status == "ok":
            times.setdefault(one.case, {})[one.backend] = getattr(one, step)
    assert times
    for case, by_backend in times.items():
        found = recommend(run, Wish(**case.to_dict()))
        assert found.winner.ms == by_backend[found.winner.backend] == min(by_backend.values())
        assert {one.backend: one.ms for one in found.candidates} == by_backend
        assert text(found)


# --- the code ---------------------------------------------------------------------------------------------------------

CASES = {
    "full": small(),
    "causal": small(causal=True),
    "grouped": small(heads=4, causal=True),
    "longer keys": small(kv_len=96, causal=True),
}


LONG = ("xformers", "cudnn-frontend", "cudnn-frontend-deterministic", "transformer-engine", "flashinfer", "jax-mosaic")
"""Backends that take more than a few lines to call: their code has attnbench call them."""


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("backend", BUILTIN)
def test_every_backend_that_ships_has_code(backend: str, precision: str) -> None:
    for case in CASES.values():
        if backend not in SNIPPETS and backend not in LONG:
            pytest.fail("it has no code")
        code = snippet(backend, small(**case.to_dict() | {"precision": precision}))
        compile(code, backend, "exec")
        assert "{" not in code
        switch = "tensorfloat32" if backend.startswith("jax-") else 'torch.set_float32_matmul_precision("high")'
        if backend != "jax-mosaic":
            assert (switch in code) == (precision == "tf32")


def result_of(code: str, case: Case, **names: Any) -> tuple[Any, Any]:
    """What code makes of random tensors, and what eager attention does."""
    import torch

    from attnbench.backends import load as backend

    torch.manual_seed(0)
    q, k, v = (
        torch.randn(case.batch, heads, n, case.d_model)
        for heads, n in ((case.heads, case.seq_len), (case.kv_heads, case.kv_len), (case.kv_heads, case.kv_len))
    )
    given: dict[str, Any] = {"q": q, "k": k, "v": v} | names
    exec(code, given)
    return given["out"], backend("eager").build(case)(q, k, v)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize(
    "backend", ["flash-attn-2", "flash-attn-3-deterministic", "flash-attn-4", "transformer-engine"]
)
def test_the_code_of_a_package_calls_it(backend: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import standins

    standins.install(monkeypatch)
    monkeypatch.setattr(standins, "sixteen_bit", lambda *_: None)
    out, right = result_of(snippet(backend, case), case, torch=torch)
    torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-5)
    asked_for = {switch["deterministic"] for switch in standins.asked}
    assert asked_for == ({backend.endswith("-deterministic")} if backend.startswith("flash") else set())


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_code_of_jax_computes_attention(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    pytest.importorskip("jax")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    out, right = result_of(snippet("jax-xla", case), case)
    torch.testing.assert_close(torch.from_dlpack(out), right, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize(
    "backend",
    [
        "naive",
        "eager",
        "compile",
        "compile-max-autotune",
        "sdpa",
        "sdpa-math",
        "sdpa-flash",
        "flex",
        "flex-causal-score",
    ],
)
def test_the_code_computes_attention(backend: str, case: Case) -> None:
    import torch

    if backend == "sdpa-flash" and case.kv_len != case.seq_len:
        pytest.skip("the flash kernel takes no mask of unequal lengths on CPU")
    if backend == "flex-causal-score" and not case.causal:
        pytest.skip("it is about the causal mask")
    code = snippet(backend, case).replace("torch.compile(", "(lambda function, **_: function)(")  # compiling takes long
    out, right = result_of(code, case)
    torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "source", "causal"),
    [("own.py:fast", None, True), ("own:fast", None, False), ("mine", "{folder}/own.py:Kernels.fast", True),
     ("{folder}/my-own.py:fast", None, False)],
)  # fmt: skip
def test_the_code_of_a_users_function_imports_it(
    name: str, source: str | None, causal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    function = (
        "from torch.nn.functional import scaled_dot_product_attention as sdpa\n"
        "def fast(q, k, v, *, causal, scale):\n    return sdpa(q, k, v, is_causal=causal, scale=scale)\n"
        "class Kernels:\n    fast = staticmethod(fast)\n"
    )
    for file in ("own.py", "my-own.py"):
        (tmp_path / file).write_text(function)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    for module in ("own", "my-own"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    case = small(causal=causal)
    told = snippet(name.format(folder=tmp_path), case, source and source.format(folder=tmp_path))
    out, right = result_of(told, case)
    torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-5)


def test_the_code_of_any_other_backend_builds_it() -> None:
    compile(code := snippet("theirs", small()), "theirs", "exec")
    assert "build(Case(batch=1, " in code
    run = run_of([cell("mine", 0.5)], sources={"mine": "kernels/own.py:fast"})
    assert "sys.path.insert(0, 'kernels')\nfrom own import fast\n" in recommend(run, Wish()).snippet


# --- the same gradients each time -------------------------------------------------------------------------------------

ON_CUDA = {
    "sdpa-cudnn": (1.0, ("cudnn_fwd",)),
    "sdpa": (1.1, ("cudnn_fwd",)),
    "sdpa-flash": (2.0, ("flash_fwd",)),
    "sdpa-efficient": (3.0, ("fmha",)),
    "flex": (4.0, ("triton_flex_attention",)),
    "eager": (9.0, ()),
    "mine.py:attention": (0.5, ()),
}


def on_cuda(**other: tuple[float, tuple[str, ...]]) -> Run:
    cells = [
        cell(backend, ms, forward_ms=ms, kernels_forward=kernels).but(device="cuda")
        for backend, (ms, kernels) in (ON_CUDA | other).items()
    ]
    return run_of(cells, device="cuda")


def test_only_backends_with_the_same_gradients_each_time() -> None:
    found = recommend(on_cuda(), Wish(deterministic=True))
    assert names(found) == ["sdpa-flash", "sdpa-efficient", "flex", "eager"]
    why = reasons(found)
    assert "PyTorch takes no cuDNN attention" in why["sdpa-cudnn"]
    assert "it chose cuDNN" in why["sdpa"]
    assert why["mine.py:attention"] == "whether its gradients are the same each time is not known"
    assert names(recommend(on_cuda(), Wish()))[0] == "mine.py:attention"
    told = found.to_dict()
    assert told["deterministic"] is True
    assert [one["determinism"]["by_setting"] for one in told["candidates"]] == [True, True, False, False]
    assert "the fastest whose gradients are the same each time is sdpa-flash: 2 ms." in text(found)


def test_a_time_without_the_setting_is_one_at_the_least() -> None:
    found = recommend(on_cuda(), Wish(deterministic=True))
    assert [one.at_least for one in found.candidates] == [True, True, False, False]
    assert all(found.too_close(one) for one in found.candidates[1:])
    assert "50 % slower, and the time of the first is one at the least." in text(found)
    assert "The times of sdpa-flash, sdpa-efficient are those without torch.use_deterministic_algorithms" in text(found)
    assert "| ≥ 2 " in text(found)
    forward = recommend(on_cuda(), Wish(deterministic=True, what="forward"))
    assert not forward.too_close(forward.candidates[1])
    assert "The times of" not in text(forward)
    settled = recommend(on_cuda(flex=(1.5, ())), Wish(deterministic=True))
    assert names(settled)[:2] == ["flex", "sdpa-flash"]
    assert not settled.too_close(settled.candidates[1]), "it could only be slower still"


@pytest.mark.parametrize(
    ("kernels", "possible"),
    [(("flash_bwd",), True), (("fmha_cutlassB",), True), (("softmax",), True), (("cudnn_x",), False), (("gemm",), False), ((), False)],
)  # fmt: skip
def test_sdpa_is_as_deterministic_as_what_it_chose(kernels: tuple[str, ...], possible: bool) -> None:
    found = recommend(on_cuda(sdpa=(0.1, kernels)), Wish(deterministic=True))
    assert ("sdpa" in names(found)) == possible
    two = determinism("sdpa", "cuda", [(("flash_fwd",), ()), (("cudnn_fwd",), ())])
    assert not two.possible, "another one for each shape"


def test_what_is_said_of_gradients_is_of_backends_that_there_are() -> None:
    assert set(DETERMINISM) | FIXED_ON_CPU <= set(BUILTIN)
    assert {name for name in BUILTIN if name.endswith("-deterministic")} <= set(DETERMINISM)
    assert all(DETERMINISM[name].possible for name in BUILTIN if name.endswith("-deterministic"))
    assert not determinism("jax-xla", "cpu", []).possible
    assert not determinism("mine.py:f", "cpu", []).possible
    assert not determinism("mine.py:f", "cuda", []).possible


def test_no_backend_with_the_same_gradients_is_one_line() -> None:
    run = run_of([cell("sdpa-cudnn").but(device="cuda"), cell("own:f").but(device="cuda")], device="cuda")
    with pytest.raises(
        RequestError, match=r"fits: cuDNN's backward is not deterministic; .* \(sdpa-cudnn\); whether its"
    ):
        recommend(run, Wish(deterministic=True))


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("backend", ["sdpa", *(name for name, known in DETERMINISM.items() if known.possible)])
def test_the_code_sets_what_determinism_needs(backend: str, device: str, precision: str) -> None:
    code = snippet(backend, small(precision=precision), deterministic_on=device)
    compile(code, backend, "exec")
    lines = code.splitlines()
    setting = lines.index("torch.use_deterministic_algorithms(True)")
    assert lines.index("import torch") < setting < lines.index(next(line for line in lines if "out = " in line))
    assert (lines[0:3].count("import os") == 1) == (device == "cuda")
    assert ("CUBLAS_WORKSPACE_CONFIG" in code) == (device == "cuda")
    assert ("set_float32_matmul_precision" in code) == (precision == "tf32")
    assert "use_deterministic_algorithms" not in snippet(backend, small())


@pytest.mark.parametrize("case", [CASES["full"], CASES["causal"]], ids=["full", "causal"])
@pytest.mark.parametrize("device", ["cpu", "cuda"], ids=["code for cpu", "code for cuda"])
@pytest.mark.parametrize("backend", ["naive", "eager", "sdpa", "sdpa-math", "sdpa-flash"])
def test_its_gradients_are_the_same_each_time_here(
    backend: str, device: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    larger = small(seq_len=256, kv_len=256, causal=case.causal)
    code = snippet(backend, larger, deterministic_on=device)

    def gradients() -> list[Any]:
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 2, 256, 16, requires_grad=True) for _ in range(3))
        given: dict[str, Any] = {"q": q, "k": k, "v": v}
        exec(code, given)
        assert torch.are_deterministic_algorithms_enabled()
        return list(torch.autograd.grad(given["out"], (q, k, v), torch.randn(1, 2, 256, 16)))

    try:
        once, again = gradients(), gradients()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))
    assert any(bool(x.any()) for x in once)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    cells = [*power_law("eager", 2.0, forward_ms=1.0), *power_law("sdpa", 1.5, forward_ms=2.0)]
    with Store.create(tmp_path / "a", run_of(cells).header) as store:
        for one in cells:
            store.append(one)
    return tmp_path / "a"


def test_the_command_end_to_end(stored: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "attnbench", "recommend", str(stored), "--seq-len", "128"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("For a step (forward and backward) at seq_len 128, d_model 16, batch 1, 2 heads, ")
    assert done.stdout.endswith("out = scaled_dot_product_attention(q, k, v)\n```\n")
    loaded = re.findall(r"\| +(click|torch)$", done.stderr, re.MULTILINE)
    assert loaded == ["click"]


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (("--seq-len", "256", "--json"), 0, '"backend": "sdpa"'),
        (("--seq-len", "256", "--pass", "forward"), 0, "For a forward at seq_len 256"),
        (("--seq-len", "64", "--no-causal", "--dtype", "float32", "--precision", "ieee"), 0, "no mask"),
        (("--seq-len", "64", "--kv-len", "64", "--batch", "1", "--kv-heads", "2"), 0, "fastest is sdpa"),
        ((), 2, "seq_len 64, 128, 512, 1024; choose by --seq-len"),
        (("--seq-len", "64", "--causal"), 2, "mask causal was not measured"),
        (("--seq-len", "64", "--memory", "1GiB"), 2, "its memory was not measured, so it may not fit (eager, sdpa)"),
        (("--seq-len", "64", "--deterministic"), 0, "torch.use_deterministic_algorithms(True)"),
        (("--seq-len", "64", "--memory", "8 bananas"), 2, "is not a size; write it like 8GiB"),
        (("--seq-len", "many"), 2, "'many' is not a valid integer"),
        (("--seq-len", "9" * 5000), 2, "is not a valid integer"),
        (("--pass", "sideways"), 2, "pass 'sideways' is not known"),
    ],
)  # fmt: skip
def test_exit_codes(
    stored: Path, options: tuple[str, ...], code: int, told: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from attnbench.cli import main

    monkeypatch.setattr(sys, "argv", ["attnbench", "recommend", str(stored), *options])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert (stop.value.code or 0) == code
    assert told in (said.err if code else said.out)
    assert said.err.count("\n") == bool(code)
    if "--json" in options:
        found = json.loads(said.out)
        assert (found["runner_up"], found["measured"], found["case"]["seq_len"]) == ("eager", False, 256)
        assert [one["seq_lens"] for one in found["candidates"]] == [[128, 512]] * 2


def test_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="does not exist"):
        recommend(load(tmp_path / "nowhere"), Wish())
