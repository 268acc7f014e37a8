"""What a run keeps when it is killed, interrupted or goes on elsewhere."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from conftest import MISBEHAVING, SMALL_GRID, Attnbench, records_of

GRID = ("--batch", "1", "--d-model", "8,16", "--seq-len", "32,64", "--budget", "0.02", "--device", "cpu")
BACKENDS = ("--backend=eager", "--backend=sdpa", "--backend=naive")
CELLS = 12


def start(*args: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "attnbench", "run", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def workers(runner: subprocess.Popen[str]) -> list[psutil.Process]:
    return [child for child in psutil.Process(runner.pid).children() if "attnbench.worker" in child.cmdline()]


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


@pytest.mark.timeout(300)
def test_kill_9_at_random_moments_loses_nothing_and_doubles_nothing(tmp_path: Path, attnbench: Attnbench) -> None:
    out = tmp_path / "run"
    moments = random.Random(7)
    process = start(*GRID, *BACKENDS, "--out", out)
    wait_for(lambda: (out / "records.jsonl").exists())
    for _ in range(3):
        time.sleep(moments.uniform(0, 1.5))
        before = [record["cell_id"] for record in _whole_lines(out)]
        orphans = workers(process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        wait_for(lambda orphans=orphans: not alive(orphans), 5)
        kept = [record["cell_id"] for record in _whole_lines(out)]
        assert kept[: len(before)] == before
        process = start("--resume", "--out", out)
        time.sleep(2.5)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    ids = [record["cell_id"] for record in records_of(out)]
    assert len(ids) == len(set(ids)) == CELLS
    assert (out / "report.md").read_text().count("12 of 12 cells: 12 ok.") == 1
    again = attnbench("run", "--resume", "--out", out)
    assert again.returncode == 0
    assert [record["cell_id"] for record in records_of(out)] == ids


def _whole_lines(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text().split("\n")[:-1]]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_at_once_keeps_what_is_done_and_says_how_to_go_on(tmp_path: Path, how: signal.Signals) -> None:
    out = tmp_path / "run"
    process = start(*SMALL_GRID, "--backend=eager", f"--backend={MISBEHAVING}:hangs", "--out", out)
    # whichever of the two is visited first, in the end the one hangs
    wait_for(lambda: (out / "records.jsonl").exists())
    time.sleep(3)
    left = workers(process)
    process.send_signal(how)
    _, errors = process.communicate(timeout=10)  # the one that hangs would be given up after 300 s
    assert process.returncode == 130
    kept = len(records_of(out))
    said = errors.splitlines()[-1]
    assert said == (
        f"attnbench: interrupted; {kept} of 2 cells are kept in {out}; go on with: attnbench run --resume --out {out}"
    )
    assert left
    wait_for(lambda: not alive(left), 5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    process = start(*SMALL_GRID, "--backend=eager", "--out", out, "--quiet")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--seq-len", "128"), "another request: grid was"),
        (("--backend=sdpa",), "another request: "),
        (("--seed", "1"), "another request: "),
        (("--pass", "forward"), "another request: "),
    ],
)
def test_another_request_is_refused(
    finished: Path, attnbench: Attnbench, options: tuple[str, ...], complaint: str
) -> None:
    before = (finished / "records.jsonl").read_bytes()
    done = attnbench("run", "--resume", "--out", finished, *SMALL_GRID, *options)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (finished / "records.jsonl").read_bytes() == before


def test_the_same_request_is_not(finished: Path, attnbench: Attnbench) -> None:
    assert attnbench("run", "--resume", "--out", finished, *SMALL_GRID, "--backend=eager").returncode == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [("hostname", "elsewhere"), ("cpu", "another CPU"), ("physical_cores", 99), ("packages", {"torch": "1.0"})],
)
def test_another_machine_is_refused(
    finished: Path, attnbench: Attnbench, tmp_path: Path, key: str, value: object
) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    header = json.loads((finished / "run.json").read_text())
    header["machine"][key] = value
    (moved / "run.json").write_text(json.dumps(header))
    (moved / "records.jsonl").write_bytes((finished / "records.jsonl").read_bytes())
    done = attnbench("run", "--resume", "--out", moved)
    assert done.returncode == 2
    assert f"was measured elsewhere: {key} was {value!r} and is" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_another_version_of_a_users_code_is_refused(attnbench: Attnbench, tmp_path: Path) -> None:
    code = "import torch\ndef f(q, k, v, *, scale):\n    return torch.softmax(q @ k.mT * scale, -1) @ v\n"
    (tmp_path / "mine.py").write_text(code)
    grid = (*GRID, "--backend=mine.py:f")
    assert attnbench("run", *grid, "--out", "run", "--quiet").returncode == 0
    path = tmp_path / "run" / "records.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    (tmp_path / "mine.py").write_text(code + "# changed\n")
    done = attnbench("run", "--resume", "--out", "run")
    assert done.returncode == 2
    assert "backend 'mine.py:f' was sha256" in done.stderr
    (tmp_path / "mine.py").write_text(code)
    assert attnbench("run", "--resume", "--out", "run", "--quiet").returncode == 0
    assert len(records_of(tmp_path / "run")) == 4


def test_a_run_of_a_decorated_function_goes_on_from_the_command_line(attnbench: Attnbench, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import attnbench, torch\n"
        "@attnbench.backend('mine')\n"
        "def f(q, k, v, *, scale):\n    return torch.softmax(q @ k.mT * scale, -1) @ v\n"
        "if __name__ == '__main__':\n"
        "    attnbench.run({'seq_len': [8, 16], 'd_model': 8}, ['mine'], device='cpu', budget_s=0.02, out='run')\n"
    )
    subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, check=True)
    path = tmp_path / "run" / "records.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    assert attnbench("run", "--resume", "--out", "run", "--quiet").returncode == 0
    assert [record["status"] for record in records_of(tmp_path / "run")] == ["ok", "ok"]
    seconds = json.loads((tmp_path / "run" / "run.json").read_text())["seconds"]
    assert attnbench("run", "--resume", "--out", "run", "--quiet").returncode == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["seconds"] == seconds, "nothing was left to do"


def test_ctrl_c_while_a_resumed_run_is_planned_says_how_to_go_on(tmp_path: Path, attnbench: Attnbench) -> None:
    out = tmp_path / "run"
    assert attnbench("run", *GRID, "--backend=eager", "--out", out, "--quiet").returncode == 0
    path = out / "records.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    process = start("--resume", "--out", out)
    wait_for(lambda: workers(process))
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"2 of 4 cells are kept in {out}" in errors
    assert len(records_of(out)) >= 2
