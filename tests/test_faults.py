"""Every way a cell can fail, for real, in worker processes; and a healthy cell after each."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from attnbench.executors.local import MOST_WORKERS, LocalExecutor, WorkerLost, worker_environment
from attnbench.grid import Grid
from attnbench.request import Request
from conftest import MISBEHAVING, SMALL_GRID, Attnbench, records_of

Fault = tuple[str, str | None, str]
"""Status, phase, and what the reason holds."""

FAULTS: dict[str, dict[str, Fault]] = {
    "deaths": {
        "killed": ("crash", "forward", "SIGKILL (perhaps the kernel's out-of-memory killer)"),
        "segfault": ("crash", "forward", "in string_at"),
        "aborts": ("crash", "forward", "assertion failed: tile % 16 == 0"),
        "forks": ("crash", "forward", "SIGABRT"),
        "exits": ("crash", "forward", "exit code 7"),
    },
    "no end": {
        "hangs": ("timeout", "forward", "gave no result within"),
        "hangs_in_backward": ("timeout", "backward", "gave no result within"),
        "allocates_without_end": ("oom", "forward", "can't allocate memory"),
        "allocates_in_backward": ("oom", "backward", "can't allocate memory"),
        "says_what_cannot_be_written": ("error", "forward", "ValueError: [31m red"),
        "raises": ("error", "forward", "ValueError: no kernel for this shape"),
        "speaks": ("ok", None, ""),
    },
    "wrong values": {
        "wrong_out": ("incorrect", None, "out is off by 0.001"),
        "wrong_dq": ("incorrect", None, "dq is off by"),
        "wrong_dk": ("incorrect", None, "dk is off by"),
        "wrong_dv": ("incorrect", None, "dv is off by"),
        "nan_in_one_row": ("incorrect", None, "out has 16 values that are not finite"),
    },
    "broken promises": {
        "turns_gradients_off": ("error", "forward", "off the graph"),
        "writes_to_its_inputs": ("error", "forward", "wrote to q, k or v"),
        "wrong_shape": ("error", "forward", "returned shape (1, 1, 64, 15)"),
        "wrong_dtype": ("error", "forward", "returned torch.float64"),
        "off_the_graph": ("error", "forward", "off the graph"),
        "not_a_tensor": ("error", "forward", "returned NoneType"),
    },
}
"""By sweep, few enough for one to keep its workers from the plan on."""


@pytest.mark.parametrize("sweep", FAULTS)
def test_each_fault_has_its_status_and_the_sweep_goes_on(attnbench: Attnbench, tmp_path: Path, sweep: str) -> None:
    """With right functions among the faults."""
    faults = FAULTS[sweep]
    assert len(faults) + 1 <= MOST_WORKERS
    backends = [*(f"--backend={MISBEHAVING}:{name}" for name in ("right", *faults)), "--backend=eager"]
    limits = ("--timeout", "10", "--memory-limit", "1500MiB")
    done = attnbench("run", *SMALL_GRID, *backends, *limits, "--out", "run", "--quiet", timeout=280)
    assert done.returncode == 3, done.stderr
    outcomes = {str(record["backend"]).rpartition(":")[2]: record for record in records_of(tmp_path / "run")}
    assert set(outcomes) == {"right", "eager", *faults}

    found = {name: (record["status"], record["phase"]) for name, record in outcomes.items()}
    assert found == {name: fault[:2] for name, fault in faults.items()} | dict.fromkeys(
        ("right", "eager"), ("ok", None)
    )
    reasons = {name: str(outcomes[name]["reason"]) for name in faults}
    assert not {name: told for name, told in reasons.items() if faults[name][2] not in told}

    assert outcomes["right"]["error_dq"] is not None
    if sweep == "wrong values":
        assert outcomes["wrong_dk"]["error_dk"] > 1e-2, "errors are kept of what is incorrect"
        assert outcomes["wrong_dk"]["error_dq"] < 1e-5
        assert outcomes["nan_in_one_row"]["error_out"] is None
    for record in outcomes.values():  # a case has its floor, whatever came of it
        shown = [name for name, value in record.items() if name.endswith("_ms") and value and "floor" not in name]
        assert bool(shown) == (record["status"] == "ok"), "no number is shown for a wrong result"


def request(**changes: object) -> Request:
    return Request(Grid(), "grid", ("eager",), {}, "cpu", **changes)  # pyright: ignore[reportArgumentType]


def visit(backend: str) -> dict[str, object]:
    case = {"batch": 1, "heads": 1, "kv_heads": 1, "seq_len": 8, "kv_len": 8, "d_model": 4}
    order = {"first": True, "last": False, "budget_s": 0.01}
    return {"task": "visit", "case": case, "backend": backend, "source": None} | order


def test_workers_asked_at_once_start_at_once_and_each_answers_or_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnbench.executors.local.MOST_WORKERS", 3)
    steps: list[str] = []
    for name in ("_launch", "_send", "_reply"):
        real = getattr(LocalExecutor, name)
        monkeypatch.setattr(
            LocalExecutor, name, lambda *args, name=name, real=real: (steps.append(name), real(*args))[1]
        )
    own = [f"{MISBEHAVING}:{name}" for name in ("exits", "right", "hangs", "raises")]
    with LocalExecutor(request()) as executor:
        crash, right, timeout, error, eager = executor.ask_each(
            [(visit(name), 0.5 if name.endswith("hangs") else 60, name) for name in (*own, "eager")]
        )
        assert steps == [step for some in (3, 2) for step in ("_launch", "_send", "_reply") for _ in range(some)]
        assert isinstance(crash, WorkerLost)
        assert crash.fields["status"] == "crash"
        assert isinstance(timeout, WorkerLost)
        assert timeout.fields["status"] == "timeout"
        assert isinstance(error, dict)
        assert error["fields"]["status"] == "error"
        for answer in (right, eager):
            assert isinstance(answer, dict)
            assert "samples_ms" in answer
        assert executor.starts == 5
        assert "samples_ms" in executor.ask(visit(own[1]), 60, own[1])
        assert executor.starts == 5, "it is still there"


def test_workers_that_hold_what_another_needs_can_be_ended() -> None:
    own = f"{MISBEHAVING}:right"
    with LocalExecutor(request()) as executor:
        for name in ("eager", own):
            executor.ask(visit(name), 60, name)
        assert executor.end_others("eager")
        assert not executor.end_others("eager"), "it is alone now"
        assert "samples_ms" in executor.ask(visit("eager"), 60, "eager")
        assert executor.starts == 2
        assert "samples_ms" in executor.ask(visit(own), 60, own)
        assert executor.starts == 3


def test_workers_are_reused_while_healthy_and_replaced_when_not() -> None:
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
        began, starting_s = time.monotonic(), executor.starting_s
        with pytest.raises(WorkerLost, match="gave no result") as lost:
            executor.ask(visit(f"{MISBEHAVING}:hangs"), 0.5, f"{MISBEHAVING}:hangs")
        assert time.monotonic() - began - (executor.starting_s - starting_s) < 5
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
    assert all(record["seconds"] < 30 for record in found.values())
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
