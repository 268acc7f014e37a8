"""Whatever a directory holds, every command that takes a run reads it or refuses it in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import attnbench
from attnbench.cli import main
from attnbench.errors import RequestError
from attnbench.store import Store
from conftest import finished, record, small

COMMANDS: dict[str, tuple[str, ...]] = {
    "report": ("report", "RUN"),
    "report as csv": ("report", "RUN", "--format", "csv"),
    "compare before": ("compare", "RUN", "sound"),
    "compare after": ("compare", "sound", "RUN"),
    "recommend": ("recommend", "RUN", "--seq-len", "64", "--d-model", "16", "--pass", "forward"),
    "show": ("show", "RUN"),
    "query": ("query", "select count(*) from records", "RUN"),
    "query of two": ("query", "select count(*) from records", "sound", "RUN"),
    "resume": ("run", "--resume", "--out", "RUN"),
}

RECORDS = [record(small(d_model=d), forward_ms=0.5, forward_samples_ms=(0.5,)) for d in (16, 32, 64)]


def sound(directory: Path) -> Path:
    run = finished(RECORDS)
    with Store.create(directory, run.header) as store:
        for one in run.records:
            store.append(one)
    return directory


def header(directory: Path, **changes: Any) -> None:
    path = directory / "run.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def line(directory: Path, text: str | bytes | dict[str, Any], number: int = 2) -> None:
    """Puts something else in place of a record."""
    path = directory / "records.jsonl"
    lines = path.read_bytes().splitlines()
    if isinstance(text, dict):
        text = json.dumps(json.loads(lines[number - 1]) | text)
    lines[number - 1] = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(b"\n".join(lines) + b"\n")


def remove(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


def replace(path: Path, how: Callable[[Path], Any]) -> None:
    path.unlink()
    how(path)


def turn_into_file(directory: Path) -> None:
    remove(directory)
    directory.write_text("{}")


def empty(directory: Path) -> None:
    remove(directory)
    directory.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (remove, "RUN does not exist; a run directory is what `attnbench run --out DIR` leaves"),
    "a file": (turn_into_file, "RUN is a file; a run directory is what"),
    "empty": (empty, "RUN is not a run directory: it has no run.json"),
    "no header": (lambda run: (run / "run.json").unlink(), "is not a run directory: it has no run.json"),
    "no records": (lambda run: (run / "records.jsonl").unlink(), "RUN is damaged: it has run.json, but no records.jsonl"),
    "header empty": (lambda run: (run / "run.json").write_text(""), "run.json cannot be read: not JSON"),
    "header cut": (lambda run: (run / "run.json").write_text('{"run_id": '), "run.json cannot be read: not JSON"),
    "header binary": (lambda run: (run / "run.json").write_bytes(bytes(range(256))), "cannot be read: not JSON"),
    "header deep": (lambda run: (run / "run.json").write_text("[" * 10**5), "run.json cannot be read: not JSON"),
    "header NaN": (lambda run: header(run, seconds={"whole": float("nan")}), "cannot be read: NaN is not a number"),
    "header foreign": (lambda run: (run / "run.json").write_text('{"name": "x"}'), "run.json has schema None"),
    "header a list": (lambda run: (run / "run.json").write_text("[1]"), "run.json has schema None"),
    "header older": (lambda run: header(run, schema_version=0), "run.json has schema 0; this attnbench reads schema 1"),
    "header newer": (lambda run: header(run, schema_version=99), "run.json has schema 99"),
    "header lacks": (lambda run: header(run, cells=...), "run.json is not the header of a run: "),
    "header has more": (lambda run: header(run, colour="red"), "run.json is not the header of a run: "),
    "header of other kinds": (lambda run: header(run, cells="three"), "its cells is 'three', which is not an integer"),
    "header without device": (lambda run: header(run, request={}), "its request tells no device, protocol"),
    "header a directory": (lambda run: replace(run / "run.json", Path.mkdir), "run.json cannot be read: Is a directory"),
    "records a directory": (lambda run: replace(run / "records.jsonl", Path.mkdir), "cannot be read: Is a directory"),
    "records in a ring": (lambda run: replace(run / "records.jsonl", lambda path: path.symlink_to(path)),
                          "records.jsonl cannot be read: Too many levels of symbolic links"),
    "garbage in the middle": (lambda run: line(run, "{'cell_id': oops}"), "records.jsonl, line 2: not JSON"),
    "a line cut": (lambda run: line(run, '{"schema_version": 1, "run_id"'), "records.jsonl, line 2: not JSON"),
    "a blank line": (lambda run: line(run, ""), "records.jsonl, line 2: not JSON"),
    "binary": (lambda run: line(run, b"\x00\xff\xfe\x80\x1b[31m"), "records.jsonl, line 2: not JSON"),
    "NaN": (lambda run: line(run, {"forward_ms": float("nan")}), "line 2: NaN is not a number; what was not measured"),
    "infinite": (lambda run: line(run, {"forward_ms": float("inf")}), "line 2: Infinity is not a number"),
    "too large": (lambda run: line(run, json.dumps(RECORDS[1].to_dict()).replace("0.5", "1e999")), "1e999 is not a number"),
    "NaN inside": (lambda run: line(run, {"windows": [{"power_W": float("nan")}]}), "line 2: NaN is not a number"),
    "a time in words": (lambda run: line(run, {"forward_ms": "fast"}), "forward_ms is 'fast', which is not a number"),
    "a time that is true": (lambda run: line(run, {"forward_ms": True}), "forward_ms is True, which is not a number"),
    "samples of text": (lambda run: line(run, {"forward_samples_ms": ["a"]}), "which is not a list of numbers"),
    "tags not a list": (lambda run: line(run, {"tags": "noisy"}), "tags is 'noisy', which is not a list of texts"),
    "windows of numbers": (lambda run: line(run, {"windows": [1]}), "which is not a list of objects"),
    "another run's": (lambda run: line(run, {"run_id": "other"}), "line 2: a record of another run, other"),
    "twice": (lambda run: line(run, json.dumps(RECORDS[0].to_dict())), "line 2: a second record of b1.h2"),
    "older record": (lambda run: line(run, {"schema_version": 0}), "line 2: written with record schema 0; this"),
    "foreign record": (lambda run: line(run, '{"id": 7}'), "line 2: not a record of attnbench"),
    "a list": (lambda run: line(run, "[1, 2]"), "line 2: not a record of attnbench"),
    "unknown field": (lambda run: line(run, {"colour\x1b[31m": 1}), "fields this attnbench does not know: colour"),
    "status": (lambda run: line(run, {"status": "fine"}), "line 2: a record has status 'fine'"),
    "no dimension": (lambda run: line(run, {"d_model": None}), "line 2: a record's cell_id"),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    sound(tmp_path / "sound")
    return sound(tmp_path / "RUN")


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["attnbench", *COMMANDS[command]])
    with pytest.raises(SystemExit) as stop:
        main()
    told = capsys.readouterr()
    return int(stop.value.code or 0), told.out, told.err


@pytest.mark.parametrize("what", DAMAGES)
def test_what_is_no_run_is_refused_in_a_line_by_every_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: Path, what: str
) -> None:
    damage, complaint = DAMAGES[what]
    damage(place)
    for command in COMMANDS:
        code, out, err = said(capsys, monkeypatch, command)
        assert (code, out) == (2, ""), (command, err)
        assert err.startswith("attnbench: "), command
        assert len(err.splitlines()) == 1, command
        assert complaint in err, command
        assert "\x1b" not in err, command
    with pytest.raises(RequestError):
        attnbench.load("RUN")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "resume"])
@pytest.mark.parametrize("torn", ["", '{"run_id": "r", "cell', "\x00" * 40])
def test_a_sound_run_is_read_by_every_command_and_a_torn_last_line_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: Path, command: str, torn: str
) -> None:
    with (place / "records.jsonl").open("a") as file:
        file.write(torn)
    code, out, err = said(capsys, monkeypatch, command)
    assert code == 0, err
    assert out
    assert attnbench.load("RUN").records == RECORDS


@pytest.mark.parametrize("command", ["report", "report as csv", "show", "query"])
def test_a_run_whose_first_cell_is_not_finished_yet_can_be_looked_at(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: Path, command: str
) -> None:
    (place / "records.jsonl").write_text("")
    assert said(capsys, monkeypatch, command)[0] == 0


@pytest.mark.parametrize("command", ["report", "show", "query"])
def test_documents_need_to_know_the_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: Path, command: str
) -> None:
    header(place, machine={"cpu": "x", "gpus": "none"})
    code, out, err = said(capsys, monkeypatch, command)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "run.json is not the header of a run: its machine tells no system, kernel" in err


@pytest.fixture
def without_rights() -> Iterator[None]:
    """Root may read everything, and for a while is nobody."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield
    if root:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["run.json", "records.jsonl"])
def test_what_may_not_be_read_is_refused(place: Path, name: str, request: pytest.FixtureRequest) -> None:
    (place / name).chmod(0)
    request.getfixturevalue("without_rights")
    with pytest.raises(RequestError, match="cannot be read: Permission denied"):
        attnbench.load(place)
