from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from attnbench.case import Case
from attnbench.errors import RequestError
from attnbench.record import Record
from attnbench.report import BINARY, FORMATS, full, render
from attnbench.report.tables import WRITERS
from attnbench.result import Result
from attnbench.store import Header
from conftest import DATA, record, small

MACHINE = {
    "hostname": "h", "system": "Linux x86_64", "kernel": "6", "cpu": "A CPU", "physical_cores": 2, "memory_MiB": 1000,
    "python": "3.11", "packages": {"torch": "2.13.0"}, "gpus": [], "driver": None, "software": {"cuda": None},
}  # fmt: skip


def result(records: list[Record]) -> Result:
    backends = list(dict.fromkeys(one.backend for one in records))
    request = {"device": "cpu", "protocol": "default", "budget_s": 1.0, "seed": 0, "backends": backends}
    return Result(Path("run"), Header("r", "now", request, MACHINE, "0.1.0", len(records)), records)


def seed_rows() -> list[list[str]]:
    lines = (DATA / "seed_results.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[5:25]]


def seed_case(d_model: int, seq_len: int) -> Case:
    return Case(8, 1, 1, seq_len, seq_len, d_model)


def test_the_seed_layout_is_the_seeds_document() -> None:
    """From records with the seed's own numbers, its document letter for letter, but for a stray blank and the last newline."""
    records = [
        record(seed_case(int(d), int(n)), "naive", forward_ms=float(forward), backward_ms=float(backward))
        for d, n, forward, backward, _ in seed_rows()
    ]
    seed = (DATA / "seed_results.md").read_text().replace("\n |   seq_len", "\n|   seq_len")
    assert render(result(records), layout="seed") == seed + "\n"
    assert render(result(records[::-1]), layout="seed") == seed + "\n", "whatever order the cells ended in"


def test_the_seed_layout_shows_failures_by_their_status() -> None:
    records = [
        record(seed_case(16, 256), forward_ms=0.25, backward_ms=1.5),
        record(seed_case(16, 16384), status="oom", phase="backward"),
    ]
    lines = render(result(records), layout="seed").splitlines()
    assert lines[3] == "|   d_model |   seq_len |   forward_ms |   backward_ms | status        |"
    assert lines[6] == "|        16 |     16384 |              |               | oom(backward) |"


def test_the_seed_layout_refuses_what_it_cannot_show() -> None:
    with pytest.raises(RequestError, match="choose by --backend one of: eager, naive"):
        render(result([record(), record(backend="naive")]), layout="seed")
    with pytest.raises(RequestError, match="but causal is False, True"):
        render(result([record(), record(small(causal=True))]), layout="seed")
    assert "64" in render(result([record(), record(backend="naive")]), layout="seed", backend="naive")


def sweep() -> list[Record]:
    def one(backend: str, seq_len: int, speed: float, **outcome: object) -> Record:
        ok = {"forward_ms": seq_len / speed, "backward_ms": 2 * seq_len / speed, "backward_peak_MiB": 3.5}
        case = small(seq_len=seq_len, kv_len=seq_len)
        return record(case, backend, **(ok if outcome.get("status", "ok") == "ok" else {}) | outcome)

    return [
        one("eager", 256, 100),
        one("eager", 1024, 100),
        one("eager", 4096, 100, status="oom", phase="forward", reason="too big"),
        one("sdpa", 256, 200, kernels_forward=("pytorch_flash::flash_fwd_kernel",)),
        one("sdpa", 1024, 400, kernels_forward=("fmha_cutlassF_f32",)),
        one("sdpa", 4096, 400, kernels_forward=("fmha_cutlassF_f32",)),
        one("mine", 256, 1, status="incorrect", reason="dq is off by 2"),
        one("mine", 1024, 1, status="crash", reason="SIGSEGV | a", tags=("few_samples",)),
        one("mine", 4096, 1, status="unsupported", reason="only up to 2048"),
    ]


def table(text: str, heading: str) -> list[list[str]]:
    """The rows of the first table after a heading."""
    lines = text[text.index(heading) :].splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")])
    return [rows[0], *rows[2:]]


def test_the_full_layout_answers_what_a_reader_asks() -> None:
    text = render(result(sweep()))
    assert "9 of 9 cells: 1 crash, 1 incorrect, 5 ok, 1 oom, 1 unsupported." in text
    assert ["mine", "crash", "SIGSEGV ¦ a", "1"] in table(text, "9 of 9 cells")
    assert table(text, "### How far each got")[1:] == [
        ["eager", "1024, then oom(forward)"],
        ["sdpa", "4096 (all)"],
        ["mine", "incorrect"],
    ]
    assert table(text, "### What sdpa chose")[1:] == [["256", "flash"], ["1024", "efficient"], ["4096", "efficient"]]
    assert table(text, "### Speed-up over eager")[1:] == [
        ["sdpa", "256", "2.00 / 2.00"],
        ["sdpa", "1024", "4.00 / 4.00"],
    ]
    assert table(text, "### Forward (ms) by seq_len")[1:] == [
        ["256", "2.56"],
        ["1024", "10.24"],
        ["4096", "oom(forward)"],
    ]
    assert table(text, "### Peak memory (MiB)")[1:] == [["256", "3.5"], ["1024", "3.5"], ["4096", "oom(forward)"]]


def test_a_failed_baseline_costs_no_other_backend_its_numbers() -> None:
    text = render(result(sweep()))
    cells = {(row[0], row[2]): row for row in table(text, "### Cells")[1:]}
    assert len(cells) == 9
    assert cells["sdpa", "4096"][3:6] == ["ok", "10.24", "20.48"]
    assert cells["mine", "256"][3:6] == ["incorrect", "", ""]
    assert "nan" not in text.lower()


def test_the_limit_and_what_bounds_it_are_shown_and_launch_bound_cells_with_both_times() -> None:
    near = {"limit_forward": 0.714, "limit_backward": 0.25, "bound_by": "matmul", "forward_ms": 1.0}
    host = {"tags": ("launch_bound",), "call_forward_ms": 0.09, "device_forward_ms": 0.0081}
    run = result([record(small(seq_len=4096, kv_len=4096), **near), record(small(), "sdpa", **host)])
    header = replace(
        run.header, ceilings={"exp_per_s": 4e12, "matmul_flop_per_s": {"tf32": 4e14}}, seconds={"timing": 7}
    )
    text = render(replace(run, header=header))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["4096", "71.4% / 25.0%"] in rows
    assert ["4096", "matmul"] in rows
    assert ["64", "16", "sdpa", "0.09", "0.0081", "launch_bound"] in [[x for x in row if x] for row in rows]
    assert ["ceilings", "tf32 400 TFLOP/s, exp 4000 G/s"] in rows
    assert ["wall time, s", "timing 7"] in rows
    assert any(row[0] == "launch_bound" and row[-1] == "1" for row in rows), "each tag is explained"


def test_ceilings_that_could_not_be_measured_say_why() -> None:
    run = result([record(forward_ms=1.0)])
    text = render(replace(run, header=replace(run.header, ceilings={"reason": "no memory"})))
    assert "not known: no memory" in text
    assert "Fraction of the limit" not in text


def test_groups_of_cases_have_sections_of_their_own() -> None:
    records = [record(small(causal=causal, kv_len=kv_len)) for causal in (False, True) for kv_len in (64, 128)]
    text = render(result(records))
    headings = [line for line in text.splitlines() if line.startswith("## float32")]
    assert sorted(headings) == [
        "## float32 (ieee), batch 1, 2 heads, 128 keys, causal",
        "## float32 (ieee), batch 1, 2 heads, 128 keys, no mask",
        "## float32 (ieee), batch 1, 2 heads, causal",
        "## float32 (ieee), batch 1, 2 heads, no mask",
    ]


def test_csv_and_json_hold_every_field() -> None:
    records = [*sweep(), record(forward_samples_ms=(0.1, 0.2), tags=("few_samples", "noisy"))]
    rows = list(csv.DictReader(io.StringIO(render(result(records), "csv"))))
    assert list(rows[0]) == list(Record.__dataclass_fields__)
    assert json.loads(rows[-1]["forward_samples_ms"]) == [0.1, 0.2]
    assert rows[2]["status"] == "oom"
    assert rows[2]["forward_ms"] == ""
    assert [Record.from_dict(values) for values in json.loads(render(result(records), "json"))] == records


def test_latex_is_booktabs_with_its_specials_escaped() -> None:
    text = render(result(sweep()), "latex")
    assert text.count("\\toprule") == text.count("\\bottomrule") > 3
    assert "\\subsection*{float32 (ieee), batch 1, 2 heads, no mask}" in text
    assert "seq\\_len" in text


class Page(HTMLParser):
    """Checks that tags close in order; collects text and what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.fetched = "", [""][:0]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_tables_in_html_are_a_page_of_its_own_with_what_users_wrote_escaped() -> None:
    run = result([*sweep(), record(backend="<script>.py:f", status="error", reason="a < b & c")])
    page = Page()
    page.feed(WRITERS["html"].page(full.document(run, WRITERS["html"])))
    page.close()
    assert not page.open
    assert not page.fetched
    assert "a < b & c" in page.text
    assert "<script>.py:f" in page.text
    assert "Speed-up over eager" in page.text


def test_what_cannot_be_rendered_is_refused() -> None:
    with pytest.raises(RequestError, match="there are: markdown, html, csv, json, latex"):
        render(result(sweep()), "docx")
    with pytest.raises(RequestError, match="did you mean 'seed'"):
        render(result(sweep()), layout="sede")
    with pytest.raises(RequestError, match="backend 'flex' is not in run; it has: eager, sdpa, mine"):
        render(result(sweep()), backend="flex")


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in BINARY])
def test_a_run_without_records_is_rendered_too(format: str) -> None:  # noqa: A002
    assert isinstance(render(result([]), format), str)
