"""The rates of a device that no attention can exceed: memory, matrix products, exponentials, a launch.

Each is the best of some short tries, on random data, after a rest: the highest that the device was seen to do, so that a
floor made of them holds in every state of its clocks.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnbench.measure.kernels import empty_kernel

ARITHMETIC: dict[str, tuple[torch.dtype, str]] = {
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "float16": (torch.float16, "highest"),
    "bfloat16": (torch.bfloat16, "highest"),
    "float64": (torch.float64, "highest"),
}
"""Kinds of matrix product: dtype, and PyTorch's setting for products of float32."""

TRIES = 10


def measure(device: torch.device) -> dict[str, Any]:
    """The fields of `attnbench.limits.Ceilings`, measured on a device in some seconds."""
    return _on_cuda(device) if device.type == "cuda" else _on_cpu()


# --- CUDA -------------------------------------------------------------------------------------------------------------


def _on_cuda(device: torch.device) -> dict[str, Any]:
    def seconds(work: Callable[[], Any]) -> float:
        """The least device time of some tries, all queued at once."""
        work()
        torch.cuda.synchronize(device)
        time.sleep(0.1)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(TRIES)]
        torch.cuda._sleep(1_000_000)  # half a millisecond for the host to queue them in
        for start, end in events:
            start.record()
            work()
            end.record()
        torch.cuda.synchronize(device)
        return min(start.elapsed_time(end) for start, end in events) / 1e3

    properties = torch.cuda.get_device_properties(device)
    size = min(1 << 31, properties.total_memory // 16)
    found: dict[str, Any] = {
        **_memory(size, device, seconds),
        "launch_ms": empty_kernel(device)[0],
        "cache_bytes": properties.L2_cache_size,
        "exp_per_s": _exp_per_s_on_cuda(device, seconds),
    }
    edges = {name: 4096 if name in ("float32", "float64") else 8192 for name in ARITHMETIC}
    found["matmul_flop_per_s"] = {name: _matmul(name, edge, device, seconds) for name, edge in edges.items()}
    torch.cuda.empty_cache()
    return found


def _exp_per_s_on_cuda(device: torch.device, seconds: Callable[[Callable[[], Any]], float]) -> float | None:
    """Exponentials to base 2 in registers, four independent chains a thread; None without Triton to write them in."""
    try:
        from attnbench.measure.exp_kernel import BLOCK, CHAINS, exponentials
    except ImportError:
        return None
    programs = torch.cuda.get_device_properties(device).multi_processor_count * 32
    steps, out = 512, torch.empty(programs * BLOCK, device=device)
    launch = exponentials[(programs,)]  # pyright: ignore[reportIndexIssue]
    return programs * BLOCK * CHAINS * steps / seconds(lambda: launch(out, steps))


# --- CPU --------------------------------------------------------------------------------------------------------------

SLOW_S = 0.5
"""A try that takes longer is the last."""


def _on_cpu() -> dict[str, Any]:
    def seconds(work: Callable[[], Any]) -> float:
        work()
        taken: list[float] = []
        while len(taken) < TRIES and sum(taken) < SLOW_S:
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
        return min(taken)

    cache, cpu = last_cache_bytes(), torch.device("cpu")
    few, one = torch.rand(1 << 18), torch.zeros(1)  # few: 1 MiB, which the cores' own caches hold
    result = torch.empty_like(few)
    found: dict[str, Any] = {
        **_memory(max(4 * cache, 64 << 20), cpu, seconds),
        "launch_ms": seconds(lambda: torch.neg(one, out=one)) * 1e3,
        "cache_bytes": cache,
        "exp_per_s": max(len(few) / seconds(lambda exp=exp: exp(few, out=result)) for exp in (torch.exp, torch.exp2)),
    }
    edges = {"float32": 2048, "float64": 1024, "bfloat16": 256, "float16": 256}  # 16-bit products may be emulated
    found["matmul_flop_per_s"] = {name: _matmul(name, edge, cpu, seconds) for name, edge in edges.items()}
    return found


def last_cache_bytes(cpu: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Size of the largest cache of a CPU; 32 MiB where the system does not tell."""
    units = {"K": 1 << 10, "M": 1 << 20, "": 1}
    sizes = [0]
    for file in cpu.glob("index*/size"):
        if match := re.fullmatch(r"(\d+)([KM]?)\s*", file.read_text()):
            sizes.append(int(match[1]) * units[match[2]])
    return max(sizes) or 32 << 20


# --- both -------------------------------------------------------------------------------------------------------------


def _memory(size: int, device: torch.device, seconds: Callable[[Callable[[], Any]], float]) -> dict[str, float]:
    """Bytes a second, of a copy (read and written) and of a maximum (read), over `size` bytes."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return {
        "copy_bytes_per_s": 2 * size / seconds(lambda: target.copy_(source)),
        "read_bytes_per_s": size / seconds(source.amax),
    }


def _matmul(name: str, edge: int, device: torch.device, seconds: Callable[[Callable[[], Any]], float]) -> float:
    """FLOP/s of a product of two square matrices."""
    dtype, precision = ARITHMETIC[name]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
        out: Tensor = torch.empty_like(a)
        return 2 * edge**3 / seconds(lambda: torch.mm(a, b, out=out))
    finally:
        torch.set_float32_matmul_precision(before)
