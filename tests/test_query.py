"""SQL over runs: what the two tables hold, how answers are written, and what a question may not do."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest

import attnbench
from attnbench.analysis.sql import RUNS, ask, column_types, matching
from attnbench.errors import RequestError
from attnbench.record import Record
from attnbench.store import Store
from conftest import MACHINE, Attnbench, finished, record, small

GPU = MACHINE | {"gpus": [{"name": "G1"}, {"name": "G2"}], "driver": "1.2", "software": {"cuda": "13.0"}}

A = finished(
    [
        record(forward_ms=0.5, forward_samples_ms=(0.4, 0.6), tags=("noisy",), windows=({"round": 3},)),
        record(small(d_model=32), status="oom", phase="forward", reason='it\'s "big"'),
    ],
    "a",
)
B = finished([record(backend="sdpa", forward_ms=0.25, backward_peak_MiB=9.0)], "b", machine=GPU, seconds={"whole": 7.5})


def test_records_are_those_of_every_run_with_every_field() -> None:
    table = ask([A, B], "select * from records order by run, d_model")
    assert list(table.headers) == ["run", *Record.__dataclass_fields__, "outcome", "peak_MiB"]
    assert list(table.headers[1:]) == list(column_types())
    found = [dict(zip(table.headers, row, strict=True)) for row in table.rows]
    assert [values["run"] for values in found] == ["a", "a", "b"]
    for values, own in zip(found, [*A.records, *B.records], strict=True):
        fields = {name: values[name] for name in Record.__dataclass_fields__}
        assert Record.from_dict(fields) == own
    assert [(values["outcome"], values["peak_MiB"]) for values in found] == [
        ("ok", None),
        ("oom(forward)", None),
        ("ok", 9.0),
    ]


def test_runs_have_a_row_each() -> None:
    table = ask([A, B], "select * exclude (request, machine, ceilings) from runs")
    assert [*table.headers, "request", "machine", "ceilings"] == list(RUNS)
    first, second = (dict(zip(table.headers, row, strict=True)) for row in table.rows)
    assert (first["run"], first["gpu"], first["torch"], first["cells"], first["finished"]) == (
        "a",
        None,
        "2.13.0",
        2,
        2,
    )
    assert (second["gpu"], second["driver"], second["cuda"], second["seconds"]) == ("G1, G2", "1.2", "13.0", 7.5)


def test_the_two_join_by_run() -> None:
    table = ask(
        [A, B], "from records join runs using (run) select gpu, backend, forward_ms where status = 'ok' order by 2"
    )
    assert table.rows == [[None, "eager", 0.5], ["G1, G2", "sdpa", 0.25]]


def test_lists_and_json_can_be_asked_into() -> None:
    question = "select forward_samples_ms[2], windows->0->'round', tags[1], windows from records where tags <> []"
    assert ask([A], question).rows == [[0.6, 3, "noisy", [{"round": 3}]]]


def test_answers_are_of_types_that_json_has() -> None:
    question = "select 1 / 0 a, 0.0 / 0 b, ln(0.5) c, 1.5 d, sum(d_model) e, {'x': [1.5]} f, date '2026-01-02' g, 'inf'::double h, count(*) > 1 i from records"
    (row,) = ask([A], question).rows
    assert row[:2] == [None, None]
    assert row[2] == pytest.approx(-0.6931, abs=1e-4)
    assert row[3:] == [1.5, 48, {"x": [1.5]}, "2026-01-02", None, True]
    json.dumps(row, allow_nan=False)


def test_text_of_any_kind_can_be_asked_for() -> None:
    """A user's file has whatever name the system allows; JSON writes it, and Unicode has no such thing."""
    odd = finished([record(backend="\udcff.py:f", status="error", reason="é \x00 '\" 😀")])
    assert ask([odd], "select backend, reason from records").rows == [["?.py:f", "é \x00 '\" 😀"]]
    assert ask([odd], "select '\udcff'").rows == [["?"]]
    assert len(matching(odd.records, ["backend = '\udcff.py:f'"])) == 1


def test_columns_of_the_same_name_stay_apart() -> None:
    assert list(ask([A], "select 1 as a, 2 as a, 3 as a").headers) == ["a", "a_1", "a_2"]


def test_runs_of_several_schemas_merge(tmp_path: Path) -> None:
    """A run that an earlier version wrote lacks fields that came later; they are null."""
    for name, lacks in (("old", ("graph_forward_ms", "clock_regime", "windows")), ("new", ())):
        header = A.header
        with Store.create(tmp_path / name, header):
            pass
        values = record(graph_forward_ms=0.1, clock_regime="sustained", windows=({"round": 0},)).to_dict()
        kept = {key: value for key, value in values.items() if key not in lacks}
        (tmp_path / name / "records.jsonl").write_text(json.dumps(kept) + "\n")
    runs = [attnbench.load(tmp_path / name) for name in ("old", "new")]
    found = ask(runs, "select graph_forward_ms, clock_regime, windows from records order by run desc").rows
    assert found == [[None, None, []], [0.1, "sustained", [{"round": 0}]]]


BAD = {
    "select foo from records": "column 'foo' is not known; there are: run, run_id",
    "select forward_sm from records": "did you mean 'forward_ms'",
    "select * from recrds": "table 'recrds' is not known; did you mean 'records'? there are: records, runs",
    "selec 1": "syntax error at or near \"selec\"",
    "select max(": "syntax error",
    "": "is not one SELECT",
    "select 1; select 2": "is not one SELECT",
    "insert into records select * from records": "is not one SELECT",
    "drop table records": "is not one SELECT",
    "set threads = 1": "is not one SELECT",
    "attach 'x.db'": "is not one SELECT",
    "install httpfs": "is not one SELECT",
    "copy records to 'x.csv'": "is not one SELECT",
    "copy (select 1) to 'x.csv'": "is not one SELECT",
    "select cast('a' as int)": "Could not convert string 'a'",
    "select * from read_csv('here.csv')": "Cannot access file",
    "select * from 'here.csv'": "file",
    "select content from read_text('here.csv')": "Cannot access file",
    "select * from glob('*')": "Cannot access file",
    "select * from 'https://example.com/x.parquet'": "file",
    "select * from A": "table 'A' is not known",
}  # fmt: skip


@pytest.mark.parametrize("question", BAD)
def test_what_cannot_be_asked_is_told_in_a_line(question: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.csv").write_text("a\n1\n")
    with pytest.raises(RequestError, match=re.escape(BAD[question])) as no:
        ask([A], question)
    assert len(str(no.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["here.csv"]


def test_the_lock_is_what_keeps_files_shut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the same question is answered, so that the test above can fail."""
    (tmp_path / "here.csv").write_text("a\n1\n")
    question = f"select a from read_csv('{tmp_path / 'here.csv'}')"
    with pytest.raises(RequestError):
        ask([A], question)
    monkeypatch.setattr("attnbench.analysis.sql.LOCKED", {})
    assert ask([A], question).rows == [[1]]


def test_the_command(attnbench: Attnbench, tmp_path: Path) -> None:
    for run in (A, B):
        with Store.create(tmp_path / run.directory, run.header) as store:
            for one in run.records:
                store.append(one)
    question = "select run, backend, forward_ms from records order by run, backend, d_model"
    markdown = attnbench("query", question, "a", "b").stdout.splitlines()
    assert [cell.strip() for cell in markdown[2].split("|")[1:-1]] == ["a", "eager", "0.5"]
    assert [cell.strip() for cell in markdown[3].split("|")[1:-1]] == ["a", "eager", ""]
    told = json.loads(attnbench("query", question, "a", "b", "--format", "json").stdout)
    assert told[2] == {"run": "b", "backend": "sdpa", "forward_ms": 0.25}
    read = list(csv.DictReader(io.StringIO(attnbench("query", question, "a", "b", "--format", "csv").stdout)))
    assert [row["forward_ms"] for row in read] == ["0.5", "", "0.25"]
    for wrong, complaint in (
        (("query", "select 1"), "Missing argument 'RUN...'"),
        (("query", "select 1", "nowhere"), "nowhere does not exist"),
        (("query", "select 1", "a", "./a"), "a is given twice"),
        (("query", "select 1", "a", "--format", "html"), "format 'html' is not known; there are: markdown, csv, json"),
        (("query", "select x from records", "a"), "column 'x' is not known"),
    ):
        done = attnbench(*wrong)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
        assert complaint in done.stderr
