"""docs/kernel_charts.py: whom ours is held against, and that the page and its charts show that."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import attnbench
from attnbench.case import Case
from attnbench.errors import RequestError
from attnbench.record import STATUSES, Record
from synthetic import case_of, failed, kept, made, run_of

DOCS = Path(__file__).resolve().parent.parent / "docs"
SCRIPT = runpy.run_path(str(DOCS / "kernel_charts.py"))
CASE = case_of(1024, 64)


def timed(backend: str, forward_ms: float, backward_ms: float | None, case: Case = CASE, **outcome: Any) -> Record:
    times = {"forward_ms": forward_ms, "backward_ms": backward_ms}
    return made(backend, case, forward_ms).but(**times | {"floor_forward_ms": 0.5, "floor_backward_ms": 1.5} | outcome)


def ours(forward_ms: float = 2.0, backward_ms: float | None = 6.0, case: Case = CASE, **outcome: Any) -> Record:
    return timed("attnbench", forward_ms, backward_ms, case, **outcome)


def both(*records: Record) -> Any:
    """The entries of the forward and the backward of a lone shape."""
    forward, backward = SCRIPT["entries"](records)
    assert (forward.timed, backward.timed) == ("forward", "backward")
    return forward, backward


def labels(svg: str, kind: str = "point") -> list[str]:
    """What the marks of a kind say of themselves."""
    marks = ElementTree.fromstring(svg).iter()
    return [mark.get("aria-label") or "" for mark in marks if mark.get("aria-roledescription") == kind]


def test_the_peer_is_the_fastest_of_each_pass() -> None:
    forward, backward = both(ours(), timed("a", 3.0, 5.0), timed("b", 2.5, 8.0), timed("c", 4.0, 9.0))
    assert (forward.peer, forward.peer_ms) == ("b", 2.5)
    assert (backward.peer, backward.peer_ms) == ("a", 5.0)


@pytest.mark.parametrize("status", [status for status in STATUSES if status != "ok"])
def test_who_is_not_right_is_no_peer_however_fast(status: Any) -> None:
    forward, backward = both(ours(), timed("wrong", 0.1, 0.1, status=status), timed("right", 2.5, 8.0))
    assert (forward.peer, backward.peer) == ("right", "right")


def test_without_a_time_of_a_pass_nobody_is_its_peer() -> None:
    forward, backward = both(ours(), timed("a", 1.0, None), timed("b", 2.5, 8.0))
    assert (forward.peer, backward.peer) == ("a", "b")
    (alone,) = SCRIPT["entries"]([ours(2.0, None), timed("a", 1.0, None)])
    assert alone.timed == "forward"


def test_ratios_are_ours_over_the_peers_and_the_floor_over_ours() -> None:
    forward, backward = both(ours(2.0, 6.0), timed("a", 2.5, 4.0))
    assert (forward.ratio, forward.of_floor) == (0.8, 0.25)
    assert (backward.ratio, backward.of_floor) == (1.5, 0.25)


def test_the_floor_is_that_of_ours_and_not_of_one_that_keeps_its_scores() -> None:
    _, backward = both(ours(), timed("a", 2.5, 4.0, floor_backward_ms=1.0))
    assert backward.floor_ms == 1.5
    _, backward = both(failed("attnbench", CASE, "oom"), timed("a", 2.5, 4.0, floor_backward_ms=1.0))
    assert backward.floor_ms == 1.0


def test_gaps_between_kernels_count() -> None:
    forward, _ = both(ours(device_forward_ms=1.0), timed("gaps", 3.0, 8.0, device_forward_ms=0.5))
    assert (forward.ours_ms, forward.peer_ms) == (2.0, 3.0)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_a_row_for_each_shape() -> None:
    longer, third, last = case_of(4096, 64), case_of(256, 128), case_of(1024, 128)
    records = [
        *(ours(), timed("a", 2.5, 4.0)),
        *(ours(1.25, 3.0, longer), timed("a", 12.5, 4.0, longer)),
        *(failed("attnbench", third, "oom", phase="backward"), timed("a", 0.00456, 0.1, third)),
        *(ours(case=last), timed("a", 1.0, 1.0, last, status="incorrect")),
        timed("a", 1.0, 1.0, case_of(4096, 128)),
    ]
    head, _, *rows = SCRIPT["table"](SCRIPT["entries"](records)).splitlines()
    columns = ["best peer", "ours / peer", "of the floor"]
    assert cells(head) == ["d_model", "seq_len", "forward, ms", *columns, "backward, ms", *columns]
    assert [cells(row) for row in rows] == [
        ["64", "1024", "2", "2.5 `a`", "0.80", "25%", "6", "4 `a`", "1.50", "25%"],
        ["64", "4096", "1.25", "12.5 `a`", "0.10", "40%", "3", "4 `a`", "0.75", "50%"],
        ["128", "256", "oom(backward)", "0.00456 `a`", "–", "–", "oom(backward)", "0.1 `a`", "–", "–"],
        ["128", "1024", "2", "–", "–", "25%", "6", "–", "–", "25%"],
        ["128", "4096", "–", "1 `a`", "–", "–", "–", "1 `a`", "–", "–"],
    ]


def test_a_chart_has_a_point_for_each_time_that_is_right() -> None:
    records = [
        *(ours(), timed("a", 2.5, 4.0), timed("wrong", 0.1, 0.1, status="incorrect")),
        *(failed("attnbench", case_of(4096, 64), "incorrect"), timed("a", 12.5, 24.0, case_of(4096, 64))),
    ]
    (svg,) = SCRIPT["images"]([run_of(records)]).values()
    assert sorted(labels(svg)) == [
        "attnbench, backward, d_model 64, seq_len 1024: 6 ms",
        "attnbench, forward, d_model 64, seq_len 1024: 2 ms",
        "fastest other, backward, d_model 64, seq_len 1024: 4 ms",
        "fastest other, backward, d_model 64, seq_len 4096: 24 ms",
        "fastest other, forward, d_model 64, seq_len 1024: 2.5 ms",
        "fastest other, forward, d_model 64, seq_len 4096: 12.5 ms",
    ]
    assert sum(label.startswith("floor") for label in labels(svg, "line mark")) == 2
    words = {mark.text for mark in ElementTree.fromstring(svg).iter() if mark.tag.endswith("}text")}
    titles = {"forward ms", "backward ms", "A GPU, bfloat16, batch 8, 1 head, no mask"}
    assert titles <= words


def test_series_differ_without_their_colours() -> None:
    for looks in ("COLOUR", "DASH", "SHAPE"):
        assert set(SCRIPT[looks]) == {"attnbench", "fastest other", "floor"}
        assert len(set(SCRIPT[looks].values())) == 3


def test_an_image_is_of_dtype_precision_and_mask() -> None:
    cases = [
        case_of(256, 64),
        case_of(256, 64, causal=True),
        case_of(256, 64, dtype="float32", precision="tf32"),
        case_of(256, 64, dtype="float32", causal=True),
        case_of(256, 64, dtype="float16"),
    ]
    without = timed("a", 1.0, 1.0, case_of(256, 64, dtype="float16", causal=True))
    runs = [run_of([ours(case=case) for case in cases]), run_of([without])]
    assert sorted(SCRIPT["images"](runs)) == [
        *("kernels-bfloat16-causal.svg", "kernels-bfloat16.svg", "kernels-float16.svg"),
        *("kernels-float32-ieee-causal.svg", "kernels-float32-tf32.svg"),
    ]


def test_runs_that_cannot_stand_side_by_side_are_refused() -> None:
    run = run_of([ours()])
    for runs, message in (
        ([run_of([timed("a", 1.0, 1.0)])], "none of the runs has a record of attnbench"),
        ([run_of([])], "none of the runs has a record of attnbench"),
        ([run, run], r"b8\.h1\..*\.attnbench is in 2 of the runs"),
        ([run, run_of([timed("a", 1.0, 1.0)], protocol="seed")], "differ in device, protocol, clock, warm_cache"),
        ([run, run_of([timed("a", 1.0, 1.0)], device="cpu")], "differ in device"),
        ([run_of([ours(), ours(case=case_of(1024, 64, batch=4))])], "an image is of one batch"),
    ):
        with pytest.raises(RequestError, match=message):
            SCRIPT["compared"](runs)


def test_the_script_writes_the_page_and_its_charts(tmp_path: Path) -> None:
    docs, results = tmp_path / "docs", tmp_path / "results"
    docs.mkdir()
    script = shutil.copy(DOCS / "kernel_charts.py", docs)
    blank = f"# Ours\n\n{SCRIPT['START']}stale\n{SCRIPT['END']}\n\nThe rest.\n"
    (docs / "kernels.md").write_text(blank)
    half = timed("half", 1.0, 1.0)
    runs = [kept(run_of([ours()]), results / "one"), kept(run_of([half]), results / "two")]

    def make(*args: Path) -> str:
        code = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__'); print('torch' in sys.modules)"
        command = [sys.executable, "-c", code, script, *args]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        return told.stdout + told.stderr

    assert make(*runs) == "False\n", "it loads no torch"
    page = (docs / "kernels.md").read_text()
    assert page.startswith(f"# Ours\n\n{SCRIPT['START']}A GPU; [one](../results/one/report.md), [two](../results/two/")
    assert page.endswith(f"</details>\n{SCRIPT['END']}\n\nThe rest.\n")
    assert re.findall(r"\((img/.*)\)", page) == ["img/kernels-bfloat16.svg"]
    assert len(labels((docs / "img/kernels-bfloat16.svg").read_text())) == 4
    (docs / "kernels.md").write_text(page.replace("`half`", "`whole`"))
    assert make() == "False\n"
    assert (docs / "kernels.md").read_text() == page, "it keeps the runs that it names"
    told = make(kept(run_of([ours()]), tmp_path / "elsewhere"))
    assert "and these are elsewhere: " in told
    assert "Traceback" not in told


def test_the_page_and_its_charts_are_of_the_runs_that_it_names() -> None:
    page = (DOCS / "kernels.md").read_text("utf-8")
    runs = [attnbench.load(SCRIPT["RESULTS"] / name) for name in SCRIPT["named"](page)]
    assert SCRIPT["written"](page, runs) == page, "stale; run: python docs/kernel_charts.py"
    drawn = SCRIPT["images"](runs)
    assert {path.name for path in (DOCS / "img").glob("kernels-*.svg")} == set(drawn)
    for name, svg in drawn.items():
        assert labels((DOCS / "img" / name).read_text("utf-8")) == labels(svg), (
            "stale; run: python docs/kernel_charts.py"
        )


def test_a_stale_page_is_told() -> None:
    page = (DOCS / "kernels.md").read_text("utf-8")
    run = replace(run_of([ours(), timed("a", 2.5, 4.0)]), directory=SCRIPT["RESULTS"] / "made")
    full = SCRIPT["written"](page, [run])
    assert SCRIPT["named"](full) == ["made"]
    assert SCRIPT["written"](full.replace("| 0.80 ", "| 0.79 "), [run]) == full != full.replace("| 0.80 ", "| 0.79 ")
    empty = SCRIPT["written"](full, [])
    assert SCRIPT["START"] + SCRIPT["END"] in empty, "without runs nothing is claimed"
