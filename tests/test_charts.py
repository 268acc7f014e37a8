"""Charts as files: what they show is read back from the SVG, whose marks say what they stand for."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from attnbench.errors import MissingLibrary, RequestError
from attnbench.record import Record
from attnbench.report.charts import CHARTS, Subject, spec
from attnbench.report.figures import Figure, capacity_MiB, draw
from attnbench.report.groups import telling_apart
from attnbench.report.themes import COLOURS, DASHES, SHAPES
from conftest import Attnbench
from synthetic import HOSTILE, case_of, failed, kept, made, run_of, small_run


@pytest.fixture(scope="module")
def run() -> Any:
    return run_of([one for one in small_run().records if not one.causal])


def svg(run: Any, chart: str, **options: Any) -> ElementTree.Element:
    return ElementTree.fromstring(draw(run, Figure(chart, **options), "svg"))


def points(drawing: ElementTree.Element, kind: str = "point") -> list[dict[str, str]]:
    """What the marks of a kind say of themselves."""
    marks = [mark for mark in drawing.iter() if mark.get("aria-roledescription") == kind]
    return [dict(part.split(": ", 1) for part in (mark.get("aria-label") or "").split("; ")) for mark in marks]


def texts(drawing: ElementTree.Element) -> list[str]:
    return [mark.text or "" for mark in drawing.iter() if mark.tag.endswith("}text")]


def cells(records: Sequence[Record], status: str = "ok") -> list[tuple[str, int]]:
    return sorted((one.backend, one.seq_len) for one in records if (one.status == "ok") == (status == "ok"))


@pytest.mark.parametrize("timed", ["forward", "backward", "step"])
def test_a_cell_gives_a_point_if_and_only_if_it_is_ok(run: Any, timed: str) -> None:
    numbers = {
        "forward_ms": 1.0,
        "backward_ms": 1.0,
        "forward_backward_ms": 1.0,
    }  # as no failed cell has, or ever should
    told = run_of([one if one.status == "ok" else one.but(**numbers) for one in run.records])
    shown = sorted(
        (one["backend"], int(one["seq_len"].replace(",", ""))) for one in points(svg(told, "time", timed=timed))
    )
    assert shown == cells(run.records)
    assert len(cells(run.records, "not ok")) == 12, "else there is nothing to leave out"


def test_error_bars_are_the_uncertainty_of_the_median() -> None:
    case = case_of(256, 32)
    noisy = made("noisy", case, 1.0).but(forward_ms=1.0, forward_noise=0.25)
    spread = made("spread", case, 1.0).but(forward_ms=1.0, forward_noise=None, forward_iqr_ms=1.0)
    bars = [one for one in points(svg(run_of([noisy, spread]), "time"), "rule mark") if "high" in one]
    assert {one["backend"]: float(one["high"]) for one in bars} == {"noisy": 1.25, "spread": 1.5}


def test_the_floor_is_drawn_in_each_panel(run: Any) -> None:
    assert texts(svg(run, "time")).count("floor") == 2
    without = run_of([one.but(floor_forward_ms=None) for one in run.records])
    assert "floor" not in texts(svg(without, "time"))


def test_a_speed_up_is_the_baselines_time_over_the_backends(run: Any) -> None:
    shown = points(svg(run, "speedup", baseline="slow"))
    title = "times as fast as the baseline"
    assert {one["backend"] for one in shown} == {"fast", "twin"}
    assert [float(one[title]) for one in shown if one["backend"] == "fast"] == pytest.approx([3] * 6, rel=0.01)
    slower = points(svg(run, "speedup", baseline="fast"))
    assert [float(one[title]) for one in slower if one["backend"] == "slow"] == pytest.approx([1 / 3] * 6, rel=0.01)


def test_memory_has_the_device_and_the_first_length_that_ran_out(run: Any) -> None:
    drawing = svg(run, "memory")
    assert texts(drawing).count("the device: 24 GiB") == 2
    named = [
        label
        for label in (one.get("aria-label") or "" for one in drawing.iter())
        if "8,192" in label or "8192" in label
    ]
    assert sum("backend: slow" in label for label in named) == 2, "one a panel, at the length that failed"
    assert all("backend: twin" not in label for label in named), "a time-out is not out of memory"


def test_the_memory_there_is_is_the_limit_where_one_was_asked_for(run: Any) -> None:
    assert capacity_MiB(run.header) == 24576
    assert capacity_MiB(run_of([], memory_limit_bytes=1 << 30).header) == 1024
    assert capacity_MiB(run_of([], device="cpu").header) == 1000
    assert capacity_MiB(run_of([], device="cuda:1").header) == 1000, "of a GPU that is not known, the machine's"


def test_the_limit_has_a_number_in_each_right_cell_and_a_word_in_the_others(run: Any) -> None:
    shown = texts(svg(run, "limit"))
    assert shown.count("4%") == 8, "0.4 of 10, for fast"
    assert shown.count("wrong") == 8
    assert shown.count("oom") == 2
    assert shown.count("time") == 2


def test_the_frontier_says_how_far_each_got_and_what_stopped_it(run: Any) -> None:
    shown = texts(svg(run, "frontier"))
    assert shown.count("4096, then oom(forward)") == 2
    assert shown.count("4096, then timeout") == 2
    assert shown.count("8192") == 2
    assert shown.count("incorrect") == 2, "where nothing ran, how the shortest failed"


@pytest.mark.parametrize("chart", CHARTS)
def test_what_users_name_stays_text(run: Any, chart: str) -> None:
    drawing = svg(run, chart, **({"baseline": "slow"} if chart == "speedup" else {}))
    assert not [mark for mark in drawing.iter() if mark.tag.endswith("}script")]
    assert any("</script><img" in text for text in texts(drawing))


def test_thirty_backends_look_each_its_own_way() -> None:
    lines = {(COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]) for i in range(30)}
    marks = {(COLOURS[i % len(COLOURS)], SHAPES[i % len(SHAPES)]) for i in range(30)}
    assert len(lines) == len(marks) == 30
    many = run_of([made(f"b{i}", case_of(256, 32), 1.0 + i) for i in range(30)])
    assert len({(one["backend"]) for one in points(svg(many, "time"))}) == 30


def test_a_chart_is_of_one_group_of_cases() -> None:
    with pytest.raises(
        RequestError, match=r"has 2 groups of them: .*causal.*; choose one by --where, such as --where \"(.*)\""
    ) as told:
        draw(small_run(), Figure("time"), "svg")
    condition = str(told.value).rpartition("--where ")[2].strip('"')
    shown = points(ElementTree.fromstring(draw(small_run(), Figure("time"), "svg", [condition])))
    assert len(shown) == len(cells(small_run().records)) / 2, "what it advises works"
    with pytest.raises(RequestError, match="no record is left"):
        draw(small_run(), Figure("time"), "svg", ["batch = 3"])


def test_groups_are_told_apart_by_whatever_they_differ_in() -> None:
    cases = [
        case_of(64, 32),
        case_of(64, 32, kv_len=128),
        case_of(64, 32, dtype="float32", precision="tf32", heads=4, kv_heads=2),
    ]
    assert telling_apart([failed("a", case, "oom") for case in cases]) == (
        "heads = 1 AND kv_heads = 1 AND dtype = 'bfloat16' AND precision = 'ieee' AND kv_len = 64"
    )


def test_figures_that_cannot_be_are_refused(run: Any) -> None:
    for options, message in (
        ({"chart": "tmie"}, "did you mean 'time'"),
        ({"chart": "time", "timed": "both"}, "there are: forward, backward, step"),
        ({"chart": "frontier", "timed": "forward"}, "of no pass"),
        ({"chart": "time", "baseline": "slow"}, "goes with --chart speedup"),
        ({"chart": "speedup", "baseline": "sluw"}, "did you mean 'slow'"),
        ({"chart": "speedup", "baseline": HOSTILE}, "is ok in no cell"),
    ):
        with pytest.raises(RequestError, match=message):
            draw(run, Figure(**options), "svg")
    with pytest.raises(RequestError, match="no cell that is ok has forward_ms"):
        draw(run_of([failed("a", case_of(256, 32), "oom")]), Figure("time"), "svg")
    with pytest.raises(RequestError, match="no other backend than a is ok"):
        draw(run_of([made("a", case_of(256, 32), 1.0)]), Figure("speedup"), "svg")
    with pytest.raises(RequestError, match="none was made yet"):
        draw(run_of([]), Figure("time"), "svg")


def test_a_missing_library_is_named_with_the_command_that_brings_it(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "vl_convert", None)
        with pytest.raises(MissingLibrary, match=r"needs vl-convert-python; .*pip install 'attnbench\[report\]'"):
            draw(run, Figure("time"), "svg")
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(MissingLibrary, match="a chart needs altair"):
        spec("time", Subject.of(run.records, [], None))


def test_the_command_writes_both_formats(attnbench: Attnbench, tmp_path: Path) -> None:
    directory = kept(small_run(), tmp_path / "run")
    told = attnbench("report", directory, "--format", "png", "--chart", "limit", "--where", "causal", "--out", "a.png")
    assert (told.returncode, told.stderr) == (0, "")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n")
    told = attnbench(
        "report", directory, "--format", "svg", "--chart", "time", "--where", "NOT causal", "--backend", "fast"
    )
    assert {one["backend"] for one in points(ElementTree.fromstring(told.stdout))} == {"fast"}


def test_the_command_refuses_in_one_line(attnbench: Attnbench, tmp_path: Path) -> None:
    directory = kept(small_run(), tmp_path / "run")
    for words, message in (
        (("--format", "svg"), "give --chart time|speedup|memory|limit|frontier"),
        (
            ("--format", "svg", "--chart", "time", "--sort", "d_model"),
            "--sort make a table, and --format svg draws a chart",
        ),
        (("--chart", "time"), "--chart time goes with --format svg or png, and the format is markdown"),
        (("--format", "svg", "--chart", "time"), "choose one by --where"),
        (
            ("--format", "png", "--chart", "time", "--where", "causal", "--out", "no/such/folder.png"),
            "cannot be written",
        ),
    ):
        told = attnbench("report", directory, *words)
        assert (told.returncode, told.stdout) == (2, "")
        assert message in told.stderr
        assert told.stderr.count("\n") == 1


def test_a_png_is_not_written_to_a_terminal(tmp_path: Path) -> None:
    directory = kept(small_run(), tmp_path / "run")
    ours, theirs = pty.openpty()
    words = ["report", str(directory), "--format", "png", "--chart", "time", "--where", "causal"]
    told = subprocess.run(
        [sys.executable, "-m", "attnbench", *words], stdout=theirs, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(theirs)
    os.close(ours)
    assert told.returncode == 2
    assert re.fullmatch(r"attnbench: a png is nothing for a terminal; .*--out FILE.*\n", told.stderr)
