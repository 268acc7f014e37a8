"""Everything outside the worker process works without loading torch, and loads fast."""

from __future__ import annotations

import subprocess
import sys

import pytest

from attnbench import cli

OUTSIDE = [
    "attnbench",
    *(f"attnbench.cli.{name}" for name in cli.COMMANDS),
    "attnbench.api",
    "attnbench.runner",
    "attnbench.report",
    "attnbench.report.charts",
    "attnbench.report.html",
    "attnbench.plan",
    "attnbench.store",
    "attnbench.tags",
    "attnbench.limits",
    "attnbench.doctor",
    "attnbench.calibration",
    "attnbench.analysis.compare",
    "attnbench.analysis.history",
    "attnbench.analysis.recommend",
    "attnbench.families",
    "attnbench.analysis.select",
    "attnbench.analysis.sql",
    "attnbench.published",
    "attnbench.report.terminal",
]
INSIDE = ["attnbench.worker", "attnbench.bench", "attnbench.reference", "attnbench.inputs", "attnbench.backends.sdpa"]


def loads_torch(module: str) -> bool:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return told.stdout.strip() == "True"


@pytest.mark.parametrize("module", OUTSIDE)
def test_it_loads_no_torch(module: str) -> None:
    assert not loads_torch(module)


def loaded(code: str) -> set[str]:
    code = f"import sys\n{code}\nprint(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(told.stdout.splitlines()[-1].split())


def test_help_starts_with_next_to_nothing_loaded() -> None:
    modules = loaded("from attnbench.cli import cli; cli.main(['--help'], standalone_mode=False)")
    own = {name for name in modules if name.startswith("attnbench")}
    assert own == {"attnbench", "attnbench.cli", "attnbench.cli.console", "attnbench.errors"}
    assert not modules & {"cattrs", "psutil", "subprocess", "tabulate"}


def test_a_worker_starts_without_what_makes_reports() -> None:
    modules = loaded("import attnbench.worker")
    assert "attnbench.bench" in modules
    assert not {
        name for name in modules if name.startswith(("attnbench.report", "attnbench.cli", "attnbench.analysis"))
    }


@pytest.mark.parametrize("module", INSIDE)
def test_the_test_above_can_fail(module: str) -> None:
    assert loads_torch(module)


HEAVY = {"altair", "vl_convert", "jinja2", "pandas", "scipy", "duckdb"}


def test_libraries_for_reports_are_loaded_only_where_they_are_used() -> None:
    commands = ", ".join(f"attnbench.cli.{name}" for name in cli.COMMANDS)
    assert not HEAVY & loaded(f"import {commands}, attnbench.report.html, attnbench.report.figures")


def test_that_test_can_fail() -> None:
    drawn = "from attnbench.report.charts import Subject, spec; spec('time', Subject.of([], [], None))"
    assert "altair" in loaded(drawn)


def test_the_public_names_are_sorted_and_there() -> None:
    import attnbench

    assert attnbench.__all__ == sorted(attnbench.__all__, key=lambda name: (name.islower(), name))
    assert all(hasattr(attnbench, name) for name in attnbench.__all__)


def test_a_name_that_is_not_public_is_no_attribute() -> None:
    import attnbench

    assert set(attnbench.__all__) <= set(dir(attnbench))
    with pytest.raises(AttributeError, match="has no attribute 'benchmark'"):
        attnbench.benchmark  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
