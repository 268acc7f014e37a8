"""Cells measured in this process: what a visit tells besides the times."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from attnbench import backends, bench
from attnbench.backends import Attention, Backend
from attnbench.bench import Bench, Settings
from attnbench.case import Case
from conftest import small

pytestmark = pytest.mark.filterwarnings("default")  # torch's compiler warns of what is not ours to mend

SETTINGS = Settings("cpu", 0, True, "default", "sustained", warm_cache=False, graph=False)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def visit(
    backend: Backend | None = None, name: str = "eager", **changes: Any
) -> tuple[dict[str, Any], dict[str, float]]:
    """What a first visit brings, and what it spent its time on."""
    at_work = Bench(SETTINGS, lambda _: None)
    if backend:
        at_work.backends[name] = backend
    case = small(**changes).to_dict()
    reply = at_work.visit(case, name, None, first=True, last=False, budget_s=0.02)
    return reply, at_work.accounts.spent_s


@pytest.mark.usefixtures("threads")
def test_a_backend_that_ran_anothers_kernels_is_tagged_fallback() -> None:
    eager, flash = backends.load("eager"), backends.load("sdpa-flash")
    honest, _ = visit(name="sdpa-flash")
    assert "tags" not in honest["fields"]
    swapped, _ = visit(replace(flash, build=eager.build), "sdpa-flash")
    assert swapped["fields"]["tags"] == ["fallback"]
    assert "aten::bmm" in swapped["fields"]["kernels_forward"]


@pytest.mark.usefixtures("threads")
def test_a_compiled_backend_that_was_not_compiled_is_tagged_fallback() -> None:
    compiled, eager = backends.load("compile"), backends.load("eager")
    honest, spent_s = visit(name="compile")
    assert "tags" not in honest["fields"]
    assert honest["fields"]["compile_ms"] / 1e3 == pytest.approx(spent_s["compile"], rel=0.2)
    silent, _ = visit(replace(compiled, build=eager.build), "compile")
    assert silent["fields"]["tags"] == ["fallback"]


@pytest.mark.usefixtures("threads")
def test_every_shipped_backend_that_is_pinned_or_compiled_knows_its_kernels() -> None:
    left_to_others = {"naive", "eager", "sdpa", "transformer-engine", "jax-xla", "jax-mosaic"}
    assert {name for name in backends.BUILTIN if not backends.load(name).own_kernels} == left_to_others


@pytest.mark.usefixtures("threads")
@pytest.mark.alone
def test_the_time_of_a_visit_is_accounted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    reply, spent_s = visit(seq_len=512, kv_len=512)
    assert set(spent_s) == {"compile", "correctness", "memory", "timing"}
    assert all(seconds > 0 for name, seconds in spent_s.items() if name != "compile")
    timed = sum(sum(samples) for name, samples in reply["samples_ms"].items() if name != "forward_backward") / 1e3
    assert timed <= spent_s["timing"] < timed + 0.2
    assert [window["samples"]["forward"] for window in reply["windows"]] != []
    monkeypatch.setattr(bench, "TOO_LONG_TO_REPEAT_S", 0.0)
    once, again_s = visit(seq_len=512, kv_len=512)
    assert once["done"]
    sample = sum(once["samples_ms"]["forward"] + once["samples_ms"]["backward"]) / 1e3
    assert again_s["timing"] == pytest.approx(sample), "the step that was checked is the sample"
    assert [len(samples) for samples in once["samples_ms"].values()] == [1, 1, 1]


@pytest.mark.usefixtures("threads")
def test_a_slow_step_needs_no_other_to_warm_up_for_it_on_later_visits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    plain = bench.Timer.time

    def noted(self: bench.Timer, *args: Any, warm: bool, **options: Any) -> Any:
        asked.append(warm)
        return plain(self, *args, warm=warm, **options)

    monkeypatch.setattr(bench.Timer, "time", noted)
    for matters_s in (10.0, 0.0):
        monkeypatch.setattr(bench, "WARMTH_MATTERS_S", matters_s)
        at_work = Bench(SETTINGS, lambda _: None)
        for first in (True, False):
            at_work.visit(small().to_dict(), "eager", None, first=first, last=False, budget_s=0.01)
    assert asked == [True, False, True, True]


@pytest.mark.usefixtures("threads")
def test_collections_of_garbage_do_not_look_at_what_torch_and_backends_loaded() -> None:
    def load_much(case: Case) -> Attention:
        loaded.append([[] for _ in range(100_000)])
        return eager.build(case)

    loaded: list[list[list[Any]]] = []
    eager = backends.load("eager")
    gc.unfreeze()
    at_work = Bench(SETTINGS, lambda _: None)
    assert len(gc.get_objects()) < 10_000, "set aside at the beginning"
    at_work.backends["eager"] = replace(eager, build=load_much)
    for d_model in (16, 32):
        case = small(d_model=d_model).to_dict()
        at_work.visit(case, "eager", None, first=True, last=False, budget_s=0.01)
        assert len(gc.get_objects()) > 100_000, "no visit has begun since"
        at_work.visit(case, "sdpa", None, first=True, last=False, budget_s=0.01)
        assert len(gc.get_objects()) < 10_000, "set aside before the next one is looked at"
    loaded.clear()
    gc.unfreeze()
