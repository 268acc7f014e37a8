"""The command that measures a cell again, as it was measured."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from attnbench.case import Case
from attnbench.record import Record
from attnbench.request import DEFAULT_BUDGET_S, DEFAULT_TIMEOUT_S

_SIZES = ("batch", "heads", "seq_len", "d_model")


def of_cell(record: Record, request: Mapping[str, Any]) -> str:
    """`attnbench run` with the options that choose one cell; `request` is that of the run's header."""
    source = request.get("sources", {}).get(record.backend, record.backend)
    return shlex.join(["attnbench", "run", *_case(record.case), "--backend", source])


def of_run(request: Mapping[str, Any]) -> str:
    """The options that every cell of the run shares: those that are not the defaults, and the device."""
    device = request["device"]
    words = ["--device", device]
    values = (
        ("--pass", request.get("passes"), "backward"),
        ("--protocol", request.get("protocol"), "default"),
        ("--clock", request.get("clock"), "sustained"),
        ("--budget", request.get("budget_s"), DEFAULT_BUDGET_S[device.partition(":")[0]]),
        ("--timeout", request.get("timeout_s"), DEFAULT_TIMEOUT_S),
        ("--memory-limit", request.get("memory_limit_bytes"), None),
        ("--seed", request.get("seed"), 0),
    )
    for option, value, default in values:
        if value not in (None, default):
            words += [option, f"{value:g}" if isinstance(value, float) else str(value)]
    words += [option for option, name in (("--warm-cache", "warm_cache"), ("--graph", "graph")) if request.get(name)]
    return shlex.join(words)


def _case(case: Case) -> list[str]:
    words = [word for name in _SIZES for word in (f"--{name.replace('_', '-')}", str(getattr(case, name)))]
    if case.kv_heads != case.heads:
        words += ["--kv-heads", str(case.kv_heads)]
    if case.kv_len != case.seq_len:
        words += ["--kv-len", str(case.kv_len)]
    words += ["--dtype", case.dtype]
    if case.dtype == "float32":
        words += ["--precision", case.precision]
    return [*words, "--causal" if case.causal else "--no-causal"]
