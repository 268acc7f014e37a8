"""The doctor finds each fault that a machine may have, and is silent on a machine that has none."""

from __future__ import annotations

import json
import os
import sys
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from attnbench import clock_events, machine
from attnbench.cli import main
from attnbench.cli.doctor import doctor_text
from attnbench.doctor import GPU_CHECKS, MACHINE_CHECKS, diagnose

CHECKS = {check.name: check for check in (*GPU_CHECKS, *MACHINE_CHECKS)}

GPU = {"name": "A GPU", "uuid": "GPU-1", "memory_MiB": 80000, "power_limit_W": 700.0, "max_sm_clock_MHz": 1980}
GPU_STATE = {
    "sm_clock_MHz": 1500, "clock_events": ["applications_clocks_setting"], "temperature_C": 40, "slowdown_C": 89,
    "default_power_limit_W": 700.0, "max_power_limit_W": 700.0, "utilisation_percent": 0, "memory_used_MiB": 600,
    "other_processes": 0, "persistence": True, "ecc": True, "mig": False, "compute_mode": "default",
}  # fmt: skip
HOST_STATE = {"governor": "performance", "load_1min": 0.3, "swap_used_MiB": 0}
GOOD: dict[str, Any] = {
    "hostname": "h", "system": "Linux x86_64", "kernel": "6", "cpu": "A CPU", "physical_cores": 8, "machine_cores": 8,
    "usable_cpus": 8, "usable_cores": 8, "smt": False, "memory_MiB": 64000, "cgroup_cpus": None,
    "cgroup_memory_MiB": None, "python": "3.12", "packages": {"torch": "2.10"}, "torch_cuda": "13.0",
    "cxx": "/usr/bin/g++", "environment": {}, "driver": "580", "gpus": [GPU], "gpu_states": [GPU_STATE],
    "host_state": HOST_STATE,
}  # fmt: skip
"""A machine that nothing is wrong with."""


def but(**changes: Any) -> dict[str, Any]:
    """The good machine with other facts, wherever among its parts they belong."""
    facts = deepcopy(GOOD)
    parts = (facts["gpus"][0], facts["gpu_states"][0], facts["host_state"], facts)
    for name, value in changes.items():
        next(part for part in parts if name in part)[name] = value
    return facts


def env(**variables: str) -> dict[str, Any]:
    return but(environment=variables)


TRIPS: dict[str, tuple[dict[str, Any], str]] = {
    "persistence": (but(persistence=False), "GPU 0: persistence mode is off"),
    "other processes": (but(other_processes=2), "other processes (2)"),
    "busy GPU": (but(utilisation_percent=6), "6 % busy"),
    "GPU memory": (but(memory_used_MiB=16001), "16001 of 80000 MiB"),
    "clock events": (
        but(clock_events=["sw_power_cap", "sw_thermal_slowdown", "applications_clocks_setting"]),
        "slowed now, for: sw_thermal_slowdown",
    ),
    "temperature": (but(temperature_C=79), "79 °C, and it is slowed from 89 °C on"),
    "power limit": (but(power_limit_W=500.0), "limited to 500 W; the default is 700 W"),
    "MIG": (but(mig=True), "MIG is on"),
    "compute mode": (but(compute_mode="prohibited"), "prohibited"),
    "ECC": (but(ecc=False), "ECC is off"),
    "clocks": (but(clock_events=["gpu_idle"]), "1500 MHz now, 1980 at most"),
    "no GPU": (but(gpus=[], gpu_states=[]), "built for CUDA 13.0, but the driver shows no GPU"),
    "torch without CUDA": (but(torch_cuda=None), "no torch that is built for CUDA"),
    "governor": (but(governor="powersave"), "powersave"),
    "load": (but(load_1min=1.7), "the load of the last minute is 1.7, with 8 cores"),
    "CPU quota": (but(cgroup_cpus=7.5), "worth 7.5 CPUs, of 8"),
    "memory limit": (but(cgroup_memory_MiB=16000), "16000 of the machine's 64000 MiB"),
    "swap": (but(swap_used_MiB=12), "12 MiB are swapped out"),
    "affinity": (but(usable_cores=4), "4 of the machine's 8 cores"),
    "SMT": (but(smt=True), "8 logical CPUs"),
    "NVIDIA_TF32_OVERRIDE": (env(NVIDIA_TF32_OVERRIDE="0"), "NVIDIA_TF32_OVERRIDE is 0"),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": (env(TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="1"), "CUBLAS_OVERRIDE is 1"),
    "CUDA_LAUNCH_BLOCKING": (env(CUDA_LAUNCH_BLOCKING="1"), "CUDA_LAUNCH_BLOCKING is 1"),
    "TORCH_COMPILE_DISABLE": (env(TORCH_COMPILE_DISABLE="1"), "TORCH_COMPILE_DISABLE is 1"),
    "TORCHDYNAMO_DISABLE": (env(TORCHDYNAMO_DISABLE="1"), "TORCHDYNAMO_DISABLE is 1"),
    "OMP_NUM_THREADS": (env(OMP_NUM_THREADS="2"), "OMP_NUM_THREADS is 2"),
    "CUDA_VISIBLE_DEVICES": (env(CUDA_VISIBLE_DEVICES="-1"), "is '-1', which hides GPUs"),
    "C++ compiler": (but(cxx=None), "no C++ compiler"),
}
"""For each check facts that trip it, and what it then says."""

SILENT: dict[str, dict[str, Any]] = {
    "a GPU as hot as it may be": but(temperature_C=78),
    "as much memory as may be": but(memory_used_MiB=16000),
    "as busy as may be": but(utilisation_percent=5),
    "a raised power limit": but(power_limit_W=750.0),
    "the load's own power": but(clock_events=["sw_power_cap", "applications_clocks_setting"]),
    "some load": but(load_1min=1.6),
    "a quota of all cores": but(cgroup_cpus=8.0),
    "a memory limit of half": but(cgroup_memory_MiB=32000),
    "switches that are off": env(CUDA_LAUNCH_BLOCKING="0", TORCH_COMPILE_DISABLE="0", TORCHDYNAMO_DISABLE=""),
    "a variable that shows all GPUs": env(CUDA_VISIBLE_DEVICES="0"),
    "no GPU and a torch for CPUs": but(gpus=[], gpu_states=[], driver=None, torch_cuda=None),
}


def test_every_check_has_a_row() -> None:
    assert list(TRIPS) == list(CHECKS)
    assert len(CHECKS) == len(GPU_CHECKS) + len(MACHINE_CHECKS), "two checks of one name"


@pytest.mark.parametrize("name", TRIPS)
def test_each_check_trips_alone(name: str) -> None:
    facts, words = TRIPS[name]
    (trouble,) = diagnose(facts)
    assert (trouble.check, trouble.severity) == (name, CHECKS[name].severity)
    assert words in trouble.what


def test_a_machine_without_faults_has_no_troubles() -> None:
    assert diagnose(GOOD) == []


@pytest.mark.parametrize("name", SILENT)
def test_it_is_silent_short_of_a_fault(name: str) -> None:
    assert diagnose(SILENT[name]) == []


@pytest.mark.parametrize("cpus", [4.0, 0.5, 3.25])
def test_a_quota_is_a_fault_if_it_is_small_or_broken(cpus: float) -> None:
    assert [trouble.check for trouble in diagnose(but(cgroup_cpus=cpus))] == ["CPU quota"]


@pytest.mark.parametrize(
    ("listed", "hides"), [("", 1), ("-1", 1), ("1,-1,0", 1), ("0", 1), ("0,1", 0), ("GPU-1a,GPU-1b", 0)]
)
def test_hidden_gpus_are_counted(listed: str, hides: int) -> None:
    facts = env(CUDA_VISIBLE_DEVICES=listed) | {"gpus": [GPU, GPU], "gpu_states": [GPU_STATE, GPU_STATE]}
    assert len(diagnose(facts)) == hides


def test_each_gpu_is_looked_at_and_what_spoils_comes_first() -> None:
    facts = GOOD | {"gpus": [GPU, GPU], "gpu_states": [GPU_STATE | {"ecc": False}, GPU_STATE | {"persistence": False}]}
    troubles = diagnose(facts)
    assert [trouble.what.partition(":")[0] for trouble in troubles] == ["GPU 1", "GPU 0"]
    assert troubles[0].remedy == "sudo nvidia-smi -i 1 -pm 1"


@pytest.mark.parametrize("check", TRIPS)
def test_a_fact_that_is_not_told_is_no_fault_and_is_not_shown_as_none(check: str) -> None:
    of_host = ("machine_cores", "usable_cores", "smt", "driver")
    for fact in (*GPU, *GPU_STATE, "governor", *of_host):
        facts = deepcopy(TRIPS[check][0])
        host = [facts] if fact in of_host else [facts["host_state"]]
        for part in (*facts["gpus"], *facts["gpu_states"], *host):
            part.update({fact: None} if fact in part else {})
        troubles = diagnose(facts)
        assert {trouble.check for trouble in troubles} <= {check}, fact
        assert "None" not in doctor_text(facts, troubles), fact


# --- what a reader sees -----------------------------------------------------------------------------------------------


def test_the_text_has_the_machine_and_three_lines_for_each_trouble() -> None:
    facts = but(persistence=False, ecc=False, cgroup_cpus=2.0)
    lines = doctor_text(facts, diagnose(facts)).splitlines()
    assert lines[0] == "GPU 0     A GPU, 600 of 80000 MiB in use, 0 % busy"
    assert any("persistence off, ECC off, MIG off" in line for line in lines)
    assert any("CPUs: 2; memory in MiB: no limit" in line for line in lines)
    start = lines.index("  GPU 0: persistence mode is off")
    assert (
        lines.index("Spoils a benchmark:") < start < lines.index("Good to know:") < lines.index("  GPU 0: ECC is off")
    )
    assert lines[start + 2] == "    remedy: sudo nvidia-smi -i 0 -pm 1"
    assert "Nothing was found" not in "\n".join(lines)


def test_notes_alone_spoil_nothing() -> None:
    facts = but(ecc=False)
    assert doctor_text(facts, diagnose(facts)).endswith("Nothing was found that would spoil a benchmark.")


def test_a_hostile_value_stays_on_its_line() -> None:
    facts = env(OMP_NUM_THREADS="2\n\x1b[2J{cpu}")
    assert "  OMP_NUM_THREADS is 2 [2J{cpu}" in doctor_text(facts, diagnose(facts)).splitlines()


def doctor(monkeypatch: pytest.MonkeyPatch, *args: str) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["attnbench", "doctor", *args])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_the_command_tells_of_this_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    assert not doctor(monkeypatch)
    out, err = capsys.readouterr()
    assert machine.cpu_name() in out
    assert "    remedy: unset CUDA_LAUNCH_BLOCKING" in out.splitlines()
    assert err == ""


def test_the_command_tells_it_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert not doctor(monkeypatch, "--json")
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"facts", "troubles"}
    assert told["facts"]["environment"]["TORCHDYNAMO_DISABLE"] == "1"
    (trouble,) = (trouble for trouble in told["troubles"] if trouble["check"] == "TORCHDYNAMO_DISABLE")
    assert set(trouble) == {"check", "severity", "what", "effect", "remedy"}


def test_a_wrong_request_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(monkeypatch, "--mend") == 2
    assert "No such option" in capsys.readouterr().err


# --- the facts --------------------------------------------------------------------------------------------------------


class Driver:
    """Stands for pynvml, with a driver that answers only what it is given answers to, and refuses the rest."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, **answers: Any) -> None:
        self.answers = {"nvmlInit": None, "nvmlShutdown": None} | answers

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            return name

        def query(*args: Any) -> Any:
            if name not in self.answers:
                raise self.NVMLError(f"{name} is not supported")
            return self.answers[name]

        return query


ANSWERS: dict[str, Any] = {
    "nvmlDeviceGetCount": 1,
    "nvmlDeviceGetHandleByIndex": "handle",
    "nvmlSystemGetDriverVersion": "580",
    "nvmlDeviceGetName": "A GPU",
    "nvmlDeviceGetUUID": "GPU-1",
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80000 << 20, used=600 << 20),
    "nvmlDeviceGetEnforcedPowerLimit": 700_000,
    "nvmlDeviceGetMaxClockInfo": 1980,
    "nvmlDeviceGetClockInfo": 1500,
    "nvmlDeviceGetCurrentClocksEventReasons": 0x2,
    "nvmlDeviceGetTemperature": 40,
    "nvmlDeviceGetTemperatureThreshold": 89,
    "nvmlDeviceGetPowerManagementDefaultLimit": 700_000,
    "nvmlDeviceGetPowerManagementLimitConstraints": [200_000, 700_000],
    "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=0, memory=0),
    "nvmlDeviceGetComputeRunningProcesses": [],
    "nvmlDeviceGetGraphicsRunningProcesses": [],
    "nvmlDeviceGetPersistenceMode": 1,
    "nvmlDeviceGetEccMode": [1, 0],
    "nvmlDeviceGetMigMode": [0, 1],
    "nvmlDeviceGetComputeMode": 0,
}
"""The driver of the good machine."""


def test_the_driver_is_asked_and_its_answers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver(**ANSWERS))
    assert machine.gpus() == {"gpus": [GPU], "gpu_states": [GPU_STATE], "driver": "580"}


def test_every_query_is_one_that_the_real_package_has() -> None:
    pynvml = pytest.importorskip("pynvml")
    names = [*ANSWERS, "nvmlDeviceGetCurrentClocksThrottleReasons", "NVML_CLOCK_SM", "NVML_TEMPERATURE_GPU"]
    assert [name for name in names if not hasattr(pynvml, name)] == []


@pytest.mark.parametrize("refused", ANSWERS)
def test_the_facts_survive_a_driver_that_refuses_a_query(monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    answers = {name: answer for name, answer in ANSWERS.items() if name != refused}
    monkeypatch.setitem(sys.modules, "pynvml", Driver(**answers))
    facts = GOOD | machine.gpus()
    assert "None" not in doctor_text(facts, diagnose(facts))
    assert len(facts["gpus"]) == (refused != "nvmlDeviceGetCount")


@pytest.mark.parametrize(
    "answers", [{}, {"nvmlDeviceGetCount": 1}, {"nvmlDeviceGetCount": 2, "nvmlDeviceGetHandleByIndex": 0}]
)
def test_the_facts_survive_a_driver_that_refuses_every_query(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver(**answers))
    facts = machine.fingerprint()
    assert [set(gpu.values()) for gpu in (*facts["gpus"], *facts["gpu_states"])] == [{None}] * 2 * len(facts["gpus"])
    assert len(facts["gpus"]) == answers.get("nvmlDeviceGetCount", 0)
    assert facts["driver"] is None
    assert doctor_text(facts, diagnose(facts))
    json.dumps(facts)


def test_an_older_driver_is_asked_for_throttle_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ANSWERS | {"nvmlDeviceGetCurrentClocksThrottleReasons": 0x44}
    del answers["nvmlDeviceGetCurrentClocksEventReasons"]
    monkeypatch.setitem(sys.modules, "pynvml", Driver(**answers))
    assert machine.gpus()["gpu_states"][0]["clock_events"] == ["sw_power_cap", "hw_thermal_slowdown"]


def test_own_processes_are_not_others(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = psutil.Popen([sys.executable, "-c", "input()"], stdin=-1)
    compute = [SimpleNamespace(pid=pid) for pid in (os.getpid(), worker.pid, 1)]
    drawing = [SimpleNamespace(pid=1), SimpleNamespace(pid=2)]
    told = {"nvmlDeviceGetComputeRunningProcesses": compute, "nvmlDeviceGetGraphicsRunningProcesses": drawing}
    monkeypatch.setitem(sys.modules, "pynvml", Driver(**ANSWERS | told))
    try:
        assert machine.gpus()["gpu_states"][0]["other_processes"] == 2
    finally:
        worker.kill()
        worker.wait()
        worker.stdin.close()


def test_what_changes_by_the_minute_makes_no_other_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver(**ANSWERS))
    before = machine.fingerprint()
    later = {
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80000 << 20, used=70000 << 20),
        "nvmlDeviceGetClockInfo": 345, "nvmlDeviceGetCurrentClocksEventReasons": 0x1, "nvmlDeviceGetTemperature": 88,
        "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=100), "nvmlDeviceGetPersistenceMode": 0,
    }  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", Driver(**ANSWERS | later))
    monkeypatch.setattr(psutil, "getloadavg", lambda: (99.0, 0.0, 0.0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    now = machine.fingerprint()
    assert now["gpu_states"] != before["gpu_states"]
    assert now["host_state"]["load_1min"] == 99
    assert machine.difference(before, now) is None
    monkeypatch.setitem(sys.modules, "pynvml", Driver(**ANSWERS | {"nvmlDeviceGetEnforcedPowerLimit": 500_000}))
    assert "power_limit_W" in (machine.difference(before, machine.fingerprint()) or "")


def test_the_good_machine_has_every_fact_that_a_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver(**ANSWERS))
    facts = machine.fingerprint()
    assert set(facts) == set(GOOD)
    assert set(facts["host_state"]) == set(HOST_STATE)


@pytest.mark.parametrize(
    ("files", "facts"),
    [
        ({}, (None, None, None, None)),
        ({"cpu.max": "max 100000\n", "memory.max": "max\n"}, (None, None, None, None)),
        ({"cpu.max": "150000 100000\n", "memory.max": f"{3 << 30}\n"}, (1.5, 3072, None, None)),
        ({"cpu0/cpufreq/scaling_governor": "powersave\n", "cpu1/cpufreq/scaling_governor": "performance\n"},
         (None, None, "performance, powersave", None)),
        ({f"cpu{cpu}/topology/thread_siblings_list": "0-1\n" for cpu in (0, 1)}, (None, None, None, 1)),
    ],
)  # fmt: skip
def test_files_of_the_system_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, files: dict[str, str], facts: tuple[Any, ...]
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "CPUS", tmp_path)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "_usable_cpus", lambda: {0, 1})
    now = machine.fingerprint()
    told = (now["cgroup_cpus"], now["cgroup_memory_MiB"], now["host_state"]["governor"], now["usable_cores"])
    assert told == facts


def test_each_variable_has_a_check() -> None:
    assert set(machine.VARIABLES) <= set(CHECKS)


def test_clock_events_have_names() -> None:
    assert clock_events.names(0) == ()
    assert clock_events.names(0x1 | 0x40 | 0x1000) == ("gpu_idle", "hw_thermal_slowdown", "0x1000")
    assert set(clock_events.CLOCK_EVENTS.values()) > clock_events.DISTURBING
