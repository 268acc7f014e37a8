"""What tests share: cases, and runs on a CPU that take seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from attnbench import calibration
from attnbench.case import Case
from attnbench.record import Record
from attnbench.result import Result
from attnbench.store import Header

DATA = Path(__file__).parent / "data"
MISBEHAVING = DATA / "misbehaving.py"


def with_ceilings(monkeypatch: pytest.MonkeyPatch, cache: Path, times: float) -> None:
    """Puts ceilings of the CPU, so many times those of a good one, into a cache where runs find them."""
    rates = {"copy_bytes_per_s": 1e11, "read_bytes_per_s": 1e11, "exp_per_s": 1e10}
    found = {name: rate * times for name, rate in rates.items()} | {
        "launch_ms": 1e-3 / times,
        "cache_bytes": 0,
        "matmul_flop_per_s": dict.fromkeys(("float32", "float64", "bfloat16", "float16"), 1e12 * times),
    }
    monkeypatch.setenv("ATTNBENCH_CACHE", str(cache))
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "_measured", lambda _device: found)
        calibration.ceilings("cpu", anew=True)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache that is not the user's, unless the environment names one; ceilings are in it, since measuring takes long."""
    with pytest.MonkeyPatch.context() as patch:
        if "ATTNBENCH_CACHE" not in os.environ:
            with_ceilings(patch, tmp_path_factory.mktemp("cache"), times=1e3)
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests run only where they are asked for by `-m gpu`."""
    if "gpu" in str(config.getoption("-m")):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU; run by: pytest -m gpu"))


def small(**changes: Any) -> Case:
    """A case that takes milliseconds."""
    sizes: dict[str, Any] = {"batch": 1, "heads": 2, "kv_heads": 2, "seq_len": 64, "kv_len": 64, "d_model": 16}
    return Case(**sizes | changes)


def record(case: Case | None = None, backend: str = "eager", **outcome: Any) -> Record:
    given: dict[str, Any] = {"status": "ok"} | outcome
    return Record.of(case or small(), backend, run_id="r", device="cpu", **given)


MACHINE = {
    "hostname": "h", "system": "Linux x86_64", "kernel": "6", "cpu": "A CPU", "physical_cores": 2, "memory_MiB": 1000,
    "python": "3.11", "packages": {"torch": "2.13.0"}, "gpus": [], "driver": None, "software": {"cuda": None},
}  # fmt: skip


def finished(records: list[Record], name: str = "run", **header: Any) -> Result:
    """A run of these records, as `load` would give it."""
    backends = list(dict.fromkeys(one.backend for one in records))
    request = {"device": "cpu", "protocol": "default", "budget_s": 1.0, "seed": 0, "backends": backends}
    given = {"run_id": "r", "started_at": "2026-01-01T00:00:00+00:00", "request": request, "machine": MACHINE,
             "attnbench": "0.1.0", "cells": len(records)} | header  # fmt: skip
    return Result(Path(name), Header(**given), records)


Attnbench = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def attnbench(tmp_path: Path) -> Attnbench:
    """Runs the command in a process of its own, in an empty folder."""

    def run(*args: str | Path, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "attnbench", *map(str, args)]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout, check=False, **options
        )

    return run


SMALL_GRID = ("--batch", "1", "--d-model", "16", "--seq-len", "64", "--budget", "0.05", "--device", "cpu")


def records_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "records.jsonl").read_text().splitlines()]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB, where this machine lets us mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    yield place
    subprocess.run(["umount", place], check=True)
