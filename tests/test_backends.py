"""Every backend against the oracle, and every refusal against what would have happened."""

from __future__ import annotations

import re
from functools import partial
from importlib import metadata
from typing import Any

import pytest
import torch

from attnbench import __version__, backends
from attnbench.backends import Ask
from attnbench.errors import RequestError
from attnbench.grid import Grid
from attnbench.inputs import make_inputs
from attnbench.measure.call import BrokenPromise, TorchCall
from attnbench.reference import compare, reference
from conftest import MISBEHAVING, small

CPU = torch.device("cpu")

small_wrapped = torch.no_grad()(small)
small_wrapped.__module__, small_wrapped.__qualname__ = __name__, "small_wrapped"

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch": {"batch": 3},
    "one query": {"seq_len": 1},
    "one key": {"kv_len": 1},
    "one of each": {"seq_len": 1, "kv_len": 1, "d_model": 1},
    "odd sizes": {"seq_len": 37, "kv_len": 53, "d_model": 7},
    "grouped": {"heads": 4, "kv_heads": 2},
    "multi-query": {"heads": 3, "kv_heads": 1, "seq_len": 20, "kv_len": 20},
    "causal": {"causal": True},
    "causal, more keys": {"causal": True, "seq_len": 20, "kv_len": 50},
    "causal, grouped": {"causal": True, "heads": 4, "kv_heads": 2, "seq_len": 33, "kv_len": 40},
    "causal, fewer keys": {"causal": True, "seq_len": 50, "kv_len": 20},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16", "causal": True},
    "float64": {"dtype": "float64"},
}
ON_CPU = ["naive", "eager", "sdpa", "sdpa-math", "sdpa-flash"]


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_right_where_it_takes_a_case(name: str, shape: str) -> None:
    case = small(**SHAPES[shape])
    backend = backends.load(name)
    reason = backend.refuses(Ask(case, "cpu"))
    if reason:
        assert (case.masked_rows and name in ("naive", "eager")) or (
            name == "sdpa-flash" and case.causal and case.seq_len != case.kv_len
        ), reason
        return
    call = TorchCall(backend.build(case), make_inputs(case, CPU, 0))
    out = call.output(call.forward())
    errors = compare(case, reference(case, call.inputs), out, call.backward(out))
    assert errors.complaint is None, errors


@pytest.mark.parametrize("name", ["naive", "eager"])
def test_the_refusal_of_queries_without_keys_is_right(name: str) -> None:
    case = small(**SHAPES["causal, fewer keys"])
    backend = backends.load(name)
    assert "30 queries see no key" in str(backend.refuses(Ask(case, "cpu")))
    call = TorchCall(backend.build(case), make_inputs(case, CPU, 0))
    out = call.forward()
    assert compare(case, reference(case, call.inputs), out, call.backward(out)).complaint is not None


def test_tf32_is_refused_on_cpu() -> None:
    for name in (*ON_CPU, "compile", "flex"):
        assert "tf32" in str(backends.load(name).refuses(Ask(small(precision="tf32"), "cpu", backward=False)))


def test_flex_takes_a_forward_on_cpu_but_no_backward() -> None:
    flex = backends.load("flex")
    assert "no backward on CPU" in str(flex.refuses(Ask(small(), "cpu", backward=True)))
    assert flex.refuses(Ask(small(), "cpu", backward=False)) is None


def test_kernels_of_cuda_are_not_available_on_cpu() -> None:
    for name in ("sdpa-efficient", "sdpa-cudnn"):
        assert backends.load(name).unavailable("cpu") == "needs a CUDA GPU"


def test_the_registry_and_the_modules_agree() -> None:
    for name in backends.BUILTIN:
        backend = backends.load(name)
        assert backend.name == name
        assert backend.about
        if backend.package is None and name != "attnbench":
            assert backend.version() == f"torch {torch.__version__}"
        assert bool(backends.BUILTIN[name].package) == bool(backend.package)


def test_attnbenchs_own_has_the_versions_of_its_code_and_its_compiler() -> None:
    found = re.fullmatch(r"attnbench (\S+), triton (\S+)", backends.load("attnbench").version())
    assert found
    assert found.groups() == (__version__, metadata.version("triton"))


def test_eager_holds_its_scores_in_three_dimensions() -> None:
    """With four, torch.compile would swap in SDPA and `compile` would be a second name for it."""
    seen = []

    def softmax(scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.dim())
        return torch.softmax(scores, -1)

    from attnbench.backends.written_out import written_out

    case = small()
    written_out(case, softmax)(*make_inputs(case, CPU, 0)[:3])
    assert seen == [3]


def test_a_users_function_is_a_backend() -> None:
    case = small(causal=True, kv_len=80)
    backend = backends.load(f"{MISBEHAVING}:right")
    call = TorchCall(backend.build(case), make_inputs(case, CPU, 0))
    out = call.output(call.forward())
    assert compare(case, reference(case, call.inputs), out, call.backward(out)).complaint is None
    assert backend.version().startswith("sha256 ")


def test_a_function_without_causal_refuses_causal_cases() -> None:
    plain = backends.load(f"{MISBEHAVING}:plain")
    assert plain.refuses(Ask(small(), "cpu")) is None
    assert "takes no keyword `causal`" in str(plain.refuses(Ask(small(causal=True), "cpu")))


@pytest.mark.parametrize(
    ("where", "complaint"),
    [
        ("nowhere.py:f", "there is no file nowhere.py"),
        (f"{MISBEHAVING}:rigth", "has no function 'rigth'; it has: aborts"),
        (f"{MISBEHAVING}:not_callable", "has no function 'not_callable'"),
        (f"{MISBEHAVING}:takes_two", r"its signature is \(q, k\)"),
        (f"{MISBEHAVING.with_name('raises_at_import.py')}:f", "raised RuntimeError: the library it needs is missing"),
        ("no.such.module:f", "raised ModuleNotFoundError"),
        ("seed", "not known"),
    ],
)
def test_what_is_no_function_is_told_in_one_line(where: str, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint) as error:
        backends.load(where)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        ("wrong_shape", r"returned shape \(1, 2, 64, 15\), not \(1, 2, 64, 16\)"),
        ("wrong_dtype", "returned torch.float64, not torch.float32"),
        ("off_the_graph", "off the graph"),
        ("not_a_tensor", "returned NoneType, not a tensor"),
    ],
)
def test_a_broken_promise_is_told(function: str, complaint: str) -> None:
    case = small()
    call = TorchCall(backends.load(f"{MISBEHAVING}:{function}").build(case), make_inputs(case, CPU, 0))
    with pytest.raises(BrokenPromise, match=complaint):
        call.output(call.forward())


def test_decorated_names_must_be_free_and_functions_at_the_top_of_a_file() -> None:
    with pytest.raises(RequestError, match="taken or malformed"):
        backends.backend("eager")(small)
    with pytest.raises(RequestError, match="taken or malformed"):
        backends.backend("a:b")(small)

    def local(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q

    for nameless in (local, lambda q, k, v: q, partial(small), Grid()):
        with pytest.raises(RequestError, match=r"top of a \.py file"):
            backends.backend("mine")(nameless)  # pyright: ignore[reportArgumentType]


def test_a_function_under_another_decorator_is_found_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code is the wrapper's, of another file; its name and module are its own."""
    monkeypatch.setattr(backends, "_decorated", {})
    assert backends.backend("mine")(small_wrapped) is small_wrapped
    assert backends.source_of("mine") == f"{__file__}:small_wrapped"


def test_inputs_are_the_same_for_every_backend_and_differ_between_cases_and_seeds() -> None:
    one, again = make_inputs(small(), CPU, 0), make_inputs(small(), CPU, 0)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one.q, make_inputs(small(), CPU, 1).q)
    assert not torch.equal(one.q, make_inputs(small(causal=True), CPU, 0).q)
    assert one.q.std().item() == pytest.approx(1, abs=0.1)
    assert [tensor.requires_grad for tensor in one] == [True, True, True, False]
