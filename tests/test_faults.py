"""Every way a cell can fail, for real, in worker processes; and a healthy cell after each."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from attnbench.executors.local import LocalExecutor, WorkerLost, worker_environment
from attnbench.grid import Grid
from attnbench.request import Request
from conftest import MISBEHAVING, SMALL_GRID, Attnbench, records_of

pytestmark = pytest.mark.alone

FAULTS: dict[str, tuple[str, str | None, str]] = {
    "killed": ("crash", "forward", "SIGKILL (perhaps the kernel's out-of-memory killer)"),
    "segfault": ("crash", "forward", "in string_at"),
    "aborts": ("crash", "forward", "assertion failed: tile % 16 == 0"),
    "forks": ("crash", "forward", "SIGABRT"),
    "turns_gradients_off": ("error", "forward", "off the graph"),
    "writes_to_its_inputs": ("error", "forward", "wrote to q, k or v"),
    "says_what_cannot_be_written": ("error", "forward", "ValueError: [31m red"),
    "exits": ("crash", "forward", "exit code 7"),
    "raises": ("error", "forward", "ValueError: no kernel for this shape"),
    "hangs": ("timeout", "forward", "gave no result within"),
    "hangs_in_backward": ("timeout", "backward", "gave no result within"),
    "allocates_without_end": ("oom", "forward", "can't allocate memory"),
    "allocates_in_backward": ("oom", "backward", "can't allocate memory"),
    "wrong_out": ("incorrect", None, "out is off by 0.001"),
    "wrong_dq": ("incorrect", None, "dq is off by"),
    "wrong_dk": ("incorrect", None, "dk is off by"),
    "wrong_dv": ("incorrect", None, "dv is off by"),
    "nan_in_one_row": ("incorrect", None, "out has 16 values that are not finite"),
    "wrong_shape": ("error", "forward", "returned shape (1, 1, 64, 15)"),
    "wrong_dtype": ("error", "forward", "returned torch.float64"),
    "off_the_graph": ("error", "forward", "off the graph"),
    "not_a_tensor": ("error", "forward", "returned NoneType"),
    "speaks": ("ok", None, ""),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """One sweep over all the faults, two cases each, with a right function among them."""
    import subprocess
    import sys

    out = tmp_path_factory.mktemp("faults") / "run"
    backends = [*(f"--backend={MISBEHAVING}:{name}" for name in ("right", *FAULTS)), "--backend=eager"]
    limits = ["--timeout", "6", "--memory-limit", "1500MiB"]
    command = [sys.executable, "-m", "attnbench", "run", *SMALL_GRID, *backends, *limits, "--out", str(out), "--quiet"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=560, check=False)
    assert finished.returncode == 3, finished.stderr
    return {str(record["backend"]).rpartition(":")[2]: record for record in records_of(out)}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_has_its_status(outcomes: dict[str, dict[str, object]], name: str) -> None:
    status, phase, reason = FAULTS[name]
    record = outcomes[name]
    assert (record["status"], record["phase"]) == (status, phase), record["reason"]
    assert reason in str(record["reason"])
    if status != "ok":
        measured = {key: value for key, value in record.items() if not key.startswith("floor_")}  # a case has its floor
        times = {key: value for key, value in measured.items() if key.endswith("_ms") and value}
        assert not times, "no number is shown for a wrong result"


def test_the_sweep_went_on_after_every_one_of_them(outcomes: dict[str, dict[str, object]]) -> None:
    assert set(outcomes) == {"right", "eager", *FAULTS}
    assert outcomes["eager"]["status"] == "ok", "whatever others set for their whole process"
    assert outcomes["right"]["status"] == "ok"
    assert outcomes["right"]["error_dq"] is not None


def test_errors_are_kept_of_what_is_incorrect(outcomes: dict[str, dict[str, object]]) -> None:
    error = outcomes["wrong_dk"]["error_dk"]
    assert isinstance(error, float)
    assert error > 1e-2
    assert outcomes["wrong_dk"]["error_dq"] < 1e-5  # pyright: ignore[reportOperatorIssue]
    assert outcomes["nan_in_one_row"]["error_out"] is None


def request(**changes: object) -> Request:
    return Request(Grid(), "grid", ("eager",), {}, "cpu", **changes)  # pyright: ignore[reportArgumentType]


def test_workers_are_reused_while_healthy_and_replaced_when_not() -> None:
    case = {"batch": 1, "heads": 1, "kv_heads": 1, "seq_len": 8, "kv_len": 8, "d_model": 4}

    def visit(backend: str) -> dict[str, object]:
        order = {"first": True, "last": False, "budget_s": 0.01}
        return {"task": "visit", "case": case, "backend": backend, "source": None} | order

    with LocalExecutor(request()) as executor:
        assert "samples_ms" in executor.ask(visit("eager"), 60, "eager")
        assert "samples_ms" in executor.ask(visit(f"{MISBEHAVING}:right"), 60, f"{MISBEHAVING}:right")
        assert executor.ask(visit(f"{MISBEHAVING}:raises"), 60, f"{MISBEHAVING}:raises")["fields"]["status"] == "error"
        assert "samples_ms" in executor.ask(visit("naive"), 60, "naive")
        assert executor.starts == 3, "one for those that ship, one for each of a user's own"
        with pytest.raises(WorkerLost, match="exit code 7"):
            executor.ask(visit(f"{MISBEHAVING}:exits"), 60, f"{MISBEHAVING}:exits")
        assert "samples_ms" in executor.ask(visit("eager"), 60, "eager")
        assert executor.starts == 4
        assert "samples_ms" in executor.ask(visit(f"{MISBEHAVING}:right"), 60, f"{MISBEHAVING}:right")
        assert executor.starts == 4
        began = time.monotonic()
        with pytest.raises(WorkerLost, match="gave no result") as lost:
            executor.ask(visit(f"{MISBEHAVING}:hangs"), 0.5, f"{MISBEHAVING}:hangs")
        assert time.monotonic() - began < 5
        assert lost.value.fields["status"] == "timeout"
    assert not [child for child in psutil.Process().children(recursive=True) if "attnbench.worker" in child.cmdline()]


def test_eager_attention_that_does_not_fit_is_an_oom_in_seconds(attnbench: Attnbench, tmp_path: Path) -> None:
    """12 GiB of scores against a limit of 1 GiB: told at once, without touching the memory or doing the arithmetic."""
    shape = ("--batch", "8", "--d-model", "16", "--seq-len", "8192", "--device", "cpu")
    backends = [f"--backend={name}" for name in ("naive", "eager", "sdpa-math")]
    done = attnbench("run", *shape, *backends, "--memory-limit", "3GiB", "--out", "run", "--quiet")
    assert done.returncode == 0, done.stderr
    found = {record["backend"]: record for record in records_of(tmp_path / "run")}
    assert {name: record["status"] for name, record in found.items()} == dict.fromkeys(
        ("naive", "eager", "sdpa-math"), "oom"
    )
    assert found["naive"]["phase"] == "forward"
    assert all(record["seconds"] < 10 for record in found.values())
    assert all("tried to allocate" in record["reason"] for record in found.values())


def test_out_of_memory_in_the_backward_is_told_apart(attnbench: Attnbench, tmp_path: Path) -> None:
    """eager at 8 × 4096 × 4096 holds two score matrices of 512 MiB in the forward and more in the backward."""
    shape = ("--batch", "8", "--d-model", "16", "--seq-len", "4096", "--device", "cpu")
    done = attnbench("run", *shape, "--backend=eager", "--memory-limit", "1500MiB", "--out", "run", "--quiet")
    assert done.returncode == 0, done.stderr
    (found,) = records_of(tmp_path / "run")
    assert (found["status"], found["phase"]) == ("oom", "backward"), found["reason"]


def test_precision_is_never_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    monkeypatch.setenv("MINE", "stays")
    environment = worker_environment("/cache")
    assert "NVIDIA_TF32_OVERRIDE" not in environment
    assert "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE" not in environment
    assert environment["MINE"] == "stays"
    assert environment["TRITON_CACHE_DIR"].startswith("/cache")
