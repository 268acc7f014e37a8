"""The oracle against plain autograd in float64, and what its samples can and cannot miss."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench import reference as oracle
from attnbench.case import Case
from attnbench.inputs import Inputs, make_inputs
from attnbench.reference import STRIDE, compare, reference, row_error
from conftest import small

CPU = torch.device("cpu")


def dense(case: Case, inputs: Inputs) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Output and gradients by autograd in float64, every score at once; rows that see no key are zero."""
    q, k, v = (tensor.detach().double().requires_grad_() for tensor in inputs[:3])
    group = case.heads // case.kv_heads
    scores = q @ k.repeat_interleave(group, 1).transpose(-2, -1) / math.sqrt(case.d_model)
    hidden = torch.zeros(case.seq_len, case.kv_len, dtype=torch.bool)
    if case.causal:
        hidden = torch.ones_like(hidden).triu(case.kv_len - case.seq_len + 1)
    weights = torch.softmax(scores.masked_fill(hidden, -1e300), -1) * ~hidden
    out = weights @ v.repeat_interleave(group, 1)
    return out.detach(), torch.autograd.grad(out, (q, k, v), inputs.do.double())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.integers(1, 2))
    return Case(
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        seq_len=draw(st.integers(1, 150)),
        kv_len=draw(st.integers(1, 150)),
        d_model=draw(st.integers(1, 24)),
        dtype=draw(st.sampled_from(["float64", "float32"])),
        causal=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(cases())
def test_it_is_what_autograd_says_in_float64(case: Case) -> None:
    inputs = make_inputs(case, CPU, 0)
    out, (dq, dk, dv) = dense(case, inputs)
    known = reference(case, inputs)
    assert torch.allclose(known.out_HNd, out.flatten(0, 1), rtol=0, atol=1e-12)
    for grad, index, wanted in (
        (dq, known.rows_HR, known.dq_HRd),
        (dk, known.keys_GS, known.dk_GSd),
        (dv, known.keys_GS, known.dv_GSd),
    ):
        rows = grad.flatten(0, 1).gather(1, index[..., None].expand(-1, -1, case.d_model))
        assert torch.allclose(rows, wanted, rtol=0, atol=1e-11)
    if case.dtype == "float64":
        assert compare(case, known, out, (dq, dk, dv)).complaint is None


def test_it_holds_no_full_score_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small(seq_len=700, kv_len=700)
    monkeypatch.setitem(oracle.BLOCK_SCORES, "cpu", 5000)
    largest = 0
    real = torch.Tensor.__matmul__

    def watched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        result = real(a, b)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    reference(case, make_inputs(case, CPU, 0))
    assert 0 < largest <= 16 * 700


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
@pytest.mark.parametrize("head", range(4))
@pytest.mark.parametrize("block", range(4))
def test_a_wrong_tile_of_any_head_is_always_caught(name: str, head: int, block: int) -> None:
    case = small(batch=2, seq_len=4 * STRIDE, kv_len=4 * STRIDE)
    inputs = make_inputs(case, CPU, 0)
    out, grads = dense(case, inputs)
    results = {"out": out, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    results = {key: tensor.float() for key, tensor in results.items()}
    known = reference(case, inputs)
    assert compare(case, known, results["out"], (results["dq"], results["dk"], results["dv"])).complaint is None
    results[name].flatten(0, 1)[head, block * STRIDE : (block + 1) * STRIDE] *= 1.001
    errors = compare(case, known, results["out"], (results["dq"], results["dk"], results["dv"]))
    assert errors.complaint is not None
    assert name in errors.complaint
    assert [key for key, error in errors.by_name.items() if (error or 0) > errors.tolerance] == [name]


@pytest.mark.parametrize("length", [8, 32, 63])
def test_a_shorter_fault_is_caught_with_the_stated_probability(length: int) -> None:
    """A fault in `length` rows inside one stretch of STRIDE is hit by the sample in length/STRIDE of draws."""
    case = small(batch=1, heads=1, kv_heads=1, seq_len=STRIDE, kv_len=STRIDE)
    tries, caught = 2000, 0
    maker = oracle._Oracle(case, make_inputs(case, CPU, 0))
    for _ in range(tries):
        caught += int(maker._sample(1, STRIDE)[0, 0]) < length
    expected = length / STRIDE
    assert abs(caught / tries - expected) < 4 * math.sqrt(expected * (1 - expected) / tries)


def test_samples_take_one_of_every_stride_and_differ_between_heads() -> None:
    case = small(batch=4, heads=4, kv_heads=4, seq_len=1000, kv_len=1000)
    rows = reference(case, make_inputs(case, CPU, 0)).rows_HR
    assert rows.shape == (16, 16)
    assert (rows // STRIDE == torch.arange(16)).all()
    assert (rows < 1000).all()
    assert len(rows.unique(dim=0)) == 16


def test_beyond_its_limit_it_compares_the_first_and_last_head_and_some_between(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small(batch=2, heads=8, kv_heads=4, seq_len=32, kv_len=32)
    monkeypatch.setitem(oracle.MOST_SCORES, "cpu", 4 * 2 * 32 * 32)
    inputs = make_inputs(case, CPU, 0)
    known = reference(case, inputs)
    groups = known.groups_G.tolist()
    assert len(groups) == 4
    assert {0, 7} <= set(groups)
    assert known.heads_H.tolist() == [2 * group + i for group in groups for i in range(2)]
    out, grads = dense(case, inputs)
    assert compare(case, known, out.float(), tuple(grad.float() for grad in grads)).complaint is None
    grads[1].flatten(0, 1)[7] *= 2
    assert "dk" in str(compare(case, known, out.float(), tuple(grad.float() for grad in grads)).complaint)
    skipped = next(head for head in range(8) if head not in groups)
    grads[1].flatten(0, 1)[7] /= 2
    grads[2].flatten(0, 1)[skipped, 3] = math.nan
    assert "dv has" in str(compare(case, known, out.float(), tuple(grad.float() for grad in grads)).complaint)


def test_nan_and_infinity_never_pass() -> None:
    case = small()
    inputs = make_inputs(case, CPU, 0)
    out, grads = dense(case, inputs)
    known = reference(case, inputs)
    out[0, 1, 5, 3] = math.nan
    grads[2][0, 0, 0, 0] = math.inf
    errors = compare(case, known, out.float(), tuple(grad.float() for grad in grads))
    assert errors.complaint == "out has 1 values that are not finite; dv has 1 values that are not finite"
    assert errors.by_name["out"] is None


def test_an_error_beyond_measure_is_an_error() -> None:
    case = small(dtype="float64")
    inputs = make_inputs(case, CPU, 0)
    out, grads = dense(case, inputs)
    errors = compare(case, reference(case, inputs), out * 1e300, grads)
    assert errors.by_name["out"] is None
    assert errors.complaint == "out is off by more than float64 can tell"


def test_rows_that_ought_to_be_zero_do_not_divide_by_nothing() -> None:
    """With one key dq is exactly zero, and what a float32 backward leaves there is rounding."""
    case = small(kv_len=1)
    inputs = make_inputs(case, CPU, 0)
    call = torch.nn.functional.scaled_dot_product_attention(*inputs[:3])
    grads = torch.autograd.grad(call, inputs[:3], inputs.do)
    errors = compare(case, reference(case, inputs), call, grads)
    assert errors.complaint is None
    broken = (grads[0] + 1.0, *grads[1:])
    assert "dq" in str(compare(case, reference(case, inputs), call, broken).complaint)


def test_row_error_is_the_worst_rows() -> None:
    wanted = torch.ones(2, 100, 4, dtype=torch.float64)
    result = wanted.clone()
    result[1, 57] *= 1.25
    assert row_error(result, wanted, torch.zeros(())) == pytest.approx(0.25)
