"""What a case costs at the least, the floor that follows, and the tags that a record gives cause for."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench import calibration, cost
from attnbench.case import Case
from attnbench.errors import RequestError
from attnbench.limits import Ceilings, backward_terms, forward_terms, judged
from attnbench.record import Record
from attnbench.result import load
from attnbench.tags import TAGS, tagged
from conftest import DATA, Attnbench, record, small

RESULTS = Path(__file__).parent.parent / "results"

ROUND = Ceilings(
    copy_bytes_per_s=1e9,
    read_bytes_per_s=2e9,
    exp_per_s=1e9,
    launch_ms=0.001,
    matmul_flop_per_s={"float32": 1e9, "tf32": 6e9, "float16": 1e10, "bfloat16": 9e9},
)


@given(st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_pairs_are_those_that_the_mask_leaves(rows: int, keys: int, causal: bool) -> None:
    case = Case(2, 6, 3, rows, keys, 8, causal=causal)
    seen = sum(not causal or key <= row + keys - rows for row in range(rows) for key in range(keys))
    assert cost.pairs(case) == 12 * seen
    assert cost.flops_forward(case) == 4 * 12 * seen * 8
    assert cost.flops_backward(case) == 10 * 12 * seen * 8
    assert cost.exps_forward(case) == cost.exps_backward(case) == 12 * seen


def test_bytes_are_every_input_and_output_once() -> None:
    case = Case(2, 6, 3, 10, 20, 8, dtype="bfloat16")
    q, kv = 2 * 6 * 10 * 8 * 2, 2 * 3 * 20 * 8 * 2
    assert cost.bytes_forward(case) == 2 * q + 2 * kv  # q, out; k, v
    assert cost.bytes_backward(case) == 4 * q + 4 * kv  # q, out, do, dq; k, v, dk, dv


def test_the_floor_is_the_longest_of_the_terms() -> None:
    case = small(batch=1, heads=1, kv_heads=1, seq_len=1000, kv_len=1000, d_model=100, dtype="float16")
    terms = forward_terms(case, ROUND)
    assert terms == pytest.approx({"memory": 0.4, "matmul": 40, "exp": 1, "launch": 0.001})  # ms
    found = judged(record(case, forward_ms=80.0, backward_ms=400.0, saved_activations_MiB=0.0), ROUND)
    assert (found.floor_forward_ms, found.floor_backward_ms) == pytest.approx((40, 100))
    assert (found.limit_forward, found.limit_backward) == pytest.approx((0.5, 0.25))
    assert (found.forward_TFLOP_per_s, found.backward_TFLOP_per_s) == pytest.approx((0.005, 0.0025))
    assert found.bound_by == "matmul"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({"seq_len": 1, "kv_len": 1, "d_model": 1, "heads": 1, "kv_heads": 1}, "launch"),
        ({"seq_len": 1, "kv_len": 10**6, "d_model": 1}, "memory"),
        ({"seq_len": 1000, "kv_len": 1000, "d_model": 1}, "exp"),
        ({"seq_len": 1000, "kv_len": 1000, "d_model": 100}, "matmul"),
    ],
)
def test_what_bounds_a_step(shape: dict[str, Any], expected: str) -> None:
    found = judged(
        record(small(**shape, dtype="float16"), forward_ms=1e4, backward_ms=1e4, saved_activations_MiB=0.0), ROUND
    )
    assert found.bound_by == expected


@pytest.mark.parametrize(
    ("dtype", "precision", "rate"),
    [
        ("float32", "ieee", 1e10 / 3),  # three products of float16 halves beat one of float32
        ("float32", "tf32", 1e10),
        ("bfloat16", "ieee", 1e10),
        ("float64", "ieee", None),
    ],
)
def test_the_ceiling_is_the_fastest_arithmetic_of_the_accuracy_class(
    dtype: str, precision: str, rate: float | None
) -> None:
    assert ROUND.matmul(small(dtype=dtype, precision=precision)) == (pytest.approx(rate) if rate else None)


def test_a_backend_that_keeps_the_scores_has_four_products_to_take_and_a_matrix_to_read() -> None:
    case = small(batch=1, heads=1, kv_heads=1, seq_len=1000, kv_len=1000, d_model=100, dtype="float16")
    again, kept = backward_terms(case, ROUND), backward_terms(case, ROUND, keeps_scores=True)
    assert kept["matmul"] == pytest.approx(again["matmul"] * 4 / 5)
    assert kept["memory"] == pytest.approx(again["memory"] + 1)  # 2 MB at 2 GB/s
    assert kept["exp"] == 0
    matrix_MiB = 1000 * 1000 * 2 / (1 << 20)
    floors = [
        judged(record(case, backward_ms=500.0, saved_activations_MiB=saved), ROUND).floor_backward_ms
        for saved in (matrix_MiB / 2, matrix_MiB, None)
    ]
    assert floors == pytest.approx([100, 80, 80])


def test_what_the_cache_holds_need_not_come_from_memory() -> None:
    case = small(seq_len=1, kv_len=10**6, d_model=1)
    cached = Ceilings(read_bytes_per_s=1e9, cache_bytes=4_000_000)
    assert forward_terms(case, cached, cached=True)["memory"] == pytest.approx(
        forward_terms(case, cached)["memory"] - 4
    )


def test_without_ceilings_nothing_is_made_up() -> None:
    assert judged(record(forward_ms=1.0), None) == record(forward_ms=1.0)
    empty = judged(record(forward_ms=1.0), Ceilings())
    assert (empty.floor_forward_ms, empty.limit_forward, empty.bound_by) == (None, None, None)
    assert empty.forward_TFLOP_per_s is not None


def stored() -> list[Record]:
    """Records of the published runs, judged; by ceilings measured on the same kind of GPU where a run has none."""
    h200 = json.loads((DATA / "h200_ceilings.json").read_text())
    found: list[Record] = []
    for directory in sorted(RESULTS.iterdir()):
        run = load(directory)
        if run.header.request["protocol"] == "default":
            known = Ceilings.from_dict(run.header.ceilings or h200)
            found += [judged(one, known) for one in run.records]
    return found


def test_no_stored_run_is_faster_than_its_floor() -> None:
    limits = {
        f"{one.cell_id} {name}": limit
        for one in stored()
        for name, limit in (("forward", one.limit_forward), ("backward", one.limit_backward))
        if limit is not None
    }
    assert len(limits) > 500
    assert 0.5 < max(limits.values()) <= 1, max(limits, key=lambda cell: limits[cell])


def test_events_agree_with_the_kernel_that_they_watched() -> None:
    """Forwards of one kernel, above 0.1 ms, in the published runs that watched: the two clocks see the same calls."""
    apart = {
        f"{one.cell_id} {one.run_id}": one.watched_forward_ms / one.device_forward_ms - 1
        for one in stored()
        if one.watched_forward_ms and one.device_forward_ms and one.device_forward_ms > 0.1
        if len(one.kernels_forward or ()) == 1
    }
    assert len(apart) > 100
    assert max(map(abs, apart.values())) < 0.02, max(apart, key=lambda cell: abs(apart[cell]))


def test_a_floor_that_is_too_high_would_be_noticed() -> None:
    fast = Ceilings(matmul_flop_per_s={"float32": 1.0})
    found = tagged(judged(record(forward_ms=1.0, forward_samples_ms=(1.0,) * 20), fast))
    assert found.limit_forward is not None
    assert found.limit_forward > 1
    assert found.tags == ("above_limit",)


# --- tags -------------------------------------------------------------------------------------------------------------

FINE: dict[str, Any] = {
    "forward_ms": 1.0,
    "forward_samples_ms": (1.0,) * 20,
    "forward_noise": 0.001,
    "device_forward_ms": 0.99,
    "call_forward_ms": 1.01,
    "limit_forward": 0.7,
    "windows": ({"round": 0, "samples": {}, "sm_clock_MHz": 1980.0, "clock_events": ["sw_power_cap"]},),
}
CAUSES: dict[str, dict[str, Any]] = {
    "few_samples": {"forward_samples_ms": (1.0,) * 9},
    "noisy": {"forward_noise": 0.03},
    "launch_bound": {"call_forward_ms": 1.3},
    "throttled": {"windows": ({"samples": {}, "clock_events": ["hw_slowdown"]},)},
    "clock_unlocked": {"windows": tuple({"samples": {}, "sm_clock_MHz": clock} for clock in (1980.0, 1800.0))},
    "fallback": {"tags": ("fallback",)},
    "above_limit": {"limit_backward": 1.01},
}


def tags_of(**changes: Any) -> tuple[str, ...]:
    return tagged(record(**FINE | changes)).tags


def test_a_record_without_cause_has_no_tag() -> None:
    assert tags_of() == ()


@pytest.mark.parametrize("tag", TAGS)
def test_each_tag_has_a_cause_and_shows_alone(tag: str) -> None:
    assert tags_of(**CAUSES[tag]) == (tag,)


@pytest.mark.parametrize(
    ("tag", "cause"),
    [
        ("noisy", {"forward_samples_ms": (1.0, 1.1, 0.9) * 5}),
        ("launch_bound", {"windows": ({"samples": {}, "starved": True},)}),
    ],
)
def test_other_causes(tag: str, cause: dict[str, Any]) -> None:
    assert tags_of(**cause) == (tag,)


def test_discarded_windows_and_failed_cells_give_no_cause() -> None:
    gone = {"samples": {}, "discarded": "hw_slowdown", "clock_events": ["hw_slowdown"], "sm_clock_MHz": 900.0}
    assert tags_of(windows=(*FINE["windows"], gone | {"starved": True})) == ()
    assert tags_of(status="oom", forward_noise=1.0) == ()


# --- calibration ------------------------------------------------------------------------------------------------------


def test_ceilings_are_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTNBENCH_CACHE", str(tmp_path / "cache"))
    count = itertools.count()
    monkeypatch.setattr(calibration, "_measured", lambda device: {"exp_per_s": 1.0 + next(count)})
    first = calibration.ceilings("cpu")
    assert first["seconds"] >= 0
    again = calibration.ceilings("cpu")
    assert (again["exp_per_s"], "seconds" in again) == (1.0, False)
    assert calibration.ceilings("cpu", anew=True)["exp_per_s"] == 2.0
    monkeypatch.setattr(calibration, "REVISION", -1)
    assert calibration.ceilings("cpu")["exp_per_s"] == 3.0, "of another revision"


def test_a_cache_that_cannot_be_written_or_read_costs_a_measurement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNBENCH_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(calibration, "_measured", lambda device: {"exp_per_s": 7.0})
    assert calibration.ceilings("cpu")["exp_per_s"] == 7.0
    monkeypatch.setenv("ATTNBENCH_CACHE", str(tmp_path))
    calibration.ceilings("cpu")
    (kept,) = tmp_path.glob("ceilings-*.json")
    kept.write_text("{torn")
    assert calibration.ceilings("cpu")["exp_per_s"] == 7.0


def test_a_device_that_is_not_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTNBENCH_CACHE", str(tmp_path))
    with pytest.raises(RequestError, match=r"the ceilings of cuda:9 cannot be measured: .*CUDA GPUs; try --device cpu"):
        calibration.ceilings("cuda:9")


def test_a_calibration_of_this_cpu_is_plausible(attnbench: Attnbench) -> None:
    done = attnbench("calibrate", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["seconds"] < 60
    known = Ceilings.from_dict(told)
    assert known.memory_bytes_per_s
    assert 1e8 < known.memory_bytes_per_s < 1e13
    assert known.exp_per_s
    assert 1e7 < known.exp_per_s < 1e13
    assert known.launch_ms
    assert 1e-5 < known.launch_ms < 1
    assert set(known.matmul_flop_per_s) == {"float32", "float64", "bfloat16", "float16"}
    assert all(1e7 < rate < 1e15 for rate in known.matmul_flop_per_s.values())
    assert "matrix product, float32" in attnbench("calibrate", "--device", "cpu").stdout
