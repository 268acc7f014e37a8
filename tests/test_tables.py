"""Tables to order: columns, conditions, pivots, speed-ups; what failed shows how it ended in every one of them."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import duckdb
import pytest

from attnbench.analysis.select import Selection, parse_columns, parse_pivot, select
from attnbench.analysis.sql import column_types
from attnbench.analysis.table import Table
from attnbench.errors import RequestError
from attnbench.record import Record
from attnbench.report import FORMATS, render, write
from attnbench.report.tables import DATA, WRITERS
from attnbench.result import Result
from attnbench.store import Store
from conftest import Attnbench, finished, record, small


def one(backend: str, seq_len: int, d_model: int = 16, ms: float | None = None, **outcome: Any) -> Record:
    case = small(seq_len=seq_len, kv_len=seq_len, d_model=d_model)
    times = {"forward_ms": ms, "backward_ms": 2 * ms, "forward_backward_ms": 3 * ms} if ms else {}
    return record(case, backend, **times | outcome)


def run() -> Result:
    return finished([
        one("sdpa", 1024, ms=2.0, backward_peak_MiB=7.5),
        one("eager", 256, ms=1.0),
        one("eager", 1024, status="oom", phase="forward", reason="too | big"),
        one("sdpa", 256, ms=0.25, tags=("noisy", "few_samples")),
        one("mine", 256, status="incorrect", reason="dq is off by 2"),
        one("mine", 1024, ms=4.0),
        one("sdpa", 256, 32, ms=0.5),
    ], request={"device": "cpu", "protocol": "default", "budget_s": 1.0, "seed": 0, "backends": ["eager", "sdpa", "mine"]})  # fmt: skip


def rows(**selection: Any) -> list[list[Any]]:
    table = select(run(), Selection(**selection))
    return [list(table.headers), *map(list, table.rows)]


def test_columns_are_those_asked_for_in_their_order_and_failures_stand_in_place_of_numbers() -> None:
    assert rows(columns=("seq_len", "backend", "forward_ms")) == [
        ["seq_len", "backend", "forward_ms"],
        [256, "eager", 1.0],
        [256, "sdpa", 0.25],
        [256, "mine", "incorrect"],
        [1024, "eager", "oom(forward)"],
        [1024, "sdpa", 2.0],
        [1024, "mine", 4.0],
        [256, "sdpa", 0.5],
    ]


def test_with_the_outcome_beside_them_numbers_stay_numbers() -> None:
    for column in ("outcome", "status"):
        table = rows(columns=("backend", column, "forward_ms"), where=["status <> 'ok'"])
        assert [row[2] for row in table[1:]] == [None, None]


def test_what_a_failure_explains_not_stays_empty() -> None:
    assert rows(columns=("tags", "power_W", "bound_by", "phase"), where=["status = 'incorrect'"])[1] == [
        (),
        None,
        None,
        None,
    ]
    assert rows(columns=("peak_MiB",), where=["status = 'ok' and seq_len = 256"])[1] == [None], "ok, and not measured"


def test_a_pivot_has_a_row_for_every_other_dimension_that_varies() -> None:
    assert rows(pivot=("seq_len", "d_model", "forward_ms")) == [
        ["backend", "seq_len", "16", "32"],
        ["eager", 256, 1.0, None],
        ["eager", 1024, "oom(forward)", None],
        ["sdpa", 256, 0.25, 0.5],
        ["sdpa", 1024, 2.0, None],
        ["mine", 256, "incorrect", None],
        ["mine", 1024, 4.0, None],
    ]
    assert rows(pivot=("d_model", "backend", "outcome"), where=["d_model = 16"]) == [
        ["seq_len", "d_model", "eager", "sdpa", "mine"],
        [256, 16, "ok", "ok", "incorrect"],
        [1024, 16, "oom(forward)", "ok", "ok"],
    ]


def test_no_record_of_a_pivot_is_lost() -> None:
    """Whatever two dimensions it is over: each record has a cell of its own."""
    records = [
        record(small(causal=causal, kv_len=kv_len, d_model=d), backend, forward_ms=float(index + 1))
        for index, (causal, kv_len, d, backend) in enumerate(
            (causal, kv_len, d, backend)
            for causal in (False, True) for kv_len in (64, 128) for d in (8, 16) for backend in ("a", "b")
        )
    ]  # fmt: skip
    for down, across in [("causal", "kv_len"), ("backend", "d_model"), ("seq_len", "batch"), ("bound_by", "cell_id")]:
        table = select(finished(records), Selection(pivot=(down, across, "forward_ms")))
        times = [value for row in table.rows for value in row if isinstance(value, float)]
        assert sorted(times) == [one.forward_ms for one in records]


def test_speed_ups_are_over_the_baseline_and_its_failure_costs_no_other_number() -> None:
    table = rows(columns=("backend", "seq_len", "d_model", "forward_ms", "forward_speedup"), baseline="eager")
    assert table[1:] == [
        ["eager", 256, 16, 1.0, 1.0],
        ["sdpa", 256, 16, 0.25, 4.0],
        ["mine", 256, 16, "incorrect", "incorrect"],
        ["eager", 1024, 16, "oom(forward)", "oom(forward)"],
        ["sdpa", 1024, 16, 2.0, None],
        ["mine", 1024, 16, 4.0, None],
        ["sdpa", 256, 32, 0.5, None],
    ]
    plain = rows(columns=("backend", "seq_len", "d_model", "forward_ms"))
    assert [row[:4] for row in table] == plain, "no number is touched"


def test_a_baseline_counts_although_it_is_not_shown() -> None:
    own = select(run(), Selection(("seq_len = 256",), ("forward_speedup", "backward_speedup"), (), "eager"), "sdpa")
    assert own.rows == [[4.0, 4.0], [None, None]]
    assert rows(baseline="eager")[0][-3:] == ["forward_speedup", "backward_speedup", "forward_backward_speedup"]
    assert rows(pivot=("seq_len", "backend", "forward_speedup"), baseline="sdpa", where=["d_model = 16"])[1:] == [
        [256, 0.25, 1.0, "incorrect"],
        [1024, "oom(forward)", 1.0, 0.5],
    ]


def test_sorting_puts_what_has_no_number_last_either_way() -> None:
    up = [row[0] for row in rows(columns=("forward_ms",), sort="forward_ms", where=["d_model = 16"])[1:]]
    down = [row[0] for row in rows(columns=("forward_ms",), sort="-forward_ms", where=["d_model = 16"])[1:]]
    assert up == [0.25, 1.0, 2.0, 4.0, "incorrect", "oom(forward)"]
    assert down == [4.0, 2.0, 1.0, 0.25, "incorrect", "oom(forward)"]
    assert [row[0] for row in rows(columns=("backend",), sort="backend")[1:]] == sorted(
        one.backend for one in run().records
    )
    assert [row[1] for row in rows(columns=("backend", "seq_len"), sort="-reason")[1:3]] == [1024, 256], (
        "by what is not shown"
    )
    table = rows(pivot=("backend", "seq_len", "forward_ms"), where=["d_model = 16"], sort="-1024")
    assert [row[0] for row in table[1:]] == ["mine", "sdpa", "eager"]


@pytest.mark.parametrize(
    ("conditions", "kept"),
    [
        (["d_model = 32"], ["sdpa"]),
        (["seq_len = 1024 AND backend IN ('sdpa', 'mine')"], ["sdpa", "mine"]),
        (["seq_len = 1024", "outcome = 'ok'"], ["sdpa", "mine"]),
        (["seq_len = 1024 -- remark", "status = 'oom' or forward_ms > 3"], ["eager", "mine"]),
        (["list_contains(tags, 'noisy')"], ["sdpa"]),
        (["forward_ms = (select max(forward_ms) from records)"], ["mine"]),
        (["peak_MiB > 7"], ["sdpa"]),
        (["forward_ms / 0 is null and false"], []),
    ],
)
def test_conditions_are_sql(conditions: list[str], kept: list[str]) -> None:
    assert [row[0] for row in rows(columns=("backend",), where=conditions)[1:]] == kept


def test_a_condition_narrows_every_document() -> None:
    only = Selection(where=["backend = 'sdpa'"])
    assert {values["backend"] for values in json.loads(render(run(), "json", selection=only))} == {"sdpa"}
    assert {row["backend"] for row in csv.DictReader(io.StringIO(render(run(), "csv", selection=only)))} == {"sdpa"}
    assert "3 of 7 cells: 3 ok." in render(run(), selection=only)
    assert "| mine" not in render(run(), selection=only)
    assert "oom(forward)" not in render(run(), "html", selection=only)
    assert render(run(), layout="seed", selection=only).startswith("# Attention Benchmarking Results")
    with pytest.raises(RequestError, match="choose by --backend one of: sdpa, eager"):
        render(run(), layout="seed", selection=Selection(where=["backend <> 'mine'"]))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "column": ({"columns": ("forward_sm",)}, "column 'forward_sm' is not known; did you mean 'forward_ms'"),
    "pivot column": ({"pivot": ("seq_len", "d_modl", "forward_ms")}, "column 'd_modl' is not known; did you mean"),
    "pivot of lists": ({"pivot": ("seq_len", "windows", "forward_ms")}, "column windows holds lists"),
    "both": ({"columns": ("backend",), "pivot": ("seq_len", "d_model", "forward_ms")}, "were both given"),
    "baseline": ({"baseline": "egaer"}, "baseline 'egaer' is not known; did you mean 'eager'? there are: sdpa, eager, m"),
    "no baseline": ({"columns": ("forward_speedup",)}, "needs a baseline; name one by --baseline BACKEND"),
    "sort": ({"sort": "-forward"}, "column 'forward' is not known"),
    "sort of a pivot": ({"pivot": ("seq_len", "d_model", "forward_ms"), "sort": "64"}, "column '64' is not known; .*32"),
    "where column": ({"where": ["d_modl = 64"]}, "column 'd_modl' is not known; did you mean 'd_model'? there are: run_id"),
    "where syntax": ({"where": ["d_model = "]}, "--where 'd_model = ': syntax error.*; the columns are: run_id, cell_id"),
    "where nothing": ({"where": [""]}, "the columns are: run_id"),
    "where two": ({"where": ["d_model = 1; select 2"]}, "the columns are: run_id"),
    "where type": ({"where": ["d_model = 'x'"]}, "Could not convert string 'x'"),
    "where sum": ({"where": ["sum(d_model) = 2"]}, "cannot contain aggregates"),
    "where escape": ({"where": ["1=1) UNION SELECT (1"]}, "syntax error"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_selected_is_told_in_a_line(what: str) -> None:
    selection, complaint = BAD[what]
    with pytest.raises(RequestError, match=complaint.replace("?", r"\?").replace("(", r"\(")) as no:
        select(run(), Selection(**selection))
    assert len(str(no.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["", "a,,b", "a,a", ","])
def test_columns_that_are_none(text: str) -> None:
    with pytest.raises(RequestError, match="such as backend,forward_ms"):
        parse_columns(text)


def test_pivots_are_written_with_x_or_a_cross() -> None:
    assert parse_pivot("seq_lenxd_modelxforward_ms") == parse_pivot("seq_len × d_model×forward_ms")
    assert not [name for name in column_types() if "x" in name], "an x between names would be ambiguous"
    for text in ("", "axb", "axbxcxd", "axaxb", "axbx"):
        with pytest.raises(RequestError, match="not of the form ROWSxCOLSxVALUE"):
            parse_pivot(text)


SECRET = "d_model = (select count(*) from {})"


@pytest.mark.parametrize(
    "source", ["read_text('{}')", "read_csv('{}')", "'{}'", "glob('{}')", "parquet_scan('{}')", "here"]
)
def test_a_condition_reads_nothing_but_the_records(tmp_path: Path, source: str) -> None:
    here = tmp_path / "secret.csv"
    here.write_text("a\n1\n")
    assert duckdb.execute(f"select count(*) from read_csv('{here}')").fetchall() == [(1,)], "DuckDB by itself could"
    with pytest.raises(RequestError, match="--where"):
        select(run(), Selection(where=[SECRET.format(source.format(here))]))


def test_markdown_shows_numbers_and_failures_side_by_side() -> None:
    text = render(run(), selection=Selection(columns=("backend", "seq_len", "forward_ms", "tags", "reason")))
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines()]
    assert cells[0] == ["backend", "seq_len", "forward_ms", "tags", "reason"]
    assert cells[3] == ["sdpa", "256", "0.25", "noisy, few_samples", ""]
    assert cells[5] == ["eager", "1024", "oom(forward)", "", "too \\| big"]
    assert "nan" not in text.lower()


def test_markdown_keeps_text_that_looks_like_a_number() -> None:
    table = Table(["run_id", "ms"], [["12e345678901", 1.23456789], ["0001", None], ["a\nb|c", "oom(forward)"]])
    lines = DATA["markdown"](table).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["12e345678901", "1.23457"]
    assert "0001" in lines[3]
    assert "a b\\|c" in lines[4]
    assert len(lines) == 5


def test_latex_is_booktabs_and_escapes_everything() -> None:
    nasty = "\\ & % $ # _ { } ~ ^ < >"
    text = DATA["latex"](Table([nasty], [[nasty], [("a_b", "c%")]]))
    assert text.count("\\toprule") == text.count("\\midrule") == text.count("\\bottomrule") == 1
    body = [line for line in text.splitlines() if line.endswith("\\\\")]
    for line in body[:2]:
        for char in "&%$#_{}":
            assert f"\\{char}" in line
        bare = re.sub(
            r"\\(textbackslash|textasciitilde|ensuremath)\{?[<>]?\}?|\\[&%$#_{}^]", "", line.removesuffix("\\\\")
        )
        assert not set(bare) & set("&%$#_~^<>\\"), bare
    assert "a\\_b, c\\%" in body[2]


def test_latex_headings_escape_as_tables_do() -> None:
    assert WRITERS["latex"].text("a_b <c> ~^|\\") == (
        r"a\_b \textless{}c\textgreater{} \textasciitilde{}\textasciicircum{}\textbar{}\textbackslash{}"
    )


def test_csv_and_json_hold_the_same_table() -> None:
    selection = Selection(columns=("backend", "causal", "forward_ms", "tags", "forward_speedup"), baseline="eager")
    objects = json.loads(render(run(), "json", selection=selection))
    read = list(csv.DictReader(io.StringIO(render(run(), "csv", selection=selection))))
    assert objects[1] == {
        "backend": "sdpa",
        "causal": False,
        "forward_ms": 0.25,
        "tags": ["noisy", "few_samples"],
        "forward_speedup": 4.0,
    }
    assert objects[2]["forward_speedup"] == read[2]["forward_speedup"] == "incorrect"
    assert [row["forward_ms"] for row in read] == [str(values["forward_ms"]) for values in objects]
    assert json.loads(read[1]["tags"]) == objects[1]["tags"]
    every = json.loads(render(run(), "json", selection=Selection(sort="-forward_ms")))
    assert list(every[0]) == list(Record.__dataclass_fields__)
    assert every[0]["forward_ms"] == 4.0


def test_parquet_keeps_types_and_failures(tmp_path: Path) -> None:
    whole, some = tmp_path / "it's whole.parquet", tmp_path / "some.parquet"
    write(run(), whole, "parquet", "full", None, Selection())
    where = "'" + str(whole).replace("'", "''") + "'"
    types = dict(duckdb.execute(f"select column_name, column_type from (describe select * from {where})").fetchall())
    assert list(types) == list(Record.__dataclass_fields__)
    assert (types["forward_ms"], types["seq_len"], types["causal"]) == ("DOUBLE", "BIGINT", "BOOLEAN")
    assert (types["forward_samples_ms"], types["tags"], types["reason"]) == ("DOUBLE[]", "VARCHAR[]", "VARCHAR")
    assert duckdb.execute(f"select count(*), sum(forward_ms), count(forward_ms) from {where}").fetchall() == [
        (7, 7.75, 5)
    ]
    assert duckdb.execute(f"select distinct reason from {where} where status = 'oom'").fetchall() == [("too | big",)]
    columns = ("backend", "seq_len", "backward_ms", "tags", "forward_speedup")
    write(run(), some, "parquet", "full", None, Selection(columns=columns, baseline="eager", where=["d_model = 16"]))
    told = duckdb.execute(f"select * from '{some}'").fetchall()
    assert told[1] == ("sdpa", 256, "0.5", ["noisy", "few_samples"], "4.0")
    assert told[2] == ("mine", 256, "incorrect", [], "incorrect")
    write(finished([]), some, "parquet", "full", None, Selection())
    assert duckdb.execute(f"select count(*) from '{some}'").fetchall() == [(0,)]


def test_parquet_needs_a_file_that_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="parquet is not text; name a file for it by --out FILE"):
        render(run(), "parquet")
    for out in (tmp_path, tmp_path / "nowhere" / "x.parquet"):
        with pytest.raises(RequestError, match="cannot be written") as no:
            write(run(), out, "parquet", "full", None, Selection())
        assert len(str(no.value).splitlines()) == 1


@pytest.mark.parametrize(("format", "layout"), [("html", "full"), ("markdown", "seed")])
def test_documents_of_many_tables_make_none_to_order(format: str, layout: str) -> None:  # noqa: A002
    with pytest.raises(RequestError, match="--columns, --pivot, --baseline and --sort make one"):
        render(run(), format, layout, selection=Selection(sort="forward_ms"))


@pytest.mark.parametrize("format", [name for name in FORMATS if name in DATA])
def test_a_table_of_a_run_without_records_has_headers(format: str) -> None:  # noqa: A002
    text = render(finished([]), format, selection=Selection(columns=("backend", "forward_ms"), where=["true"]))
    assert format == "json" or "backend" in text
    assert isinstance(
        render(finished([]), format, selection=Selection(pivot=("seq_len", "d_model", "forward_ms"))), str
    )


def test_without_duckdb_only_what_needs_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    assert "| sdpa" in render(run(), selection=Selection(columns=("backend", "forward_ms"), baseline="eager"))
    for needs in (lambda: render(run(), selection=Selection(where=["true"])),
                  lambda: write(run(), tmp_path / "x", "parquet", "full", None, Selection())):  # fmt: skip
        with pytest.raises(RequestError, match=r"pip install 'attnbench\[report\]'"):
            needs()


def test_the_command(attnbench: Attnbench, tmp_path: Path) -> None:
    with Store.create(tmp_path / "run", run().header) as store:
        for own in run().records:
            store.append(own)
    where = ("--where", "d_model = 16", "--where", "backend <> 'mine'")
    told = attnbench(
        "report", "run", "--format", "csv", "--pivot", "seq_len×backend×forward_speedup", "--baseline", "sdpa", *where
    )
    assert told.stdout.splitlines() == ["seq_len,eager,sdpa", "256,0.25,1.0", "1024,oom(forward),1.0"]
    told = attnbench(
        "report", "run", "--format", "csv", "--columns", "backend, forward_ms", "--sort", "-forward_ms", *where
    )
    assert told.stdout.splitlines() == [
        "backend,forward_ms",
        "sdpa,2.0",
        "eager,1.0",
        "sdpa,0.25",
        "eager,oom(forward)",
    ]
    assert attnbench("report", "run", "--format", "parquet", "--out", "x.parquet").stdout == ""
    assert duckdb.execute(f"select count(*) from '{tmp_path / 'x.parquet'}'").fetchall() == [(7,)]
    assert attnbench("report", "run", "--columns", "backend", "--out", "x.md").stdout == ""
    assert (tmp_path / "x.md").read_text().startswith("| backend   |")
    for wrong in (("--format", "parquet"), ("--pivot", "seq_len"), ("--columns", ""), ("--where", "d_modl = 2")):
        done = attnbench("report", "run", *wrong)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
