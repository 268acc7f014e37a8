"""Everything outside the worker process works without loading torch, and loads fast."""

from __future__ import annotations

import subprocess
import sys

import pytest

OUTSIDE = [
    "attnbench",
    "attnbench.cli",
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


def test_what_only_some_commands_need_is_loaded_by_none_at_the_start() -> None:
    heavy = {"duckdb", "pandas", "scipy"}
    code = f"import sys, attnbench.cli; print({heavy} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"


@pytest.mark.parametrize("module", INSIDE)
def test_the_test_above_can_fail(module: str) -> None:
    assert loads_torch(module)


HEAVY = {"altair", "vl_convert", "jinja2", "pandas", "scipy", "duckdb"}


def loaded_of(modules: set[str], code: str) -> set[str]:
    code = f"import sys\n{code}\nprint(*sorted({modules!r} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(told.stdout.split())


def test_libraries_for_reports_are_loaded_only_where_they_are_used() -> None:
    assert not loaded_of(HEAVY, "import attnbench.cli, attnbench.report.html, attnbench.report.figures")


def test_that_test_can_fail() -> None:
    assert "altair" in loaded_of(
        HEAVY, "from attnbench.report.charts import Subject, spec; spec('time', Subject.of([], [], None))"
    )


def test_the_public_names_are_sorted_and_there() -> None:
    import attnbench

    assert attnbench.__all__ == sorted(attnbench.__all__, key=lambda name: (name.islower(), name))
    assert all(hasattr(attnbench, name) for name in attnbench.__all__)
