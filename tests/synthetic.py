"""Runs that were never measured: as many records as wanted, with every status, and names that try to break a page."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnbench.case import Case
from attnbench.record import Record, summary
from attnbench.result import Result
from attnbench.store import Header, Store

MACHINE: dict[str, Any] = {
    "hostname": "h", "system": "Linux x86_64", "kernel": "6", "cpu": "A CPU", "physical_cores": 2, "memory_MiB": 1000,
    "python": "3.11", "packages": {"torch": "2.13.0"}, "gpus": [{"name": "A GPU", "memory_MiB": 24576, "power_limit_W": 300}],
    "driver": "1", "software": {"cuda": None},
}  # fmt: skip

HOSTILE = '</script><img src=x onerror="document.title=1">&amp;\u2028${1}'


def run_of(records: Sequence[Record], **request: Any) -> Result:
    asked = {"device": "cuda", "protocol": "default", "budget_s": 0.3, "seed": 0, "passes": "backward", "name": "made"}
    backends = list(dict.fromkeys(one.backend for one in records))
    header = Header(
        "r", "2026-01-01T00:00:00+00:00", asked | {"backends": backends} | request, MACHINE, "0.1.0", len(records)
    )
    return Result(Path("run"), header, records)


def kept(run: Result, directory: Path) -> Path:
    """The run, as a directory that the command line can read."""
    with Store.create(directory, run.header) as store:
        for one in run.records:
            store.append(one)
    return directory


def made(backend: str, case: Case, ms: float, *, noise: float = 0.004, samples: int = 30, **outcome: Any) -> Record:
    """A right record whose forward takes `ms` and backward twice that, of a floor of 0.4 · n² · d."""
    chance = random.Random(f"{backend} {case.id}")
    floor = 0.4 * case.seq_len**2 * case.d_model * 1e-9
    times: dict[str, Any] = {}
    for name, factor in (("forward", 1.0), ("backward", 2.0), ("forward_backward", 3.0)):
        times |= summary(name, [factor * ms * math.exp(chance.gauss(0, noise)) for _ in range(samples)])
        times[f"{name}_noise"] = noise
    return Record.of(
        case, backend, run_id="r", device="cuda", status="ok", **times,
        floor_forward_ms=floor, floor_backward_ms=2 * floor, limit_forward=floor / ms, limit_backward=floor / ms,
        forward_peak_MiB=case.seq_len / 64, backward_peak_MiB=case.seq_len / 32, mem_after_inputs_MiB=1.0,
        mem_before_backward_MiB=2.0, saved_activations_MiB=1.0, bound_by="matmul", error_out=1e-3, error_dq=2e-3,
        error_dk=2e-3, error_dv=1e-3, kernels_forward=(f"kernel_of_{backend}<128, 64>",), sm_clock_MHz=1500.0, power_W=200.0,
        temperature_C=50.0, windows=({"round": 0, "samples": {"forward": samples}, "sm_clock_MHz": 1500.0},),
        started_at="2026-01-01T00:00:00+00:00", seconds=0.5,
    ).but(**outcome)  # fmt: skip


def failed(backend: str, case: Case, status: Any, **outcome: Any) -> Record:
    return Record.of(case, backend, run_id="r", device="cuda", status=status, **outcome)


def case_of(seq_len: int, d_model: int, **changes: Any) -> Case:
    sizes: dict[str, Any] = {"batch": 8, "heads": 1, "kv_heads": 1, "seq_len": seq_len, "kv_len": seq_len}
    sizes |= {"d_model": d_model, "dtype": "bfloat16"} | changes
    return Case(**sizes)


def small_run() -> Result:
    """Three backends, eight shapes and two masks: `fast` beyond doubt, `twin` level with `slow`, and every failure."""
    records = []
    for causal in (False, True):
        for d_model in (32, 64):
            for seq_len in (256, 1024, 4096, 8192):
                case = case_of(seq_len, d_model, causal=causal)
                unit = 1e-8 * seq_len**2 * d_model
                records.append(
                    made("slow", case, 3 * unit)
                    if seq_len < 8192
                    else failed("slow", case, "oom", phase="forward", reason="out of memory")
                )
                records.append(
                    made("twin", case, 3.001 * unit, tags=("noisy",))
                    if seq_len < 8192
                    else failed("twin", case, "timeout")
                )
                records.append(made("fast", case, unit))
                records.append(failed(HOSTILE, case, "incorrect", reason=f"dq is off {HOSTILE}", error_dq=0.5))
    return run_of(records)


def large_run(records: int = 5000, backends: int = 30, samples: int = 100) -> Result:
    names = [f"backend-{index:02}" for index in range(backends)]
    shapes = [
        case_of(seq_len, d_model, causal=causal, dtype=dtype)
        for dtype in ("bfloat16", "float16")
        for causal in (False, True)
        for d_model in (32, 64, 96, 128, 192, 256)
        for seq_len in (256, 512, 1024, 2048, 4096, 8192, 16384)
    ]
    cells = [(name, case) for case in shapes for name in names][:records]
    return run_of([
        failed(name, case, "oom", phase="forward") if case.seq_len == 16384 and index % 5 == 0
        else made(name, case, (1 + int(name[-2:]) / 10) * 1e-8 * case.seq_len**2 * case.d_model, samples=samples)
        for index, (name, case) in enumerate(cells)
    ])  # fmt: skip
