"""What only a CUDA GPU can show. Run by: pytest -m gpu"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attnbench import backends, forecast, reference
from attnbench.analysis.compare import compare
from attnbench.backends import Ask, Backend
from attnbench.bench import Bench, Settings
from attnbench.case import Case
from attnbench.grid import Grid
from attnbench.inputs import make_inputs
from attnbench.limits import Ceilings
from attnbench.measure import graphs
from attnbench.measure.call import TorchCall, make_call
from attnbench.measure.ceilings import measure
from attnbench.measure.kernels import device_times, empty_kernel
from attnbench.measure.stopwatch import CudaStopwatch
from attnbench.measure.timing import Timer
from attnbench.plan import Cell, Plan
from attnbench.progress import Silent
from attnbench.request import Request
from attnbench.result import Result
from attnbench.runner import sweep
from attnbench.store import Header, Store
from attnbench.worker import answer
from conftest import DATA, records_of, small
from test_backends import SHAPES
from test_measure import step_ledger

# torch's compiler warns of things that are not ours to mend, and of others on every GPU
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

CUDA = torch.device("cuda", 0)
MISBEHAVING = DATA / "misbehaving_gpu.py"

MORE_SHAPES: dict[str, dict[str, Any]] = {
    "one wide": {"d_model": 1},
    "wide": {"d_model": 128},
    "very wide": {"d_model": 256},
    "long, narrow": {"batch": 8, "heads": 1, "kv_heads": 1, "seq_len": 256, "kv_len": 256, "d_model": 16},
    "long": {"seq_len": 256, "kv_len": 256, "d_model": 64},
    "long, causal": {"seq_len": 256, "kv_len": 256, "d_model": 64, "causal": True},
}
CASES = {
    f"{shape}, {dtype}, {precision}": values | {"dtype": dtype, "precision": precision}
    for shape, values in (SHAPES | MORE_SHAPES).items()
    for dtype, precision in (("float32", "ieee"), ("float32", "tf32"), ("float16", "ieee"), ("bfloat16", "ieee"))
    if "dtype" not in values
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


def complaint_of(backend: Backend, case: Case, *, backward: bool) -> str | None:
    """What is wrong with a backend's output and gradients, or the exception that it raised."""
    torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")
    inputs = make_inputs(case, CUDA, 0, requires_grad=backward)
    expected = reference.reference(case, inputs, backward=backward)
    try:
        call = make_call(backend, backend.build(case), inputs)
        result = call.forward()
        grads = call.gradients(call.backward(result)) if backward else None
        return reference.compare(case, expected, call.output(result), grads).complaint
    except Exception as error:
        return repr(error)


def soil() -> None:
    """Whoever takes memory after this finds it full of other data, and not of zeros that happen to be right."""
    blocks = [torch.full((1 << bits,), 0x47, dtype=torch.uint8, device=CUDA) for bits in range(9, 27) for _ in range(4)]
    del blocks


def known_to_be_wrong(name: str, case: Case, *, backward: bool) -> str | None:
    """What is wrong with a backend though it takes the case; a run finds it `incorrect`."""
    if name.startswith("flash-attn-4") and backward and -(-case.d_model // 16) % 2:
        return "dq"  # parts of it are never written: https://github.com/Dao-AILab/flash-attention/pull/2896
    return None


def agrees_with_itself(name: str, case: Case) -> None:
    """Holds what a backend says of a case against what comes of it."""
    backend = backends.load(name)
    if why_not := backend.unavailable("cuda"):
        pytest.skip(why_not)
    backward = backend.support["cuda"].backward
    reason = backend.refuses(Ask(case, "cuda", backward, torch.cuda.get_device_capability()))
    soil()
    complaint = complaint_of(backend, case, backward=backward)
    if not case.causal and not backend.support["cuda"].full:
        pytest.skip("it could, but what the mask costs is what it is there to show")
    if reason is None and (wrong := known_to_be_wrong(name, case, backward=backward)):
        short = complaint is None and case.seq_len <= 64  # in one tile of queries it can come out right
        assert short or str(complaint).startswith(wrong), "it is no longer wrong, or in another way"
    elif reason is None:
        assert complaint is None
    assert complaint is not None or reason is None, f"it refused with {reason!r}, but it would have been right"


COMPILES_FOR_MINUTES = "compile-max-autotune"


@pytest.mark.parametrize("name", [name for name in backends.BUILTIN if name != COMPILES_FOR_MINUTES])
@pytest.mark.parametrize("shape", CASES)
def test_a_backend_that_says_yes_is_right_and_one_that_says_no_would_not_have_been(name: str, shape: str) -> None:
    agrees_with_itself(name, small(**CASES[shape]))


def test_what_compiles_for_minutes_is_right_in_one_case() -> None:
    agrees_with_itself(COMPILES_FOR_MINUTES, small(dtype="bfloat16", causal=True))


@pytest.mark.parametrize("name", ["jax-xla", "jax-cudnn", "jax-mosaic"])
def test_jax_is_timed_by_the_profiler_and_has_its_memory(name: str, tmp_path: Path) -> None:
    if why_not := backends.load(name).unavailable("cuda"):
        pytest.skip(why_not)
    (found,) = measured(tmp_path / "run", name, seq_len=4096, kv_len=4096, dtype="float16").records
    assert found.status == "ok", found.reason
    assert found.kernels_forward
    assert found.device_forward_ms == pytest.approx(found.forward_ms, rel=0.15)
    assert found.call_forward_ms is not None
    assert found.forward_ms is not None
    assert found.call_forward_ms > 0.95 * found.forward_ms
    assert found.forward_peak_MiB is not None
    assert found.mem_after_inputs_MiB is not None
    assert found.mem_after_inputs_MiB == pytest.approx(4 * 8 * 4096 * 64 * 2 / (1 << 20), rel=0.05)
    assert found.forward_peak_MiB >= found.mem_after_inputs_MiB


def run_command(tmp_path: Path, *args: str, code: int) -> dict[str, dict[str, object]]:
    command = [
        sys.executable,
        "-m",
        "attnbench",
        "run",
        "--device",
        "cuda",
        "--out",
        str(tmp_path / "run"),
        "--quiet",
        *args,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == code, done.stderr
    return {str(record["backend"]).rpartition(":")[2]: record for record in records_of(tmp_path / "run")}


def test_a_poisoned_context_costs_its_own_cell_alone(tmp_path: Path) -> None:
    names = ["--backend=sdpa", f"--backend={MISBEHAVING}:poisons_the_context", "--backend=eager"]
    found = run_command(tmp_path, "--seq-len", "256", "--d-model", "64", *names, code=3)
    assert found["poisons_the_context"]["status"] == "crash"
    assert "CUDA context lost" in str(found["poisons_the_context"]["reason"])
    assert (found["sdpa"]["status"], found["eager"]["status"]) == ("ok", "ok")


def test_out_of_memory_is_told_apart_by_phase(tmp_path: Path) -> None:
    names = [
        f"--backend={MISBEHAVING}:allocates_without_end",
        f"--backend={MISBEHAVING}:allocates_in_backward",
        "--backend=sdpa",
    ]
    found = run_command(tmp_path, "--seq-len", "256", "--d-model", "64", "--memory-limit", "8GiB", *names, code=0)
    assert (found["allocates_without_end"]["status"], found["allocates_without_end"]["phase"]) == ("oom", "forward")
    assert (found["allocates_in_backward"]["status"], found["allocates_in_backward"]["phase"]) == ("oom", "backward")
    assert found["sdpa"]["status"] == "ok"


def test_compiled_backends_compile_anew_for_each_shape_however_many(tmp_path: Path) -> None:
    """torch.compile gives up on a function after eight shapes, silently or not, unless it is made to forget."""
    lengths = ",".join(str(64 * i) for i in range(1, 12))
    run_command(tmp_path, "--seq-len", lengths, "--d-model", "32", "--backend=compile", "--budget", "0.05", code=0)
    records = records_of(tmp_path / "run")
    assert [record["status"] for record in records] == ["ok"] * 11
    assert all(record["compile_ms"] > 0 for record in records)
    assert all(any("triton" in kernel for kernel in record["kernels_forward"]) for record in records)


def test_the_record_says_what_sdpa_ran(tmp_path: Path) -> None:
    names = [f"--backend={name}" for name in ("sdpa", "sdpa-math", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn")]
    found = run_command(tmp_path, "--seq-len", "1024", "--d-model", "64", "--dtype", "bfloat16", *names, code=0)
    from attnbench.families import family

    for name in ("math", "flash", "efficient", "cudnn"):
        assert family(tuple(found[f"sdpa-{name}"]["kernels_forward"])) == name  # pyright: ignore[reportArgumentType]
    assert family(tuple(found["sdpa"]["kernels_forward"])) in ("flash", "cudnn")  # pyright: ignore[reportArgumentType]


# --- time -------------------------------------------------------------------------------------------------------------


def call_of(name: str, **sizes: object) -> TorchCall:
    case = small(**{"batch": 8, "heads": 1, "kv_heads": 1, "d_model": 64, "dtype": "bfloat16"} | sizes)
    return TorchCall(backends.load(name).build(case), make_inputs(case, CUDA, 0))


def timer(**how: object) -> Timer:
    return Timer(CUDA, overhead_ms=empty_kernel(CUDA)[1], **how)  # pyright: ignore[reportArgumentType]


def test_the_hosts_time_does_not_enter() -> None:
    calls = [call_of(name, seq_len=256, kv_len=256) for name in ("sdpa", f"{MISBEHAVING}:slow_to_launch")]
    forwards = [statistics.median(timer().time(call, 0.3).samples_ms["forward"]) for call in calls]
    assert forwards[1] < 1.5 * forwards[0] + 0.01 < 0.2


def test_a_device_that_catches_up_with_the_host_is_noticed_and_given_more_time() -> None:
    stopwatch = timer().stopwatch(call_of(f"{MISBEHAVING}:slow_to_launch", seq_len=256, kv_len=256))
    assert isinstance(stopwatch, CudaStopwatch)
    stopwatch.window(20)
    stopwatch._host_s, stopwatch._patience = 1e-5, 1.0  # it thinks that the host is quick
    starved = stopwatch.window(20)
    assert starved.starved
    assert max(starved.samples_ms["forward"]) > 1, "the host's millisecond shows"
    windows = [stopwatch.window(20)]
    while windows[-1].starved and len(windows) < 12:
        stopwatch.wait_longer()
        windows.append(stopwatch.window(20))
    assert not windows[-1].starved
    assert statistics.median(windows[-1].samples_ms["forward"]) < 0.1


class InProcess:
    """Carries requests to a bench in this process, which saves the start of another."""

    starting_s = 0.0

    def __init__(self, settings: Settings) -> None:
        self.bench = Bench(settings, lambda _: None)

    def ask(self, message: dict[str, Any], timeout_s: float, backend: str) -> dict[str, Any]:
        return answer(self.bench, dict(message))


def measured(directory: Path, *names: str, clock: str = "sustained", graph: bool = False, **sizes: object) -> Result:
    """A run of some backends on one case."""
    case = small(**{"batch": 8, "heads": 1, "kv_heads": 1, "d_model": 64, "dtype": "bfloat16"} | sizes)
    request = Request(Grid(), "test", names, {}, "cuda:0", clock=clock, graph=graph, budget_s=0.3)
    cells = tuple(Cell(case, name, None, None, (), True, 1.0) for name in names)
    header = Header("r", "now", request.to_dict(), {}, "0", len(cells))
    executor = InProcess(Settings("cuda:0", 0, True, "default", clock, warm_cache=False, graph=graph))
    with Store.create(directory, header) as store:
        sweep(Plan(request, {}, cells, {}, None), executor, store, Silent())  # pyright: ignore[reportArgumentType]
        return Result(store.directory, store.header, store.records)


def test_a_call_that_waits_for_the_device_is_launch_bound_and_cannot_be_captured(tmp_path: Path) -> None:
    names = ("sdpa-flash", f"{MISBEHAVING}:waits_for_the_device")
    records = measured(tmp_path / "run", *names, graph=True, seq_len=4096, kv_len=4096).records
    plain, waiting = sorted(records, key=lambda record: names.index(record.backend))
    assert "launch_bound" in waiting.tags
    assert all(window["starved"] for window in waiting.windows if "discarded" not in window)
    assert waiting.graph_forward_ms is None
    assert "captur" in str(waiting.graph_reason)
    assert plain.graph_reason is None
    assert plain.graph_forward_ms == pytest.approx(plain.forward_ms, rel=0.05)
    assert plain.graph_backward_ms == pytest.approx(plain.backward_ms, rel=0.05)


def test_captures_keep_no_memory_from_others() -> None:
    """Matrices of scores have 512 MiB here: a workspace that was cut from one and is kept would keep it all."""
    case = small(batch=8, heads=1, kv_heads=1, seq_len=4096, kv_len=4096, d_model=16)
    backend = backends.load("naive")
    call = make_call(backend, backend.build(case), make_inputs(case, CUDA, 0, requires_grad=True))
    assert isinstance(call, TorchCall)
    reserved_MiB = []
    for _ in range(4):
        graphs.capture(call, CUDA, backward=True)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved_MiB.append(torch.cuda.memory_reserved() >> 20)
    assert reserved_MiB[-1] - reserved_MiB[0] < 100


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("sdpa-flash", {"seq_len": 4096, "kv_len": 4096}),
        ("sdpa-flash", {"seq_len": 8192, "kv_len": 8192, "d_model": 16}),
        ("sdpa-cudnn", {"seq_len": 8192, "kv_len": 8192}),
        ("sdpa-efficient", {"seq_len": 1024, "kv_len": 1024, "d_model": 128, "dtype": "float32"}),
    ],
)
def test_events_agree_with_the_kernels_own_times(name: str, sizes: dict[str, object]) -> None:
    call = call_of(name, **sizes)
    sampling = timer().time(call, 0.3)
    measured = sampling.samples_ms["forward"]
    seen = device_times(timer().stopwatch(call), near_cap=bool(sampling.near_cap))["forward"]
    assert len([name for name in seen.names if not name.startswith("Memset")]) == 1
    assert statistics.median(measured) == pytest.approx(seen.device_ms, rel=0.02)
    assert seen.events_ms == pytest.approx(seen.device_ms, rel=0.02), "of the very same calls"


def test_small_cells_are_launch_bound_and_have_both_times(tmp_path: Path) -> None:
    (record,) = measured(tmp_path / "run", "sdpa-flash", seq_len=256, kv_len=256).records
    assert "launch_bound" in record.tags
    assert record.call_forward_ms is not None
    assert record.device_forward_ms is not None
    assert record.call_forward_ms > 1.2 * record.device_forward_ms


@pytest.mark.parametrize("regime", ["sustained", "burst"])
def test_windows_carry_the_devices_state_and_the_regime_is_recorded(tmp_path: Path, regime: str) -> None:
    (record,) = measured(tmp_path / "run", "sdpa-flash", clock=regime, seq_len=4096, kv_len=4096).records
    assert record.clock_regime == regime
    assert {window["round"] for window in record.windows} == {0, 1, 2}
    for window in record.windows:
        assert 200 < window["sm_clock_MHz"] < 4000
        assert 30 < window["power_W"] < 2000
        assert isinstance(window["clock_events"], tuple)


def test_a_backend_that_ran_anothers_kernels_is_tagged_fallback() -> None:
    settings = Settings("cuda:0", 0, True, "default", "sustained", warm_cache=False, graph=False)
    at_work = Bench(settings, lambda _: None)
    case = small(batch=8, seq_len=1024, kv_len=1024, d_model=64, dtype="bfloat16").to_dict()
    tags = {}
    for name, runs in (("sdpa-cudnn", "sdpa-cudnn"), ("sdpa-cudnn", "sdpa-flash"), ("flex", "flex"), ("flex", "eager")):
        at_work.backends = {name: replace(backends.load(name), build=backends.load(runs).build)}
        at_work.callables.clear()
        reply = at_work.visit(case, name, None, first=True, last=False, budget_s=0.05)
        tags[name, runs] = reply["fields"].get("tags")
    assert tags == {
        ("sdpa-cudnn", "sdpa-cudnn"): None,
        ("sdpa-cudnn", "sdpa-flash"): ["fallback"],
        ("flex", "flex"): None,
        ("flex", "eager"): ["fallback"],
    }


def test_a_calibration_takes_seconds_and_is_plausible() -> None:
    began = time.monotonic()
    known = Ceilings.from_dict(measure(CUDA))
    assert time.monotonic() - began < 20
    assert known.exp_per_s
    assert known.launch_ms
    assert known.memory_bytes_per_s
    rates = known.matmul_flop_per_s
    assert rates["bfloat16"] > rates["tf32"] > rates["float32"] > 1e12
    assert 1e11 < known.memory_bytes_per_s < 2e13
    assert 1e11 < known.exp_per_s < 1e14
    assert 1e-4 < known.launch_ms < 0.01


def test_a_slow_down_of_three_percent_is_seen_and_none_is_seen_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a load that stays below the power cap: beside one that is held by it, a spin cools, and the clock makes up."""
    runs = []
    for name, spin_us in (("a", 0), ("again", 0), ("slower", 41)):  # with its launch 3 % of 1.41 ms
        monkeypatch.setenv("SPIN_US", str(spin_us))
        backend = f"{MISBEHAVING}:flash_after_a_spin"
        runs.append(measured(tmp_path / name, backend, seq_len=16384, kv_len=16384, d_model=16))
    assert not compare(runs[0], runs[1], 0.02).regressions
    assert [found.what for found in compare(runs[0], runs[2], 0.02).regressions] == ["forward"]


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["naive", "eager", "sdpa-math", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "attnbench"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("d_model", [16, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_forecast_peaks_are_within_a_fifth(name: str, dtype: str, d_model: int, causal: bool) -> None:
    case = small(batch=8, heads=1, kv_heads=1, seq_len=4096, kv_len=4096, d_model=d_model, dtype=dtype, causal=causal)
    backend = backends.load(name)
    if backend.refuses(Ask(case, "cuda")):
        pytest.skip("not taken")
    fields = step_ledger(CUDA, case, name)
    expected = forecast.memory_bytes(case, name)
    assert expected is not None
    assert expected[1] is not None
    assert fields["forward_peak_MiB"] == pytest.approx(expected[0] / (1 << 20), rel=0.2)
    assert fields["backward_peak_MiB"] == pytest.approx(expected[1] / (1 << 20), rel=0.2)
