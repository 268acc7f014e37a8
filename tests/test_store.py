from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnbench.errors import RequestError
from attnbench.record import Record
from attnbench.store import DiskFull, Header, Store, read_records
from conftest import record, small

HEADER = Header("r", "2026-01-01T00:00:00+00:00", {}, {}, "0.1.0", 3)
SOME = [
    record(small(seq_len=length, kv_len=length), forward_ms=0.5, forward_samples_ms=(0.4, 0.6)) for length in (1, 2, 3)
]

finite = st.floats(allow_nan=False, allow_infinity=False)
outcomes = st.fixed_dictionaries(
    {"status": st.sampled_from(["ok", "oom", "timeout", "unsupported", "incorrect", "crash", "error"])},
    optional={
        "reason": st.text(),
        "phase": st.sampled_from(["setup", "forward", "backward"]),
        "tags": st.lists(st.text()).map(tuple),
        "forward_ms": finite,
        "forward_samples_ms": st.lists(finite).map(tuple),
        "kernels_forward": st.lists(st.text()).map(tuple),
        "error_dq": finite,
    },
)


@given(outcomes)
def test_a_record_survives_writing_and_reading(outcome: dict[str, Any]) -> None:
    whole = record(**outcome)
    assert Record.from_dict(json.loads(json.dumps(whole.to_dict(), allow_nan=False))) == whole
    assert whole.case == small()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(st.data())
def test_a_kill_at_any_byte_loses_at_most_the_cell_in_hand(tmp_path: Path, data: st.DataObject) -> None:
    directory = tmp_path / os.urandom(4).hex()
    with Store.create(directory, HEADER) as store:
        for one in SOME:
            store.append(one)
    path = directory / "records.jsonl"
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept = whole[:cut].count(b"\n")
    assert read_records(directory) == SOME[:kept]
    with Store.resume(directory) as store:
        assert store.done == {one.cell_id for one in SOME[:kept]}
        for one in SOME[kept:]:
            store.append(one)
    assert path.read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_told_with_its_number(tmp_path: Path) -> None:
    with Store.create(tmp_path / "run", HEADER) as store:
        for one in SOME:
            store.append(one)
    path = tmp_path / "run" / "records.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:50], lines[2], ""]))
    with pytest.raises(RequestError, match=r"records\.jsonl, line 2"):
        read_records(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"schema_version": 99}, "record schema 99"),
        ({"colour": "blue"}, "fields this attnbench does not know: colour"),
        ({"status": "fine"}, "status 'fine'"),
    ],
)
def test_foreign_records_are_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        Record.from_dict(record().to_dict() | change)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"run_id": "other"}, "line 2: a record of another run, other"),
        ({}, "line 2: a second record of"),
        ({"seq_len": 7}, "line 2: a record's cell_id"),
        ({"seq_len": "x"}, "line 2: a record's cell_id"),
    ],
)
def test_records_that_do_not_belong_are_refused(tmp_path: Path, change: dict[str, object], complaint: str) -> None:
    with Store.create(tmp_path / "run", HEADER) as store:
        store.append(SOME[0])
    with (tmp_path / "run" / "records.jsonl").open("a") as file:
        file.write(json.dumps(SOME[0].to_dict() | change) + "\n")
    for read in (read_records, Store.resume):
        with pytest.raises(RequestError, match=complaint):
            read(tmp_path / "run")


def test_no_other_process_may_write_to_the_same_run(tmp_path: Path) -> None:
    with Store.create(tmp_path / "run", HEADER), pytest.raises(RequestError, match="another attnbench is writing"):
        Store.resume(tmp_path / "run")
    with Store.resume(tmp_path / "run"):
        pass


def test_occupied_and_unwritable_directories_are_refused(tmp_path: Path) -> None:
    with Store.create(tmp_path / "run", HEADER):
        pass
    with pytest.raises(RequestError, match="holds a run already; go on with it by --resume"):
        Store.create(tmp_path / "run", HEADER)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("do not touch")
    with pytest.raises(RequestError, match="is not empty and holds no run"):
        Store.create(tmp_path / "mine", HEADER)
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="is a file"):
        Store.create(tmp_path / "file", HEADER)
    with pytest.raises(RequestError, match="cannot be written"):
        Store.create(Path("/proc/run"), HEADER)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "it has no run.json"),
        ("", "cannot be read"),
        ("[]", "has schema None"),
        ('{"schema_version": 0}', "has schema 0"),
        ('{"schema_version": 1}', "is not the header of a run"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, content: str | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(RequestError, match=complaint):
        read_records(tmp_path)


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.create(tmp_path / "run", HEADER) as store:
        store.append(SOME[0])
        real = os.write

        def full(descriptor: int, data: bytes) -> int:
            real(descriptor, data[:20])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(DiskFull, match="No space left on device"):
            store.append(SOME[1])
        monkeypatch.undo()
        assert read_records(tmp_path / "run") == SOME[:1]
        store.append(SOME[1])
    assert read_records(tmp_path / "run") == SOME[:2]


def test_a_full_disk_loses_nothing_that_was_finished(tiny_disk: Path) -> None:
    directory = tiny_disk / "run"
    written = 0
    with Store.create(directory, HEADER) as store:

        def fill() -> None:
            nonlocal written
            for written in range(1000):
                store.append(record(small(seq_len=written + 1, kv_len=1)))

        with pytest.raises(DiskFull):
            fill()
    assert 0 < len(read_records(directory)) == written < 1000
