"""Bad input is one clear line and exit code 2; good input does what it says."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnbench import cli
from attnbench.cli import main
from conftest import MISBEHAVING, SMALL_GRID, Attnbench, records_of, with_ceilings

BAD: dict[str, tuple[list[str], str]] = {
    "preset": (["--preset", "sead"], "preset 'sead' is not known; did you mean 'seed'? there are: cs336-flash"),
    "backend": (["--backend", "sdpa-falsh"], "did you mean 'sdpa-flash'?"),
    "dtype": (["--dtype", "fp8"], "--dtype"),
    "device": (["--device", "tpu"], "device 'tpu' is not known; there are: cpu, cuda, cuda:N"),
    "zero": (["--seq-len", "0"], "0 is not a whole number above zero"),
    "negative": (["--batch", "-4"], "-4 is not a whole number above zero"),
    "fraction": (["--d-model", "16.5"], "'16.5' is not a whole number above zero"),
    "word": (["--seq-len", "256,long"], "'long' is not a whole number above zero"),
    "two signs": (["--seq-len=--5"], "'--5' is not a whole number above zero"),
    "endless digits": (["--seq-len", "9" * 5000], "is not a whole number above zero"),
    "endless memory": (["--memory-limit", "9" * 400], "is not a size"),
    "endless shard": (["--shard", "9" * 5000 + "/2"], "is not of the form I/N"),
    "no preset": (["--preset", ""], "preset '' is not known"),
    "no device": (["--device", ""], "device '' is not known"),
    "layout for two dtypes": (
        ["--layout", "seed", "--backend", "eager", "--dtype", "float32,float64"],
        "but dtype is float32, float64",
    ),
    "empty list": (["--seq-len", ""], "'' is not a whole number above zero"),
    "kv heads": (["--heads", "8", "--kv-heads", "3"], "kv_heads = 3 does not divide heads = 8"),
    "spec missing": (["--spec", "nowhere.toml"], "spec file nowhere.toml does not exist"),
    "two grids": (["--spec", "a.toml", "--preset", "seed"], "one grid at a time"),
    "pass": (["--pass", "sideways"], "pass 'sideways' is not known; there are: forward, backward"),
    "protocol": (["--protocol", "exact"], "there are: default, seed"),
    "clock": (["--clock", "turbo"], "clock 'turbo' is not known; there are: sustained, burst"),
    "clock of a cpu": (["--clock", "burst", "--device", "cpu"], "are about a GPU, and the device is cpu"),
    "graph on a cpu": (["--graph", "--device", "cpu"], "are about a GPU, and the device is cpu"),
    "graph in the seed's way": (
        ["--graph", "--device", "cuda", "--protocol", "seed"],
        "no part of the seed's protocol",
    ),
    "budget": (["--budget", "0"], "budget = 0.0 is not a number of seconds above zero"),
    "budget word": (["--budget", "long"], "'long' is not a valid float"),
    "timeout": (["--timeout", "-1"], "timeout = -1.0"),
    "endless": (["--timeout", "inf"], "timeout = inf"),
    "memory": (["--memory-limit", "8 bananas"], "memory limit '8 bananas' is not a size; write it like 8GiB"),
    "shard": (["--shard", "3/2"], "shard 3/2 does not exist"),
    "shard form": (["--shard", "half"], "shard 'half' is not of the form I/N"),
    "resume nothing": (["--resume"], "give its directory by --out DIR"),
    "resume nowhere": (["--resume", "--out", "nowhere"], "nowhere does not exist"),
    "layout": (["--layout", "sede"], "layout 'sede' is not known"),
    "layout for many": (["--layout", "seed"], "the seed layout shows one backend; choose by --backend one of"),
    "executor": (["--executor", "slurm"], "executor 'slurm' is not known"),
    "option": (["--frobnicate"], "No such option"),
    "argument": (["surplus"], "surplus"),
}


def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> str:
    """Runs the command in this process; returns its one line of complaint."""
    monkeypatch.setattr("sys.argv", ["attnbench", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert stop.value.code == 2, said
    assert said.out == ""
    assert said.err.startswith("attnbench: ")
    assert len(said.err.splitlines()) == 1
    return said.err


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options, complaint = BAD[what]
    if command == "plan" and options[0] in ("--resume", "--layout", "--executor"):
        pytest.skip("an option of run alone")
    assert complaint in fails(capsys, monkeypatch, command, *options)
    assert not any(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_is_listed_as_it_describes_itself(name: str) -> None:
    command = importlib.import_module(f"attnbench.cli.{name}").command
    assert command.name == name
    assert " ".join(str(command.help).split()).startswith(cli.COMMANDS[name])


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["frob"], "command 'frob' is not known; there are: run, plan,"),
        (["reccomend"], "did you mean 'recommend'?"),
        ([], "no command was given; there are: run, plan,"),
        (["report", "nowhere"], "nowhere does not exist"),
        (["report", "."], "is not a run directory"),
        (["report"], "Missing argument 'RUN'"),
        (["backends", "--backend", "egaer"], "did you mean 'eager'"),
    ],
)
def test_other_commands_complain_alike(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, args: list[str], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert complaint in fails(capsys, monkeypatch, *args)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([f"--backend={MISBEHAVING}:rigth"], "has no function 'rigth'"),
        (
            [f"--backend={MISBEHAVING.with_name('raises_at_import.py')}:f"],
            "raised RuntimeError: the library it needs is missing",
        ),
        (["--backend=nowhere.py:f"], "there is no file nowhere.py"),
        (["--backend=nowhere.py:f", "--backend=no.module:g"], "there is no file nowhere.py; backend 'no.module:g'"),
        (["--device=cuda", "--backend=eager"], "sees 0 CUDA GPUs; try --device cpu"),
        (["--backend=sdpa-cudnn"], None),
    ],
)
def test_what_only_a_worker_can_tell(
    attnbench: Attnbench, tmp_path: Path, options: list[str], complaint: str | None
) -> None:
    done = attnbench("run", *SMALL_GRID, *options, "--out", "run")
    if complaint is None:  # a backend that was asked for by name has a record that says why not
        assert done.returncode == 0
        assert records_of(tmp_path / "run")[0]["reason"] == "needs a CUDA GPU"
        return
    assert done.returncode == 2
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_had_is_told_before_anything_runs(attnbench: Attnbench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = attnbench("run", *SMALL_GRID, "--backend=eager", "--out", "file", timeout=20)
    assert done.returncode == 2
    assert "file is a file; --out takes a directory" in done.stderr
    done = attnbench("run", *SMALL_GRID, "--backend=eager", "--out", "/proc/run")
    assert done.returncode == 2
    assert "/proc/run cannot be written" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_run_leaves_what_the_report_shows(attnbench: Attnbench, tmp_path: Path) -> None:
    done = attnbench("run", *SMALL_GRID, "--backend=eager", "--backend=sdpa", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "[2/2]" in done.stderr
    assert "to go" in done.stderr
    assert (tmp_path / "run" / "report.md").read_text() == done.stdout
    assert (tmp_path / "run" / "report.html").read_text() == attnbench("report", "run", "--format", "html").stdout
    assert attnbench("report", "run").stdout == done.stdout
    header = json.loads((tmp_path / "run" / "run.json").read_text())
    assert header["cells"] == 2
    assert header["seconds"]["whole"] > 0
    assert header["machine"]["packages"]["torch"]
    assert {record["run_id"] for record in records_of(tmp_path / "run")} == {header["run_id"]}
    for name in ("csv", "json", "latex"):
        assert "eager" in attnbench("report", "run", "--format", name).stdout
    assert attnbench("report", "run", "--out", "report.tex", "--format", "latex").stdout == ""
    assert "\\toprule" in (tmp_path / "report.tex").read_text()
    occupied = attnbench("run", *SMALL_GRID, "--backend=eager", "--out", "run")
    assert occupied.returncode == 2
    assert "holds a run already" in occupied.stderr


def test_a_run_says_that_cells_are_faster_than_their_floor(
    attnbench: Attnbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_ceilings(monkeypatch, tmp_path / "cache", times=1e-6)
    told = attnbench("run", *SMALL_GRID, "--backend=sdpa", "--out", "a", "--quiet").stderr
    assert told.startswith("attnbench: 1 cells are faster than their floor")
    assert told.count("\n") == 1


def test_quiet_and_json(attnbench: Attnbench) -> None:
    silent = attnbench("run", *SMALL_GRID, "--backend=sdpa", "--out", "a", "--quiet")
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")
    told = attnbench("run", *SMALL_GRID, "--backend=sdpa", "--out", "b", "--json", "--quiet")
    values = json.loads(told.stdout)
    assert values["counts"] == {"ok": 1}
    assert values["records"][0]["backend"] == "sdpa"


def test_one_backend_in_the_seeds_layout(attnbench: Attnbench) -> None:
    done = attnbench("run", *SMALL_GRID, "--backend=naive", "--out", "run", "--layout", "seed", "--protocol", "seed")
    assert done.stdout.startswith("# Attention Benchmarking Results\n\n\n|   d_model |   seq_len |   forward_ms |")
    assert "Backward (ms/iter) by seq_len x d_model:" in done.stdout


def test_a_plan_tells_and_runs_nothing(attnbench: Attnbench, tmp_path: Path) -> None:
    options = ("--device", "cpu", "--seq-len", "256,65536", "--d-model", "16", "--memory-limit", "4GiB")
    done = attnbench("plan", *options)
    assert done.returncode == 0, done.stderr
    assert "Will not fit" in done.stdout
    assert "eager: seq_len 65536 d_model 16" in done.stdout
    left_out = done.stdout.partition("Left out, since nobody asked for them by name:")[2]
    assert "flex: has no backward on CPU" in left_out
    assert "sdpa-cudnn: needs a CUDA GPU" in left_out
    told = json.loads(attnbench("plan", *options, "--backend", "flex", "--backend", "eager", "--json").stdout)
    assert [cell["backend"] for cell in told["cells"]] == ["flex", "eager"] * 2
    assert "no backward on CPU" in told["cells"][0]["unsupported"]
    assert [cell["will_not_fit"] for cell in told["cells"]] == [False, False, False, True]
    assert told["seconds"] > 0
    assert not any(tmp_path.iterdir())


def test_backends_are_listed_with_reasons(attnbench: Attnbench) -> None:
    told = json.loads(attnbench("backends", "--device", "cpu", "--json").stdout)
    by_name = {backend["name"]: backend for backend in told}
    assert by_name["eager"]["unavailable"] is None
    assert by_name["sdpa-cudnn"]["unavailable"] == "needs a CUDA GPU"
    text = attnbench("backends", "--device", "cpu", "--backend=sdpa-cudnn").stdout
    assert "needs a CUDA GPU" in text


def test_shards_make_the_whole(attnbench: Attnbench, tmp_path: Path) -> None:
    options = (
        "--batch",
        "1",
        "--d-model",
        "8",
        "--seq-len",
        "16,32,48",
        "--budget",
        "0.01",
        "--device",
        "cpu",
        "--backend=eager",
    )
    found = []
    for index in (1, 2):
        assert attnbench("run", *options, "--shard", f"{index}/2", "--out", f"run{index}", "--quiet").returncode == 0
        found += [record["seq_len"] for record in records_of(tmp_path / f"run{index}")]
    assert sorted(found) == [16, 32, 48]


def test_a_forward_alone(attnbench: Attnbench, tmp_path: Path) -> None:
    assert (
        attnbench("run", *SMALL_GRID, "--backend=eager", "--pass", "forward", "--out", "run", "--quiet").returncode == 0
    )
    (found,) = records_of(tmp_path / "run")
    assert found["forward_ms"] > 0
    assert found["error_out"] is not None
    assert (found["backward_ms"], found["error_dq"], found["backward_peak_MiB"]) == (None, None, None)


def test_closed_standard_streams_are_no_failure(attnbench: Attnbench, tmp_path: Path) -> None:
    command = f"{sys.executable} -m attnbench run {' '.join(SMALL_GRID)} --backend=eager --out run <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, check=False).returncode == 0
    assert records_of(tmp_path / "run")[0]["status"] == "ok"


def test_a_reader_that_goes_away_ends_neither_sweep_nor_exit_code(tmp_path: Path) -> None:
    run = f"{sys.executable} -m attnbench run {' '.join(SMALL_GRID)} --backend=eager --backend={MISBEHAVING}:raises"
    command = f"set -o pipefail; {run} --out run 2>&1 | true"
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, check=False).returncode == 3
    assert len(records_of(tmp_path / "run")) == 2
    command = f"set -o pipefail; {sys.executable} -m attnbench report run --format csv | true"
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, check=False).returncode == 0


def test_a_full_disk_is_one_line_and_loses_nothing(attnbench: Attnbench, tiny_disk: Path) -> None:
    (tiny_disk / "ballast").write_bytes(bytes(112 << 10))
    options = (
        "--batch",
        "1",
        "--d-model",
        "8",
        "--seq-len",
        "8,12,16,20,24,28,32",
        "--budget",
        "0.3",
        "--device",
        "cpu",
    )
    backends = ("--backend=eager", "--backend=sdpa")
    done = attnbench("run", *options, *backends, "--out", tiny_disk / "run", "--quiet")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "No space left on device; the cells before it are safe; then go on with --resume" in done.stderr
    kept = records_of(tiny_disk / "run")
    (tiny_disk / "ballast").unlink()
    again = attnbench("run", "--resume", "--out", tiny_disk / "run", "--budget", "0.3", *options, *backends, "--quiet")
    ids = [record["cell_id"] for record in records_of(tiny_disk / "run")]
    assert ids[: len(kept)] == [record["cell_id"] for record in kept]
    assert len(ids) == len(set(ids))
    assert again.returncode in (0, 2), "the second part may not fit either"


def test_a_broken_pipe_is_no_traceback(attnbench: Attnbench, tmp_path: Path) -> None:
    attnbench("run", *SMALL_GRID, "--backend=eager", "--out", "run", "--quiet")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "attnbench", "report", "run"],
        cwd=tmp_path,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert "Traceback" not in done.stderr
