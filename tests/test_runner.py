"""The order of cells and rounds, with an executor whose times are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from attnbench.case import Case
from attnbench.executors.local import WorkerLost
from attnbench.grid import Grid
from attnbench.live import Live
from attnbench.plan import Cell, Plan
from attnbench.progress import Forecast, Lines, clock
from attnbench.record import Record
from attnbench.request import Request
from attnbench.runner import ROUNDS, rounds_of, sweep
from attnbench.store import Header, Store

TEN = 10
"""Rounds on a CPU, of a tenth of a second each, in a budget of one."""

STEADY = {"fields": {"error_out": 1e-7}, "samples_ms": {"forward": [1.0] * 4, "backward": [2.0] * 4}}


class Scripted:
    """Answers each visit from a list; notes what was asked."""

    def __init__(self, answers: dict[str, list[Any]]) -> None:
        self.answers, self.asked = answers, []
        self.starting_s = 0.0
        self.others = 1

    def ask(self, message: dict[str, Any], timeout_s: float, backend: str) -> dict[str, Any]:
        assert backend == message["backend"]
        self.asked.append((message["case"]["seq_len"], message["backend"], message["first"], timeout_s))
        script = self.answers.get(message["backend"], [STEADY])
        visits = sum(asked[:2] == self.asked[-1][:2] for asked in self.asked)
        answer = script[min(visits, len(script)) - 1]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def end_others(self, backend: str) -> bool:
        """There is one other worker, until it is ended."""
        ended, self.others = self.others > 0, 0
        return ended


class Noted:
    def __init__(self) -> None:
        self.finished_cells: list[str] = []

    def working(self, cell: Cell) -> None: ...

    def finished(self, cell: Cell, record: Record) -> None:
        self.finished_cells.append(record.backend)


def plan(
    *backends: str, refusals: dict[str, str] | None = None, lengths: tuple[int, ...] = (16, 32), device: str = "cpu"
) -> Plan:
    grid = Grid.from_dict({"seq_len": list(lengths)})
    request = Request(grid, "g", ("eager",), {}, device, budget_s=1.0, timeout_s=50)
    cells = [
        Cell(case, name, "v1", (refusals or {}).get(name), (), True, 1.0) for case in grid.cases() for name in backends
    ]
    return Plan(request, {}, tuple(cells), {}, None)


def run(tmp_path: Path, planned: Plan, executor: Scripted) -> list[Record]:
    header = Header("r", "now", {}, {}, "0", len(planned.cells))
    with Store.create(tmp_path / "run", header) as store:
        sweep(planned, executor, store, Noted())  # pyright: ignore[reportArgumentType]
        return store.records


def test_all_backends_of_a_case_are_visited_in_rounds_of_changing_order(tmp_path: Path) -> None:
    names = [f"b{i}" for i in range(6)]
    executor = Scripted({})
    records = run(tmp_path, plan(*names), executor)
    asked = [(length, name) for length, name, _, _ in executor.asked]
    rounds = [asked[start : start + 6] for start in range(0, len(asked), 6)]
    assert len(rounds) == 2 * TEN
    for number, visited in enumerate(rounds):
        assert sorted(visited) == [(16 if number < TEN else 32, name) for name in names]
    assert len({tuple(name for _, name in visited) for visited in rounds}) > 1
    assert [first for *_, first, _ in executor.asked] == ([True] * 6 + [False] * 54) * 2
    assert {record.forward_samples_ms for record in records} == {(1.0,) * 4 * TEN}
    assert {(record.forward_ms, record.backward_ms, record.status) for record in records} == {(1.0, 2.0, "ok")}


@pytest.mark.parametrize(("step_ms", "rounds"), [(1.0, TEN), (40.0, 7), (200.0, ROUNDS)])
def test_a_cell_that_has_spent_its_budget_has_fewer_rounds(step_ms: float, rounds: int, tmp_path: Path) -> None:
    """Of a second: four steps a visit, each of which is a forward and a backward."""
    visit = {"fields": {}, "samples_ms": {"forward": [step_ms / 3] * 4, "backward": [step_ms * 2 / 3] * 4}}
    visit["samples_ms"]["forward_backward"] = [step_ms] * 4
    executor = Scripted({"slow": [visit]})
    records = run(tmp_path, plan("slow", "quick", lengths=(16,)), executor)
    asked = [name for _, name, _, _ in executor.asked]
    assert (asked.count("slow"), asked.count("quick")) == (rounds, TEN)
    assert {record.backend: len(record.forward_samples_ms) for record in records} == {
        "slow": 4 * rounds, "quick": 4 * TEN,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("device", "budget_s", "protocol", "rounds"),
    [
        ("cpu", 1.0, "default", 10),
        ("cpu", 5.0, "default", 50),
        ("cpu", 0.05, "default", 3),
        ("cpu", 5.0, "seed", 1),
        ("cuda:0", 5.0, "default", 3),
    ],
)
def test_a_larger_budget_means_more_rounds_on_a_cpu(device: str, budget_s: float, protocol: str, rounds: int) -> None:
    request = Request(Grid(), "g", ("eager",), {}, device, protocol=protocol, budget_s=budget_s)
    assert rounds_of(request) == rounds


def test_a_cell_that_is_done_is_recorded_at_once_and_visited_no_more(tmp_path: Path) -> None:
    executor = Scripted({"quick": [STEADY | {"done": True}]})
    records = run(tmp_path, plan("quick", "slow", lengths=(16,)), executor)
    assert [record.backend for record in records] == ["quick", "slow"]
    assert [name for _, name, _, _ in executor.asked].count("quick") == 1
    assert records[0].tags == ("few_samples",)


def test_what_two_clocks_saw_of_a_call_is_the_median_over_visits(tmp_path: Path) -> None:
    visits = [STEADY | {"seen_ms": {"device_forward_ms": ms, "watched_forward_ms": ms + 0.5}} for ms in (1.0, 3.0, 2.0)]
    (record,) = run(tmp_path, plan("b", lengths=(16,)), Scripted({"b": visits}))
    assert (record.device_forward_ms, record.watched_forward_ms, record.watched_backward_ms) == (2.0, 2.5, None)


def test_what_fails_on_a_later_visit_shows_no_time_of_an_earlier_one(tmp_path: Path) -> None:
    lost = WorkerLost("crash", "backward", "SIGSEGV")
    first = STEADY | {"fields": {"device_forward_ms": 0.9, "compile_ms": 5.0, "forward_peak_MiB": 3.0}}
    (record,) = run(tmp_path, plan("b", lengths=(16,)), Scripted({"b": [first, lost]}))
    assert (record.status, record.phase, record.reason) == ("crash", "backward", "SIGSEGV")
    assert (record.forward_ms, record.device_forward_ms, record.compile_ms) == (None, None, None)
    assert record.forward_samples_ms == ()


NO_ROOM = {"fields": {"status": "oom", "phase": "backward", "reason": "out of memory"}}


def test_what_other_workers_leave_no_room_for_on_a_gpu_is_tried_again_without_them(tmp_path: Path) -> None:
    executor = Scripted({"b": [NO_ROOM, STEADY]})
    (record,) = run(tmp_path, plan("b", lengths=(16,), device="cuda:0"), executor)
    assert (record.status, record.forward_ms) == ("ok", 1.0)
    assert [first for *_, first, _ in executor.asked] == [True, True, False, False]


@pytest.mark.parametrize(("device", "tries"), [("cuda", 2), ("cpu", 1)])
def test_what_a_gpu_has_no_room_for_anyway_is_out_of_memory(device: str, tries: int, tmp_path: Path) -> None:
    executor = Scripted({"b": [NO_ROOM], "c": [NO_ROOM]})
    records = run(tmp_path, plan("b", "c", lengths=(16,), device=device), executor)
    assert [(record.status, record.phase) for record in records] == [("oom", "backward")] * 2
    assert len(executor.asked) == tries + 1, "once there is no other worker, it is not tried again"


def test_what_is_incorrect_keeps_its_errors(tmp_path: Path) -> None:
    wrong = {"fields": {"status": "incorrect", "reason": "dq is off", "error_dq": 0.5}}
    (record,) = run(tmp_path, plan("b", lengths=(16,)), Scripted({"b": [wrong]}))
    assert (record.status, record.error_dq, record.forward_ms) == ("incorrect", 0.5, None)


def test_a_refusal_is_a_record_and_costs_no_visit(tmp_path: Path) -> None:
    executor = Scripted({})
    (record,) = run(tmp_path, plan("b", refusals={"b": "only on Tuesdays"}, lengths=(16,)), executor)
    assert (record.status, record.reason) == ("unsupported", "only on Tuesdays")
    assert not executor.asked


def test_scattered_samples_are_tagged_noisy(tmp_path: Path) -> None:
    wild = {"fields": {}, "samples_ms": {"forward": [1.0, 2.0] * 10}}
    (record,) = run(tmp_path, plan("b", lengths=(16,)), Scripted({"b": [wild]}))
    assert record.tags == ("noisy",)


def test_the_timeout_is_a_cells_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 10))  # each visit takes ten seconds
    monkeypatch.setattr("attnbench.runner.time.monotonic", lambda: next(now))
    executor = Scripted({})
    run(tmp_path, plan("b", lengths=(16,)), executor)
    assert [timeout for *_, timeout in executor.asked] == [50, 40, 30, 20, 10, 0, 0, 0, 0, 0]


def test_what_a_worker_takes_to_start_is_no_cells_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("attnbench.runner.time.monotonic", lambda: now[0])

    class Starting(Scripted):
        def ask(self, message: dict[str, Any], timeout_s: float, backend: str) -> dict[str, Any]:
            now[0] += 31
            self.starting_s += 30
            return super().ask(message, timeout_s, backend)

    executor = Starting({})
    (record,) = run(tmp_path, plan("b", lengths=(16,)), executor)
    assert [timeout for *_, timeout in executor.asked] == list(range(50, 40, -1))
    assert record.seconds == 10


def test_the_time_to_go_follows_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("attnbench.progress.time.monotonic", lambda: now[0])
    planned = plan(*(f"b{i}" for i in range(50)))  # 100 cells of one second each, by the forecast
    forecast = Forecast(planned, done=set())
    assert forecast.seconds_left() == 100
    for cell in planned.cells[:50]:
        now[0] += 3  # but three, in truth
        forecast.finished(cell)
    assert 120 < forecast.seconds_left() <= 150
    for cell in planned.cells[50:]:
        forecast.finished(cell)
    assert forecast.seconds_left() == 0
    assert Forecast(planned, {cell.id for cell in planned.cells[:99]}).seconds_left() == 1


def test_lines_say_what_came_of_a_cell_and_how_long_it_will_take(capsys: pytest.CaptureFixture[str]) -> None:
    planned = plan("b")
    lines = Lines(planned, done=set())
    ok = Record.of(
        Case(8, 1, 1, 16, 16, 64), "b", run_id="r", device="cpu", status="ok", forward_ms=1.5, backward_ms=2.25,
        forward_peak_MiB=7.0, tags=("noisy",),
    )  # fmt: skip
    lines.finished(planned.cells[0], ok)
    lines.finished(planned.cells[1], ok.but(status="error", reason="ValueError: no"))
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(
        "[1/2] b  d_model 64  seq_len 16  float32  ieee  ok  forward 1.5 ms, backward 2.25 ms, peak 7 MiB  [noisy]"
    )
    assert first.endswith("to go)")
    assert second == "[2/2] b  d_model 64  seq_len 32  float32  ieee  error: ValueError: no"


def test_the_live_display_shows_reasons_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    planned = plan("[mine].py:f")
    live = Live(planned, done=set())
    reason = "[enforce fail at alloc_cpu.cpp:127] [/no tag]"
    failed = Record.of(Case(8, 1, 1, 16, 16, 64), "b", run_id="r", device="cpu", status="error", reason=reason)
    with live:
        live.working(planned.cells[0])
        live.finished(planned.cells[0], failed)
    shown = " ".join(capsys.readouterr().err.split())
    assert "[mine].py:f d_model 64" in shown
    assert f"error: {reason}" in shown


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")])
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert clock(seconds) == text
