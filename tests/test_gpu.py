"""What only a CUDA GPU can show. Run by: pytest -m gpu"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnbench import backends, forecast
from attnbench.backends import Ask
from attnbench.inputs import make_inputs
from attnbench.measure.call import Call
from attnbench.measure.kernels import Watch
from attnbench.measure.timing import time_call
from attnbench.reference import compare, reference
from conftest import DATA, records_of, small
from test_backends import SHAPES
from test_measure import step_ledger

# torch's compiler warns of things that are not ours to mend, and of others on every GPU
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

CUDA = torch.device("cuda", 0)
MISBEHAVING = DATA / "misbehaving_gpu.py"

CASES = {
    f"{shape}, {dtype}, {precision}": values | {"dtype": dtype, "precision": precision}
    for shape, values in (SHAPES | {"wide": {"d_model": 128}, "very wide": {"d_model": 256}}).items()
    for dtype, precision in (("float32", "ieee"), ("float32", "tf32"), ("float16", "ieee"), ("bfloat16", "ieee"))
    if "dtype" not in values
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", backends.BUILTIN)
@pytest.mark.parametrize("shape", CASES)
def test_a_backend_that_says_yes_is_right_and_one_that_says_no_would_not_have_been(name: str, shape: str) -> None:
    case = small(**CASES[shape])
    backend = backends.load(name)
    reason = backend.refuses(Ask(case, "cuda"))
    torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")
    call = Call(backend.build(case), make_inputs(case, CUDA, 0))
    if reason is None:
        out = call.check_output(call.forward())
        errors = compare(case, reference(case, call.inputs), out, call.backward(out))
        assert errors.complaint is None, errors
        return
    try:
        out = call.check_output(call.forward())
        complaint = compare(case, reference(case, call.inputs), out, call.backward(out)).complaint
    except Exception as error:
        complaint = repr(error)
    assert complaint is not None, f"it refused with {reason!r}, but it would have been right"


def sweep(tmp_path: Path, *args: str, code: int) -> dict[str, dict[str, object]]:
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
    found = sweep(tmp_path, "--seq-len", "256", "--d-model", "64", *names, code=3)
    assert found["poisons_the_context"]["status"] == "crash"
    assert "CUDA context lost" in str(found["poisons_the_context"]["reason"])
    assert (found["sdpa"]["status"], found["eager"]["status"]) == ("ok", "ok")


def test_out_of_memory_is_told_apart_by_phase(tmp_path: Path) -> None:
    names = [
        f"--backend={MISBEHAVING}:allocates_without_end",
        f"--backend={MISBEHAVING}:allocates_in_backward",
        "--backend=sdpa",
    ]
    found = sweep(tmp_path, "--seq-len", "256", "--d-model", "64", "--memory-limit", "8GiB", *names, code=0)
    assert (found["allocates_without_end"]["status"], found["allocates_without_end"]["phase"]) == ("oom", "forward")
    assert (found["allocates_in_backward"]["status"], found["allocates_in_backward"]["phase"]) == ("oom", "backward")
    assert found["sdpa"]["status"] == "ok"


def test_compiled_backends_compile_anew_for_each_shape_however_many(tmp_path: Path) -> None:
    """torch.compile gives up on a function after eight shapes, silently or not, unless it is made to forget."""
    lengths = ",".join(str(64 * i) for i in range(1, 12))
    sweep(tmp_path, "--seq-len", lengths, "--d-model", "32", "--backend=compile", "--budget", "0.05", code=0)
    records = records_of(tmp_path / "run")
    assert [record["status"] for record in records] == ["ok"] * 11
    assert all(record["compile_ms"] > 0 for record in records)
    assert all(any("triton" in kernel for kernel in record["kernels_forward"]) for record in records)


def test_the_record_says_what_sdpa_ran(tmp_path: Path) -> None:
    names = [f"--backend={name}" for name in ("sdpa", "sdpa-math", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn")]
    found = sweep(tmp_path, "--seq-len", "1024", "--d-model", "64", "--dtype", "bfloat16", *names, code=0)
    from attnbench.families import family

    for name in ("math", "flash", "efficient", "cudnn"):
        assert family(tuple(found[f"sdpa-{name}"]["kernels_forward"])) == name  # pyright: ignore[reportArgumentType]
    assert family(tuple(found["sdpa"]["kernels_forward"])) in ("flash", "cudnn")  # pyright: ignore[reportArgumentType]


def test_the_hosts_time_does_not_enter() -> None:
    case = small(batch=8, seq_len=256, kv_len=256, d_model=64, dtype="bfloat16")
    quick, slow = (backends.load(name) for name in ("sdpa", f"{MISBEHAVING}:slow_to_launch"))
    forwards = [
        statistics.median(
            time_call(
                Call(b.build(case), make_inputs(case, CUDA, 0)), CUDA, backward=True, budget_s=0.3, warm=False
            ).forward
        )
        for b in (quick, slow)
    ]
    assert forwards[1] < 1.5 * forwards[0] + 0.01 < 0.2


def test_events_agree_with_the_kernels_own_times() -> None:
    case = small(batch=8, heads=1, kv_heads=1, seq_len=8192, kv_len=8192, d_model=64, dtype="bfloat16")
    call = Call(backends.load("sdpa-flash").build(case), make_inputs(case, CUDA, 0))
    samples = time_call(call, CUDA, backward=True, budget_s=0.5, warm=False)
    with Watch(CUDA) as watch:
        out = watch(call.forward)
        watch(lambda: call.backward(out))
    for measured, seen in zip((samples.forward, samples.backward), watch.seen(), strict=True):
        assert statistics.median(measured) == pytest.approx(seen.device_ms, rel=0.1)


@pytest.mark.parametrize("name", ["naive", "eager", "sdpa-math", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn"])
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
