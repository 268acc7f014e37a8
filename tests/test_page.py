"""The page as text: what it holds, that it holds it whole, and that nothing in it gets out. Browsers come in test_browser."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from typing import Any

import pytest

from attnbench.cli.options import request_from
from attnbench.cli.run import command as run_command
from attnbench.grid import Grid
from attnbench.record import Record
from attnbench.report import documents, render, repeat
from attnbench.report.answers import answers
from attnbench.report.html import page
from attnbench.report.page_data import LEAST_SAMPLES, MOST_SAMPLES, page_data, script_json
from attnbench.request import Request
from synthetic import HOSTILE, case_of, failed, large_run, made, run_of, small_run


@pytest.fixture(scope="module")
def small() -> str:
    return page(small_run())


def cells_of(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(data["fields"], row, strict=True)) for row in data["cells"]]


def embedded(text: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert match
    return json.loads(match[1])


def test_nothing_that_a_user_named_ends_a_script_or_begins_an_element(small: str) -> None:
    text = small
    assert HOSTILE not in text
    assert "<img" not in text
    assert text.count("<script") == text.count("</script>") == 3
    assert HOSTILE in embedded(text)["backends"]
    assert script_json({"a": HOSTILE}).isascii()
    assert json.loads(script_json({"a": HOSTILE})) == {"a": HOSTILE}


def test_nothing_is_fetched(small: str) -> None:
    before_data = small[: small.index('id="data"')]
    links = re.findall(r'(?:src|href)="([^"]*)"', before_data)
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "default-src 'none'" in before_data, "whatever a library might try"
    assert not re.search(r"@import|url\(", before_data)


def test_every_record_is_there_with_its_numbers(small: str) -> None:
    run = small_run()
    cells = {cell["cell_id"]: cell for cell in cells_of(embedded(small))}
    assert len(cells) == len(run.records) == 64
    for record in run.records:
        cell = cells[record.cell_id]
        assert (cell["status"], cell["backend"], cell["reason"]) == (record.status, record.backend, record.reason)
        if record.status == "ok":
            assert cell["forward_ms"] == pytest.approx(record.forward_ms, rel=1e-5)
            assert cell["samples"][0][0] == len(record.forward_samples_ms)
            assert cell["samples"][0][1] == pytest.approx(record.forward_samples_ms, rel=1e-3)
        else:
            assert cell["forward_ms"] is cell["limit_forward"] is None
        assert cell["tolerance"] == 6e-2


def test_of_many_samples_a_page_keeps_a_part_from_first_to_last() -> None:
    run = run_of([made("a", case_of(256, 32), 1.0, samples=1000) for _ in range(1)])
    count, kept = cells_of(page_data(run))[0]["samples"][0]
    assert (count, len(kept)) == (1000, 1000)
    record = run.records[0]
    many = run_of([record.but(cell_id=f"{record.cell_id}{i}") for i in range(2000)])
    count, kept = cells_of(page_data(many))[0]["samples"][0]
    assert count == 1000
    assert LEAST_SAMPLES <= len(kept) <= MOST_SAMPLES // 6000
    assert kept[0] == pytest.approx(record.forward_samples_ms[0], rel=1e-3)


def test_the_fastest_is_told_with_its_margin_and_a_tie_as_a_tie() -> None:
    told = {(one.group, one.seq_len, one.d_model, one.what): one for one in answers(small_run())}
    assert len(told) == 2 * 8 * 3
    for one in told.values():
        assert one.backend == "fast"
        assert one.tied == ()
        if one.seq_len < 8192:
            assert one.margin == pytest.approx(2, rel=0.05)
        else:
            assert one.runner_up is None, "all others failed there"
    without = run_of([one for one in small_run().records if one.backend != "fast"])
    tied = [one for one in answers(without) if one.seq_len < 8192]
    assert all(sorted(one.tied) == ["slow", "twin"] for one in tied)
    assert all(one.backend is None for one in answers(without) if one.seq_len == 8192)


def test_under_the_seeds_protocol_backward_keeps_its_name() -> None:
    run = run_of([made("a", case_of(256, 32), 1.0).but(forward_backward_ms=None)], protocol="seed")
    assert {(one.what, round(one.ms or 0)) for one in answers(run)} == {("forward", 1), ("backward", 2)}
    assert page_data(run)["passes"] == ["forward", "backward"]


CASES = [
    case_of(256, 32),
    case_of(512, 64, kv_len=700, causal=True),
    case_of(64, 16, heads=8, kv_heads=2, dtype="float32", precision="tf32"),
    case_of(64, 16, dtype="float16"),
]
REQUESTS: list[dict[str, Any]] = [
    {"device": "cuda:1", "graph": True, "warm_cache": True, "clock": "burst", "budget_s": 2.5},
    {"device": "cpu", "passes": "forward", "seed": 7, "timeout_s": 12.5, "memory_limit_bytes": 3 << 30},
    {"device": "cpu", "protocol": "seed"},
]


@pytest.mark.parametrize("settings", REQUESTS)
@pytest.mark.parametrize("case", CASES)
def test_the_command_of_a_cell_measures_that_cell_again(case: Any, settings: dict[str, Any]) -> None:
    asked = Request(Grid(), "seed", ("sdpa",), {}, **settings)
    record = Record.of(case, "sdpa", run_id="r", device="cpu", status="ok")
    words = shlex.split(f"{repeat.of_cell(record, asked.to_dict())} {repeat.of_run(asked.to_dict())}")
    assert words[:2] == ["attnbench", "run"]
    again = request_from(run_command.make_context("run", words[2:]).params)
    assert again.cases() == [case]
    difference = asked.difference(again)
    assert difference
    assert re.fullmatch(r"grid was .*", difference), difference
    assert ";" not in difference.partition("and is")[2], "nothing but the grid differs"


def test_a_decorated_function_is_named_by_its_place() -> None:
    record = failed("mine", case_of(64, 16), "error")
    assert "--backend 'my file.py:f'" in repeat.of_cell(record, {"sources": {"mine": "my file.py:f"}})


@pytest.mark.parametrize("library", ["jinja2", "vl_convert", "altair"])
def test_without_the_libraries_a_run_still_leaves_its_tables(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    written, missing = documents(small_run(), "full")
    assert missing
    assert re.search(r"needs (jinja2|vl_convert|altair); install it by: pip install 'attnbench\[report\]'", missing)
    assert "Speed-up" not in written["report.html"]
    assert "How far each got" in written["report.html"]
    assert "pip install" in written["report.html"]
    assert "How far each got" in written["report.md"]


def test_with_the_libraries_it_leaves_the_page(small: str) -> None:
    written, missing = documents(small_run(), "full")
    assert missing is None
    assert written["report.html"] == small
    assert "<table" in documents(run_of(small_run().records[:1]), "seed")[0]["report.html"]


def test_a_run_without_records_has_a_page_too() -> None:
    assert embedded(page(run_of([])))["cells"] == []


def test_five_thousand_records_take_seconds() -> None:
    run = large_run()
    began = time.process_time()
    text = render(run, "html")
    assert time.process_time() - began < 10
    assert len(embedded(text)["cells"]) == 5000
    assert len(text) < 12e6
