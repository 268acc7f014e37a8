"""A run on a terminal: what it says, that it fits, and that it is plain text where colours have no place."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import attnbench
from attnbench.published import PUBLISHED
from attnbench.record import Record
from attnbench.report.terminal import text
from attnbench.result import Result
from attnbench.store import Store
from conftest import Attnbench, finished, record, small

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def one(backend: str, seq_len: int, ms: float | None = None, noise: float = 0.001, **outcome: Any) -> Record:
    case = small(seq_len=seq_len, kv_len=seq_len)
    names = ("forward", "backward", "forward_backward")
    times = {f"{name}_ms": ms for name in names} | {f"{name}_noise": noise for name in names} if ms else {}
    samples = {f"{name}_samples_ms": (ms,) * 1000 for name in names} if ms else {}
    return record(case, backend, **times | samples | outcome)


def run() -> Result:
    return finished([
        one("eager", 256, 1.0),
        one("sdpa", 256, 0.25),
        one("wrong", 256, status="incorrect", reason="dq is off by 2"),
        one("eager", 1024, status="oom", phase="backward"),
        one("sdpa", 1024, 2.0, 0.05),
        one("mine", 1024, 2.01, 0.05),
        one("slow", 1024, 400.0),
        one("wrong", 1024, status="incorrect"),
    ])  # fmt: skip


def lines(run: Result, width: int = 80) -> list[list[str]]:
    return [line.split() for line in text(run, width).splitlines()]


def test_it_names_the_fastest_right_backend_and_how_sure_that_is() -> None:
    told = lines(run())
    assert ["256", "16", "forward", "sdpa", "0.25", "0.1%", "+300%", "eager"] in told
    assert ["backward", "sdpa", "0.25", "0.1%", "+300%", "eager"] in told
    assert ["1024", "16", "forward", "sdpa", "2", "5.0%", "≈0.5%", "mine"] in told, "within the noise of the two"
    assert ["8", "of", "8", "cells:", "5", "ok,", "2", "incorrect,", "1", "oom"] in told


def test_the_chart_has_every_backend_at_the_longest_length_and_failures_in_words() -> None:
    told = {line[0]: line[1:] for line in lines(run())[-14:] if line}
    assert "16 (2 ms)" in text(run())
    assert told["eager"] == ["256,", "then", "oom(backward)"], "the frontier comes last"
    chart = {line[0]: line[1:] for line in lines(run()) if (line and line[-1] in ("oom(backward)", "incorrect")) or
             (line and line[-1].endswith("×"))}  # fmt: skip
    assert chart["sdpa"] == ["█" * 20, "1×"]
    assert chart["mine"][1] == "1×"
    assert chart["slow"] == ["▏", "200×"], "a sliver, and not nothing"


def test_how_far_each_got_names_those_that_stopped_short() -> None:
    told = lines(run())
    start = next(index for index, line in enumerate(told) if line[:2] == ["Largest", "seq_len"])
    assert told[start + 2 :] == [["eager", "256,", "then", "oom(backward)"], ["wrong", "incorrect"]]
    assert "Every backend got to the largest seq_len." in text(finished([one("eager", 256, 1.0)]))


def test_where_nothing_is_right_nothing_is_fastest() -> None:
    told = text(finished([one("wrong", 256, status="incorrect"), one("eager", 256, status="oom", phase="setup")]))
    assert "Nothing is right and timed here." in told
    assert "fastest" not in told
    assert "oom(setup)" in told
    alone = lines(finished([one("eager", 256, 1.0), one("eager", 1024, status="oom", phase="forward")]))
    assert ["256", "16", "forward", "eager", "1", "0.1%"] in alone
    assert ["1024", "16", "forward", "none"] in alone
    assert "0 of 0 cells: none finished" in text(finished([]))


def test_passes_are_those_that_were_timed() -> None:
    forward = text(finished([record(forward_ms=1.0)]))
    assert "forward" in forward
    assert "backward" not in forward
    assert "Speed of a forward" in forward
    request = {"device": "cpu", "protocol": "seed", "budget_s": 1.0, "seed": 0, "backends": ["eager"]}
    seed = text(finished([record(forward_ms=1.0, backward_ms=3.0)], request=request))
    assert "step" in seed
    assert "backward" not in seed


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs_fit_and_colours_change_no_letter(name: str, width: int) -> None:
    found = attnbench.load(f"reference:{name}")
    plain, coloured = text(found, width), text(found, width, colour=True)
    assert max(map(len, plain.splitlines())) <= width
    assert "\x1b" not in plain
    assert "\x1b[" in coloured
    assert [line.rstrip() for line in ESCAPE.sub("", coloured).splitlines()] == plain.splitlines()
    assert all(backend in plain for backend in {record.backend for record in found.records})


def test_long_names_and_many_sizes_fit_too() -> None:
    long = "/home/somebody/kernels/attention_of_my_own.py:the_third_attempt"
    records = [
        record(small(d_model=d), backend, forward_ms=float(index + d))
        for d in (8, 16, 24, 32, 48, 64, 96, 128) for index, backend in enumerate((long, "eager", "a\x1b[31mb[bold]c"))
    ]  # fmt: skip
    told = text(finished(records))
    assert max(map(len, told.splitlines())) <= 80
    assert "\x1b" not in told
    assert "[bold]" in told, "a name is no markup"
    for d in (8, 128):
        assert f"{d} (" in told


def write(directory: Path) -> None:
    with Store.create(directory, run().header) as store:
        for own in run().records:
            store.append(own)


def test_the_command_is_plain_where_nobody_watches(attnbench: Attnbench, tmp_path: Path) -> None:
    write(tmp_path / "run")
    done = attnbench("show", "run", env=os.environ | {"COLUMNS": "80"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == text(run(), 80)
    ascii_only = attnbench("show", "run", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (ascii_only.returncode, ascii_only.stderr) == (0, "")
    assert "sdpa" in ascii_only.stdout


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_the_command_on_a_terminal(tmp_path: Path, environment: dict[str, str], coloured: bool) -> None:
    write(tmp_path / "run")
    ours, theirs = pty.openpty()
    inherited = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "FORCE_COLOR")}
    with subprocess.Popen(
        [sys.executable, "-m", "attnbench", "show", "run"], cwd=tmp_path, stdout=theirs, env=inherited | environment
    ) as process:
        os.close(theirs)
        said = b""
        try:
            while part := os.read(ours, 4096):
                said += part
        except OSError:  # how a terminal of Linux says that its other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    assert (b"\x1b[" in said) == coloured
    assert b"sdpa" in said
