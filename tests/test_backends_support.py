"""Support as data: every rule trips, the first reason is told, and the command line shows what was decided."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnbench import backends, forecast
from attnbench.backends.support import SIXTEEN_BIT, Ask, HeadDims, Support
from attnbench.case import Case
from attnbench.cli.backends import backend_facts, backends_text
from attnbench.errors import RequestError
from attnbench.measure.call import LAYOUTS
from attnbench.request import expand_backends, parse_case
from conftest import SMALL_GRID, Attnbench, records_of, small

RULES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dtype": ({"dtypes": SIXTEEN_BIT}, {"dtype": "float32"}, "takes float16 and bfloat16, not float32"),
    "tf32": ({"tf32": False}, {"precision": "tf32"}, "takes no float32 as tf32"),
    "least": ({"head_dims": HeadDims(least=32)}, {}, "takes head dimensions of 32 and more, not 16"),
    "most": ({"head_dims": HeadDims(most=8)}, {}, "takes head dimensions up to 8, not 16"),
    "multiple": (
        {"head_dims": HeadDims(multiple_of=8)},
        {"d_model": 20},
        "takes head dimensions that are multiples of 8, not 20",
    ),
    "only": ({"head_dims": HeadDims(only=(64, 128))}, {}, "takes head dimensions 64 and 128, not 16"),
    "full": ({"full": False}, {"causal": False}, "is about the causal mask, and the case has none"),
    "causal": ({"causal": False}, {"causal": True}, "has no causal mask"),
    "unequal": ({"unequal": False}, {"kv_len": 80}, "takes as many keys as queries alone, not 80 and 64"),
    "causal, unequal": (
        {"causal_unequal": False},
        {"kv_len": 80, "causal": True},
        "takes a causal mask over as many keys as queries alone, not 80 and 64",
    ),
    "blind": (
        {"blind": ("float16",)},
        {"kv_len": 60, "causal": True},
        "promises no zeros for queries that see no key, and 4 queries see no key",
    ),
    "grouped": ({"grouped": False}, {"kv_heads": 1}, "takes as many key heads as query heads alone, not 1 and 2"),
    "backward": ({"backward": False}, {}, "has no backward on CUDA; ask for the forward alone with --pass forward"),
    "too old": (
        {"capability": (9, 0)},
        {},
        "needs a GPU of compute capability 9.0 or more, and this one has 8.9",
    ),
    "too new": (
        {"capability_below": (8, 9)},
        {},
        "runs on GPUs of compute capability below 8.9, and this one has 8.9",
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_trips_with_its_reason_and_only_where_it_is_set(rule: str) -> None:
    rules, changes, reason = RULES[rule]
    ask = Ask(small(**changes), "cuda", backward=True, capability=(8, 9))
    assert Support(**rules).reason_against(ask) == reason
    assert Support().reason_against(ask) is None


def test_what_is_not_asked_for_is_no_reason() -> None:
    forward_only = Support(backward=False, capability=(9, 0))
    assert forward_only.reason_against(Ask(small(), "cuda", backward=False, capability=None)) is None
    assert Support().reason_against(Ask(small(precision="tf32"), "cuda")) is None
    assert "tf32" in str(Support().reason_against(Ask(small(precision="tf32"), "cpu")))
    assert Support(blind=()).reason_against(Ask(small(causal=True, kv_len=80), "cpu")) is None


def test_a_dimension_is_padded_to_the_next_size_that_kernels_have() -> None:
    kernels = HeadDims(kernels=(32, 64, 256))
    assert [kernels.padded(d_model) for d_model in (1, 32, 33, 64, 65, 256, 300)] == [
        32,
        None,
        64,
        None,
        256,
        None,
        None,
    ]
    assert HeadDims().padded(7) is None


def test_the_registry_holds_nothing_that_does_not_exist() -> None:
    for name in backends.BUILTIN:
        backend = backends.load(name)
        assert backend.support
        assert set(backend.support) <= {"cpu", "cuda"}
        assert backend.layout in LAYOUTS
        assert backend.memory_model is None or backend.memory_model in forecast.MODELS or backend.memory_model == "sdpa"


def test_a_backend_objects_only_to_what_its_data_takes() -> None:
    asked: list[Case] = []

    def objects(ask: Ask) -> str:
        asked.append(ask.case)
        return "not on a Tuesday"

    eager = replace(backends.load("eager"), support={"cpu": Support(("float32",))}, objects=objects)
    assert eager.refuses(Ask(small(), "cpu")) == "not on a Tuesday"
    assert eager.refuses(Ask(small(dtype="float16"), "cpu")) == "takes float32, not float16"
    assert asked == [small()]
    assert eager.unavailable("cuda") == "runs on cpu alone"


def test_the_tables_in_the_docs_are_those_of_the_code() -> None:
    docs = Path(__file__).parent.parent / "docs"
    tables = runpy.run_path(str(docs / "support.py"))
    page = (docs / "backends.md").read_text("utf-8")
    assert tables["written"](page) == page, "stale; run: python docs/support.py"
    stale = page.replace("| any ", "| 64 ").replace("by default", "never")
    assert stale != page
    assert tables["written"](stale) == page
    for name in backends.BUILTIN:
        assert page.count(f"| `{name}` ") >= 2, "a row in each"


# --- cases from the command line --------------------------------------------------------------------------------------


def test_a_case_is_parsed_and_completed() -> None:
    assert parse_case("d_model=16, dtype=float32") == Case(8, 1, 1, 1024, 1024, 16)
    assert parse_case("heads=4,seq_len=7,causal=True") == Case(8, 4, 4, 7, 7, 64, causal=True)
    assert parse_case("heads=4,kv_heads=2,kv_len=9,precision=tf32").precision == "tf32"
    assert parse_case("dtype=bfloat16,precision=tf32").precision == "ieee"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "'' is not of the form NAME=VALUE, such as d_model=64"),
        ("d_model", "'d_model' is not of the form NAME=VALUE"),
        ("d_model=", "'d_model=' is not of the form NAME=VALUE"),
        ("d_modl=3", "did you mean 'd_model'"),
        ("d_model=1.5", "d_model = 1.5 is not a whole number above zero"),
        ("d_model=0", "d_model = 0 is not a whole number above zero"),
        ("batch=-1", "batch = -1 is not a whole number above zero"),
        ("causal=yes", "causal = yes is neither true nor false"),
        ("dtype=float17", "did you mean 'float16'"),
        ("heads=4,kv_heads=3", "kv_heads = 3 does not divide heads = 4"),
        ("batch=1,batch=2", "gives batch twice"),
    ],
)
def test_a_bad_case_is_told_in_one_line(text: str, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint) as error:
        parse_case(text)
    assert str(error.value).startswith(f"case {text!r}")
    assert "\n" not in str(error.value)


def test_backends_are_asked_about_cases(attnbench: Attnbench) -> None:
    cases = ("--case", "d_model=16,dtype=float32", "--case", "seq_len=64,kv_len=32,causal=true")
    done = attnbench("backends", "--device", "cpu", *cases, "--json")
    assert done.returncode == 0, done.stderr
    told = {backend["name"]: backend for backend in json.loads(done.stdout)}
    assert set(backends.BUILTIN) <= set(told)
    assert [case["refused"] for case in told["sdpa"]["cases"]] == [None, None]
    assert told["eager"]["cases"][0] == {
        "case": "d_model=16,dtype=float32",
        "cell_id": "b8.h1.g1.n1024.m1024.d16.float32.ieee.full.eager",
        "refused": None,
        "padded_d_model": None,
    }
    assert "32 queries see no key" in told["eager"]["cases"][1]["refused"]
    assert "no backward on CPU" in told["flex"]["cases"][0]["refused"]
    assert told["sdpa-cudnn"]["cases"][0]["refused"] == "needs a CUDA GPU"
    assert told["compile-max-autotune"]["by_default"] is False


def test_a_table_of_cases_has_a_column_for_each() -> None:
    told = {"name": "flex", "about": "", "version": None, "unavailable": None}
    asked = {"d_model=16": small(), "d_model=48": small(d_model=48), "dtype=float64": small(dtype="float64")}
    facts = backend_facts(told | {"refusals": [None, None, "not this"], "padded_d_models": [None, 64, None]}, asked)
    header, _, row = backends_text([facts], "cpu").splitlines()
    assert [cell.strip() for cell in header.split("|")[1:-1]] == ["backend", *asked]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "flex",
        "yes",
        "yes, on 64 dimensions a head",
        "not this",
    ]


def test_what_compiles_for_minutes_runs_only_when_named() -> None:
    for asked in ((), ("all",)):
        assert {name for name in backends.BUILTIN if name not in expand_backends(asked)} == {"compile-max-autotune"}
    assert expand_backends(("compile-max-autotune",)) == ("compile-max-autotune",)


def test_the_padded_dimension_is_in_the_plan_and_the_record(
    attnbench: Attnbench, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a backend of an installed package whose kernels are made for 32 and 64."""
    site = tmp_path / "site"
    info = site / "padding-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: padding\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[attnbench.backends]\npads = padding:PADS\n")
    (site / "padding.py").write_text(
        "from dataclasses import replace\n"
        "from attnbench import backends\n"
        "from attnbench.backends.support import HeadDims, Support\n"
        "support = {'cpu': Support(head_dims=HeadDims(kernels=(32, 64)))}\n"
        "PADS = replace(backends.load('eager'), name='pads', support=support)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(site))
    plan = json.loads(attnbench("plan", *SMALL_GRID, "--backend", "pads", "--backend", "eager", "--json").stdout)
    assert [cell["padded_d_model"] for cell in plan["cells"]] == [32, None]
    done = attnbench("run", *SMALL_GRID, "--backend", "pads", "--backend", "eager", "--out", "run", "--quiet")
    assert done.returncode == 0, done.stderr
    padded = {record["backend"]: record["padded_d_model"] for record in records_of(tmp_path / "run")}
    assert padded == {"pads": 32, "eager": None}
