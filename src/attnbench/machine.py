"""What machine this is: enough to tell whether two runs can be compared, and whether a run can go on here."""

from __future__ import annotations

import importlib.util
import os
import platform
import runpy
import shutil
import socket
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

from attnbench import clock_events
from attnbench.backends import packages as known

IDENTITY = ("hostname", "system", "cpu", "physical_cores", "gpus", "packages")
"""What must be the same for a run to go on: the machine, and the software that was measured on it."""

PACKAGES = ("torch", "triton", "numpy", "jaxlib", *(package.name for package in known.PACKAGES.values()))

VARIABLES = (
    "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUDA_LAUNCH_BLOCKING", "TORCH_COMPILE_DISABLE",
    "TORCHDYNAMO_DISABLE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
"""Environment variables that change what a benchmark measures, or how."""

CPUS, CGROUP = Path("/sys/devices/system/cpu"), Path("/sys/fs/cgroup")

COMPUTE_MODES = {0: "default", 1: "exclusive_thread", 2: "prohibited", 3: "exclusive_process"}


def fingerprint() -> dict[str, Any]:
    """This machine and its software, without loading a framework.

    What changes from minute to minute, or by a setting, is apart from what the machine is: under `gpu_states`, an entry
    for each of `gpus`, and `host_state`. A fact that the system does not tell is None.
    """
    cpus = _usable_cpus()
    return {
        "hostname": socket.gethostname(),
        "system": f"{platform.system()} {platform.machine()}",
        "kernel": platform.release(),
        "cpu": cpu_name(),
        "physical_cores": physical_cores(),
        "machine_cores": psutil.cpu_count(logical=False),
        "usable_cpus": len(cpus),
        "usable_cores": _cores_of(cpus),
        "smt": {"0": False, "1": True}.get(_read(CPUS / "smt/active") or ""),
        "memory_MiB": psutil.virtual_memory().total >> 20,
        "cgroup_cpus": _cgroup_cpus(),
        "cgroup_memory_MiB": _cgroup_memory_MiB(),
        "python": platform.python_version(),
        "packages": packages(),
        "torch_cuda": torch_cuda(),
        "cxx": _cxx(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        **gpus(),
        "host_state": {
            "governor": _governor(cpus),
            "load_1min": psutil.getloadavg()[0],
            "swap_used_MiB": _swap_used_MiB(),
        },
    }


def packages() -> dict[str, str]:
    from importlib import metadata

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
    cpus, quota = _usable_cpus(), _cgroup_cpus()
    cores = _cores_of(cpus) or len(cpus)
    return max(1, min(cores, int(quota)) if quota else cores)


def _usable_cpus() -> set[int]:
    """Numbers of the logical CPUs that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _cores_of(cpus: Iterable[int]) -> int | None:
    """How many cores these logical CPUs are threads of."""
    cores = {_read(CPUS / f"cpu{cpu}/topology/thread_siblings_list") for cpu in cpus}
    return None if None in cores else len(cores)


def _governor(cpus: Iterable[int]) -> str | None:
    """What sets the clocks of these CPUs; where they differ, all there are."""
    told = (_read(CPUS / f"cpu{cpu}/cpufreq/scaling_governor") for cpu in cpus)
    return ", ".join(sorted({governor for governor in told if governor})) or None


def _cgroup_cpus() -> float | None:
    """CPUs that the cgroup's quota is worth; None if it sets none."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _cgroup_memory_MiB() -> int | None:
    """Memory that the cgroup may hold; None if it sets no limit."""
    limit = _read(CGROUP / "memory.max")
    return int(limit) >> 20 if limit and limit.isdecimal() else None


def _swap_used_MiB() -> int:
    with warnings.catch_warnings():  # in some containers psutil warns of counters that are not asked for here
        warnings.simplefilter("ignore", RuntimeWarning)
        return psutil.swap_memory().used >> 20


def _cxx() -> str | None:
    """The C++ compiler that PyTorch would take, by its name: where it lies is nobody's business in a published run."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    return Path(found).name if found else None


def _read(path: Path) -> str | None:
    """What a one-line file of the system says; None where it is absent, closed or empty."""
    try:
        return path.read_text().strip() or None
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
    """NVIDIA GPUs, the state they are in and their driver, by NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, no permission: whatever the reason, no GPU can be told of
        return {"gpus": [], "gpu_states": [], "driver": None}
    try:
        handles = [_ask(pynvml.nvmlDeviceGetHandleByIndex, i) for i in range(_ask(pynvml.nvmlDeviceGetCount) or 0)]
        return {
            "gpus": [_gpu(handle) for handle in handles],
            "gpu_states": [_gpu_state(handle) for handle in handles],
            "driver": _ask(pynvml.nvmlSystemGetDriverVersion),
        }
    finally:
        pynvml.nvmlShutdown()


def _ask(query: Callable[..., Any], *args: Any) -> Any:
    """The driver's answer; None where it refuses one, as any driver may."""
    import pynvml

    try:
        return query(*args)
    except pynvml.NVMLError:
        return None


def _gpu(handle: Any) -> dict[str, Any]:
    """What the GPU is."""
    import pynvml

    memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    return {
        "name": _ask(pynvml.nvmlDeviceGetName, handle),
        "uuid": _ask(pynvml.nvmlDeviceGetUUID, handle),
        "memory_MiB": memory.total >> 20 if memory else None,
        "power_limit_W": _watts(_ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)),
        "max_sm_clock_MHz": _ask(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_SM),
    }


def _gpu_state(handle: Any) -> dict[str, Any]:
    """What the GPU is doing, and how it is set."""
    import pynvml

    memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    use = _ask(pynvml.nvmlDeviceGetUtilizationRates, handle)
    events = _ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    if events is None:  # a driver that knows them by their older name
        events = _ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    _, power_max_mW = _ask(pynvml.nvmlDeviceGetPowerManagementLimitConstraints, handle) or (None, None)
    ecc, _ = _ask(pynvml.nvmlDeviceGetEccMode, handle) or (None, None)  # the mode now, and the one after a restart
    mig, _ = _ask(pynvml.nvmlDeviceGetMigMode, handle) or (None, None)
    return {
        "sm_clock_MHz": _ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
        "clock_events": None if events is None else list(clock_events.names(events)),
        "temperature_C": _ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        "slowdown_C": _ask(
            pynvml.nvmlDeviceGetTemperatureThreshold, handle, pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
        ),
        "default_power_limit_W": _watts(_ask(pynvml.nvmlDeviceGetPowerManagementDefaultLimit, handle)),
        "max_power_limit_W": _watts(power_max_mW),
        "utilisation_percent": use.gpu if use else None,
        "memory_used_MiB": memory.used >> 20 if memory else None,
        "other_processes": _other_processes(handle),
        "persistence": _switch(_ask(pynvml.nvmlDeviceGetPersistenceMode, handle)),
        "ecc": _switch(ecc),
        "mig": _switch(mig),
        "compute_mode": COMPUTE_MODES.get(_ask(pynvml.nvmlDeviceGetComputeMode, handle)),
    }


def _other_processes(handle: Any) -> int | None:
    """How many processes beside this one and its workers hold a context on the GPU."""
    import pynvml

    queries = (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses)
    told = [found for query in queries if (found := _ask(query, handle)) is not None]
    own = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    return len({process.pid for found in told for process in found} - own) if told else None


def _watts(milliwatts: int | None) -> float | None:
    return milliwatts / 1e3 if milliwatts else None


def _switch(mode: int | None) -> bool | None:
    return None if mode is None else bool(mode)


def torch_cuda() -> str | None:
    """The version of CUDA that torch was built for, without loading torch; None for any other torch, or none."""
    spec = importlib.util.find_spec("torch")
    if not spec or not spec.origin:
        return None
    return runpy.run_path(str(Path(spec.origin).with_name("version.py"))).get("cuda")


def best_device() -> str:
    """`cuda` where there is a GPU and a torch that was built for CUDA, else `cpu`; without loading torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    return "cuda" if not hidden and gpus()["gpus"] and torch_cuda() else "cpu"


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
