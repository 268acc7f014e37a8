"""What machine this is: enough to tell whether two runs can be compared, and whether a run can go on here."""

from __future__ import annotations

import importlib.util
import os
import platform
import runpy
import socket
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

IDENTITY = ("hostname", "system", "cpu", "physical_cores", "gpus", "packages")
"""What must be the same for a run to go on: the machine, and the software that was measured on it."""

PACKAGES = ("torch", "triton", "jax", "numpy", "flash-attn", "xformers", "transformer-engine", "flashinfer-python")


def fingerprint() -> dict[str, Any]:
    """This machine and its software, without loading a framework."""
    return {
        "hostname": socket.gethostname(),
        "system": f"{platform.system()} {platform.machine()}",
        "kernel": platform.release(),
        "cpu": cpu_name(),
        "physical_cores": physical_cores(),
        "memory_MiB": psutil.virtual_memory().total >> 20,
        "python": platform.python_version(),
        "packages": packages(),
        **gpus(),
    }


def packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def physical_cores() -> int:
    """Cores that this process may use, each counted once however many threads it runs."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_cpus()
    cores = min(psutil.cpu_count(logical=False) or usable, usable)
    return max(1, min(cores, quota) if quota else cores)


def _cgroup_cpus() -> int | None:
    """Whole CPUs that the cgroup's quota allows; None if it sets none."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping, within the cgroup's limit."""
    free = psutil.virtual_memory().available
    try:
        root = Path("/sys/fs/cgroup")
        limit = (root / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((root / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(0, free)


def default_memory_limit_bytes() -> int:
    """What a worker on CPU may hold: what is available, less a margin of a tenth, or of 1 GiB where half is left then."""
    free = available_memory_bytes()
    return max(free - max(1 << 30, free // 10), free // 2)


def gpus() -> dict[str, Any]:
    """NVIDIA GPUs and their driver, by NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, no permission: whatever the reason, no GPU can be told of
        return {"gpus": [], "driver": None}
    try:
        return {
            "gpus": [_gpu(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(pynvml.nvmlDeviceGetCount())],
            "driver": pynvml.nvmlSystemGetDriverVersion(),
        }
    finally:
        pynvml.nvmlShutdown()


def _gpu(handle: Any) -> dict[str, Any]:
    import pynvml

    def ask(query: Any, *args: Any) -> Any:
        try:
            return query(handle, *args)
        except pynvml.NVMLError:
            return None

    limit_mW = ask(pynvml.nvmlDeviceGetEnforcedPowerLimit)
    memory = ask(pynvml.nvmlDeviceGetMemoryInfo)
    return {
        "name": ask(pynvml.nvmlDeviceGetName),
        "uuid": ask(pynvml.nvmlDeviceGetUUID),
        "memory_MiB": memory.total >> 20 if memory else None,
        "power_limit_W": limit_mW / 1e3 if limit_mW else None,
        "max_sm_clock_MHz": ask(pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_SM),
    }


def best_device() -> str:
    """`cuda` where there is a GPU and a torch that was built for CUDA, else `cpu`; without loading torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    spec = importlib.util.find_spec("torch")
    if not gpus()["gpus"] or visible in ("", "-1") or not spec or not spec.origin:
        return "cpu"
    return "cuda" if runpy.run_path(str(Path(spec.origin).with_name("version.py"))).get("cuda") else "cpu"


def torch_software() -> dict[str, Any]:
    """What torch was built with and found; to be called where torch is loaded."""
    torch = sys.modules["torch"]
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """In what two machines differ that a run must have in common, in words; None if in nothing."""
    parts = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in IDENTITY if before.get(key) != now.get(key)
    ]
    return "; ".join(parts) or None
