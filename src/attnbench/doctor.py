"""What about this machine would spoil a benchmark: found in its facts, told with what it does and what mends it.

Nothing here changes the machine, and no check asks it anything: `machine.fingerprint` has asked already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from attnbench.clock_events import DISTURBING

Facts = dict[str, Any]
Severity = Literal["spoils", "notes"]


@dataclass(frozen=True, slots=True)
class Trouble:
    """What was found, what it does to a benchmark and how to mend it: a line each."""

    check: str
    severity: Severity
    what: str
    effect: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Check:
    """A fault that a machine may have.

    `trips` says of the facts whether it is there; where a fact is None, since the system does not tell it, it is not.
    The three texts are filled in from the same facts.
    """

    name: str
    severity: Severity
    trips: Callable[[Facts], Any]
    what: str
    effect: str
    remedy: str


def diagnose(facts: Facts) -> list[Trouble]:
    """Every trouble of the machine with these facts, as `machine.fingerprint` gives them; what spoils comes first."""
    found = [
        Trouble(check.name, check.severity, *(text.format(**seen) for text in (check.what, check.effect, check.remedy)))
        for checks, views in ((GPU_CHECKS, list(gpu_views(facts))), (MACHINE_CHECKS, [facts | facts["host_state"]]))
        for check in checks
        for seen in views
        if check.trips(seen)
    ]
    return sorted(found, key=lambda trouble: trouble.severity != "spoils")


def gpu_views(facts: Facts) -> Iterator[Facts]:
    """The facts of each GPU, what it is and the state it is in, with its index."""
    for index, (gpu, state) in enumerate(zip(facts["gpus"], facts["gpu_states"], strict=True)):
        disturbing = ", ".join(event for event in state["clock_events"] or () if event in DISTURBING)
        yield gpu | state | {"index": index, "disturbing": disturbing}


def _known(facts: Facts, *names: str) -> bool:
    return all(facts[name] is not None for name in names)


def _below(value: float | None, limit: float | None) -> bool:
    """Whether `value` is under `limit`, where both are known."""
    return value is not None and limit is not None and value < limit


def _hot(gpu: Facts) -> bool:
    return _known(gpu, "temperature_C", "slowdown_C") and gpu["slowdown_C"] - gpu["temperature_C"] <= 10


def _moves(gpu: Facts) -> bool:
    """Whether the SM clock is free; the driver tells of a clock that is set only by what it is held back for."""
    known = _known(gpu, "sm_clock_MHz", "max_sm_clock_MHz", "clock_events")
    return known and "applications_clocks_setting" not in gpu["clock_events"]


def _on(facts: Facts, variable: str) -> bool:
    return facts["environment"].get(variable, "0") not in ("", "0")


def _hides_gpus(facts: Facts) -> bool:
    listed = facts["environment"].get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return False
    shown = takewhile(lambda entry: entry.strip() not in ("", "-1"), listed.split(","))  # where CUDA stops reading
    return len(list(shown)) < len(facts["gpus"])


def _throttles(facts: Facts) -> bool:
    """Whether a quota stops threads that the scheduler would let run."""
    quota = facts["cgroup_cpus"]
    return quota is not None and (quota != int(quota) or quota < (facts["usable_cores"] or facts["usable_cpus"]))


GPU_CHECKS = (
    Check(
        "persistence", "spoils", lambda gpu: gpu["persistence"] is False,
        "GPU {index}: persistence mode is off",
        "the driver lets go of the GPU when its last process ends: each worker waits for it, locked clocks are lost",
        "sudo nvidia-smi -i {index} -pm 1",
    ),
    Check(
        "other processes", "spoils", lambda gpu: gpu["other_processes"],
        "GPU {index}: held by other processes ({other_processes})",
        "they take turns with the benchmark and share its caches, bandwidth, memory and power",
        "end them, or choose another GPU by --device; see them by: nvidia-smi -i {index}",
    ),
    Check(
        "busy GPU", "spoils", lambda gpu: _below(5, gpu["utilisation_percent"]),
        "GPU {index}: {utilisation_percent} % busy now",
        "every time holds some of another's work",
        "wait until it is idle, or choose another GPU by --device; watch it by: nvidia-smi -i {index} dmon",
    ),
    Check(
        "GPU memory", "spoils", lambda gpu: _below(gpu["memory_MiB"], 5 * (gpu["memory_used_MiB"] or 0)),
        "GPU {index}: {memory_used_MiB} of {memory_MiB} MiB of memory are in use",
        "cells that would fit end as oom",
        "end whatever holds it; see it by: nvidia-smi -i {index}",
    ),
    Check(
        "clock events", "spoils", lambda gpu: gpu["disturbing"],
        "GPU {index}: slowed now, for: {disturbing}",
        "heat or the power supply, not the kernel, sets the clock; times are too long, and drift",
        "let it cool, see to airflow and power; watch it by: nvidia-smi -i {index} -q -d PERFORMANCE",
    ),
    Check(
        "temperature", "spoils", _hot,
        "GPU {index}: {temperature_C} °C, and it is slowed from {slowdown_C} °C on",
        "under load it may reach that, and what is measured last looks slowest",
        "let it cool and see to the airflow; watch it by: nvidia-smi -i {index} dmon -s p",
    ),
    Check(
        "power limit", "spoils", lambda gpu: _below(gpu["power_limit_W"], gpu["default_power_limit_W"]),
        "GPU {index}: limited to {power_limit_W:.0f} W; the default is {default_power_limit_W:.0f} W",
        "kernels that work hardest are slowed most, so that even ratios differ from those on other machines",
        "sudo nvidia-smi -i {index} -pl {default_power_limit_W:.0f}",
    ),
    Check(
        "MIG", "spoils", lambda gpu: gpu["mig"],
        "GPU {index}: MIG is on",
        "a slice of the GPU is measured, against limits of the whole, and other slices share its power",
        "end what runs on it; then: sudo nvidia-smi -i {index} -mig 0",
    ),
    Check(
        "compute mode", "spoils", lambda gpu: gpu["compute_mode"] == "prohibited",
        "GPU {index}: its compute mode is prohibited",
        "no process can work on it: every cell ends as an error",
        "sudo nvidia-smi -i {index} -c DEFAULT",
    ),
    Check(
        "ECC", "notes", lambda gpu: gpu["ecc"] is False,
        "GPU {index}: ECC is off",
        "memory may be larger and faster than on most machines, which have it on",
        "say so beside the results, or: sudo nvidia-smi -i {index} -e 1, and restart",
    ),
    Check(
        "clocks", "notes", _moves,
        "GPU {index}: nothing says that its clocks are locked ({sm_clock_MHz} MHz now, {max_sm_clock_MHz} at most)",
        "the SM clock moves with load and heat; attnbench records it with each window of samples",
        "for steadier, slower times: sudo nvidia-smi -i {index} -lgc MHZ; afterwards: sudo nvidia-smi -i {index} -rgc",
    ),
)  # fmt: skip
"""What each GPU is looked at for."""


MACHINE_CHECKS = (
    Check(
        "no GPU", "notes", lambda facts: facts["torch_cuda"] and not facts["gpus"],
        "torch is built for CUDA {torch_cuda}, but the driver shows no GPU",
        "a run measures the CPU, unless --device says otherwise",
        "if there should be one, see what says: nvidia-smi; in a container, start it with --gpus all",
    ),
    Check(
        "torch without CUDA", "spoils", lambda facts: facts["gpus"] and not facts["torch_cuda"],
        "there is a GPU, but no torch that is built for CUDA",
        "a run measures the CPU",
        "install torch for CUDA by the command that pytorch.org/get-started gives",
    ),
    Check(
        "governor", "spoils", lambda facts: facts["governor"] not in (None, "performance"),
        "the governor of the CPU's clocks is {governor}",
        "clocks follow the load late: short kernels, and whatever the host must launch, run slow at first",
        "sudo cpupower frequency-set -g performance",
    ),
    Check(
        "load", "spoils", lambda facts: facts["load_1min"] > 0.2 * (facts["usable_cores"] or facts["usable_cpus"]),
        "the load of the last minute is {load_1min:.1f}, with {physical_cores} cores to use",
        "other work takes cores, caches and memory bandwidth, now and then",
        "end it, or wait a minute if it has just ended; see it by: top",
    ),
    Check(
        "CPU quota", "spoils", _throttles,
        "the container's quota is worth {cgroup_cpus:g} CPUs, of {usable_cpus} that it may run on",
        "all threads are halted, for up to a tenth of a second, whenever they have used it up together",
        "give it whole CPUs of its own instead: docker run --cpuset-cpus 0-7, without --cpus",
    ),
    Check(
        "memory limit", "notes", lambda facts: _below(facts["cgroup_memory_MiB"], facts["memory_MiB"] / 2),
        "the container may hold {cgroup_memory_MiB} of the machine's {memory_MiB} MiB",
        "large cases on the CPU end as oom that the machine could hold",
        "start it with more: docker run --memory SIZE",
    ),
    Check(
        "swap", "notes", lambda facts: facts["swap_used_MiB"] > 0,
        "{swap_used_MiB} MiB are swapped out",
        "memory has been short; if it is again, times hold reads from disk",
        "end what holds memory; then: sudo swapoff -a && sudo swapon -a",
    ),
    Check(
        "affinity", "notes", lambda facts: _below(facts["usable_cores"], facts["machine_cores"]),
        "this process may use {usable_cores} of the machine's {machine_cores} cores",
        "times on the CPU are those of a part of it, and whoever has the rest shares caches and bandwidth",
        "start it without taskset or --cpuset-cpus, or ask the scheduler for whole machines",
    ),
    Check(
        "SMT", "notes", lambda facts: facts["smt"],
        "each core runs several threads (SMT); there are {usable_cpus} logical CPUs to use",
        "attnbench runs {physical_cores} threads; one that shares its core has about half of it",
        "keep the machine idle, or: echo off | sudo tee /sys/devices/system/cpu/smt/control",
    ),
    *(
        Check(
            variable, "notes", lambda facts, variable=variable: variable in facts["environment"],
            variable + " is {environment[" + variable + "]}",
            "other programs may round products of float32 by it; attnbench takes it from its workers' environment",
            f"nothing, for attnbench; to be rid of it elsewhere: unset {variable}",
        )
        for variable in ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
    ),
    Check(
        "CUDA_LAUNCH_BLOCKING", "spoils", lambda facts: _on(facts, "CUDA_LAUNCH_BLOCKING"),
        "CUDA_LAUNCH_BLOCKING is {environment[CUDA_LAUNCH_BLOCKING]}",
        "the host waits for every kernel, and times hold that waiting",
        "unset CUDA_LAUNCH_BLOCKING",
    ),
    *(
        Check(
            variable, "spoils", lambda facts, variable=variable: facts["environment"].get(variable) == "1",
            variable + " is 1",
            "torch.compile does nothing: the backends that need it measure eager code, or fail",
            f"unset {variable}",
        )
        for variable in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")
    ),
    Check(
        "OMP_NUM_THREADS", "notes", lambda facts: "OMP_NUM_THREADS" in facts["environment"],
        "OMP_NUM_THREADS is {environment[OMP_NUM_THREADS]}",
        "attnbench sets torch's threads to the {physical_cores} cores there are; other libraries go by the variable",
        "unset OMP_NUM_THREADS",
    ),
    Check(
        "CUDA_VISIBLE_DEVICES", "notes", _hides_gpus,
        "CUDA_VISIBLE_DEVICES is '{environment[CUDA_VISIBLE_DEVICES]}', which hides GPUs of this machine",
        "--device cuda:N counts those that are left; the indices here are the machine's",
        "unset CUDA_VISIBLE_DEVICES, unless it is meant so",
    ),
    Check(
        "C++ compiler", "notes", lambda facts: facts["cxx"] is None,
        "there is no C++ compiler: neither g++ nor what CXX names",
        "on the CPU, backends that use torch.compile are unavailable",
        "install g++ (apt install g++), or set CXX to a compiler",
    ),
)  # fmt: skip
"""What the rest of the machine and its software are looked at for."""
