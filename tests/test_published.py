"""Runs that come with attnbench: by name, from a checkout and from a wheel."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

import attnbench
from attnbench import machine
from attnbench.errors import RequestError
from attnbench.published import PLACES, PUBLISHED, joined
from attnbench.store import read_run
from conftest import Attnbench

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_run_is_all_that_its_directories_hold(name: str) -> None:
    found = attnbench.load(f"reference:{name}")
    parts = [read_run(ROOT / "results" / directory) for directory in PUBLISHED[name]]
    assert found.records == [record for _, records in parts for record in records]
    assert found.complete
    assert str(found.directory) == f"reference:{name}"
    assert len({record.cell_id for record in found.records}) == len(found.records), "no cell is in two of them"
    assert {record.backend for record in found.records} <= set(found.header.request["backends"])
    first = parts[0][0]
    for header, _ in parts[1:]:
        assert machine.difference(first.machine, header.machine) is None
        same = ("protocol", "clock", "warm_cache", "budget_s", "seed", "passes", "device")
        assert [header.request[key] for key in same] == [first.request[key] for key in same]


def test_headers_are_joined_key_by_key() -> None:
    whole = attnbench.load("reference:h200").header
    assert set(whole.request["grid"]["dtype"]) == {"bfloat16", "float32"}
    assert whole.request["grid"]["causal"] == [False]
    assert whole.request["shard"] == [1, 1]
    one = replace(whole, ceilings={"exp_per_s": 1.0})
    assert joined([one, one]).ceilings == {"exp_per_s": 1.0}
    assert joined([one, whole]).ceilings == {"reason": "each of these runs has its own"}
    assert joined([one, one]).cells == 2 * one.cells


@pytest.mark.parametrize("name", ["reference:", "reference:h20", "reference:../h200", "reference:h2000"])
def test_an_unknown_name_tells_what_there_is(name: str) -> None:
    with pytest.raises(
        RequestError, match=r"published run .* there are: reference:h200, reference:h200-bf16, ref"
    ) as no:
        attnbench.load(name)
    assert len(str(no.value).splitlines()) == 1


def test_an_installation_without_them_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("attnbench.published.PLACES", (tmp_path,))
    with pytest.raises(RequestError, match="lacks its published run seed-bf16-h200"):
        attnbench.load("reference:h200")


def test_runs_of_other_machines_are_compared_with_a_warning_or_not_at_all(attnbench: Attnbench) -> None:
    shape = ("--batch", "8", "--seq-len", "256", "--d-model", "16", "--dtype", "float32", "--precision", "ieee")
    quick = ("--backend", "eager", "--device", "cpu", "--budget", "0.05", "--pass", "forward", "--quiet")
    assert attnbench("run", *shape, *quick, "--out", "same").returncode == 0
    told = attnbench("compare", "reference:h200", "same")
    assert "WARNING: The machines differ: " in told.stdout
    assert "gpus was [{'name': " in told.stdout
    assert attnbench("run", *shape, "--heads", "2", *quick, "--out", "other").returncode == 0
    told = attnbench("compare", "reference:h200", "other")
    assert told.returncode == 2
    assert "reference:h200 and other have no cell in common" in told.stderr
    told = attnbench("run", "--resume", "--out", "reference:h200")
    assert (told.returncode, told.stdout) == (2, "")
    assert "is a published run" in told.stderr


def test_the_wheel_carries_them(tmp_path: Path) -> None:
    """Built from the checkout, unpacked elsewhere: the names load there, and nothing of the checkout is looked at."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    named = {directory for directories in PUBLISHED.values() for directory in directories}
    assert {Path(source).parent.name for source in listed["force-include"]} == named, "pyproject.toml lists them all"
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", tmp_path / "dist"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import attnbench, sys; print(attnbench.__file__, len(attnbench.load('reference:h200').records))"
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    where, count = told.stdout.split()
    assert Path(where).is_relative_to(tmp_path / "site")
    assert int(count) == len(attnbench.load("reference:h200").records)
    assert PLACES[1] == ROOT / "results"
    assert not (tmp_path / "results").exists()
