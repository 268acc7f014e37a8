"""attnbench's own attention on a CUDA GPU. Run by: pytest -m gpu tests/test_gpu_kernels.py"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from conftest import small
from test_kernels import ERROR, ERROR_16_BIT, RISES, Operands, attention, in_float64, launch, rising, with_grads
from test_measure import step_ledger

# torch's compiler warns of things that are not ours to mend
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

CUDA = torch.device("cuda", 0)

# --- random cases -----------------------------------------------------------------------------------------------------

ARITHMETIC: list[tuple[torch.dtype, str]] = [
    *((torch.float32, precision) for precision in (*ERROR, "fp16x3", "fp16x1")),
    *((dtype, "ieee") for dtype in ERROR_16_BIT),
]
LIMIT = ERROR | {"fp16x1": 4e-3, "tf32": 4e-3}
"""Scores are larger here than where the interpreter runs the kernels."""
HEAD_DIMS = (16, 64, 7, 128, 32, 100, 256, 1, 80, 40, 192)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "side by side": lambda x: x,
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "upright": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: torch.stack((x, x), -1).flatten(-2)[..., ::2],
    "one for all": lambda x: x[:1, :1].expand_as(x),
}
"""Ways for the same shape to lie in memory."""

CHUNKS, CASES_EACH = 24, 13
"""What a kernel is compiled for is the same within a chunk, as far as it can be: compiling is what takes the time."""


def random_cases(chunk: int) -> Iterator[dict[str, Any]]:
    """Arithmetic, head dimension, mask and layout go in turns, whose lengths have no common factor; the rest is drawn."""
    draw = random.Random(chunk)
    dtype, precision = ARITHMETIC[chunk % len(ARITHMETIC)]
    multiple, rest = draw.choice([(16, 0), (16, 8), (2, 1)])  # whether 16 divides a length, it is compiled for
    for _ in range(CASES_EACH):
        kv_heads = draw.choice([1, 2, 3])
        yield {
            "dtype": dtype,
            "precision": precision,
            "causal": chunk // len(ARITHMETIC) % 2 == 0,
            "layout": list(LAYOUTS)[chunk % len(LAYOUTS)],
            "head_dim": HEAD_DIMS[chunk % len(HEAD_DIMS)],
            "batch": draw.choice([1, 2, 3]),
            "kv_heads": kv_heads,
            "heads": kv_heads * draw.choice([1, 2, 4]),
            "seq_len": multiple * draw.randint(not rest, 320 // multiple) + rest,
            "kv_len": multiple * draw.randint(not rest, 320 // multiple) + rest,
            "scale": draw.choice([None, 0.5, 1.5]) if chunk % 3 else -1.0,  # in units of 1/√head_dim
            "seed": draw.randint(0, 1 << 30),
            "short": draw.choice([True, False]),  # worked on as short ones are, or as all others
        }


def made(case: dict[str, Any]) -> tuple[Operands, Tensor]:
    """q, k, v and the output's gradient."""
    generator = torch.Generator(CUDA).manual_seed(case["seed"])
    shapes = [
        (case["heads"], case["seq_len"]),
        *[(case["kv_heads"], case["kv_len"])] * 2,
        (case["heads"], case["seq_len"]),
    ]
    q, k, v, d_out = (
        LAYOUTS[case["layout"]](
            torch.randn(case["batch"], heads, rows, case["head_dim"], device=CUDA, generator=generator).to(
                case["dtype"]
            )
        )
        for heads, rows in shapes
    )
    return (q, k, v), d_out


def relative_errors(ours: Sequence[Tensor], right: Sequence[Tensor]) -> dict[str, float]:
    """The norm of the difference over the larger of the right one's and a thousandth of all gradients'."""
    floor = 1e-3 * max(float(grad.norm()) for grad in right[1:]) + 1e-30
    return {
        name: float((mine.double() - true).norm()) / max(float(true.norm()), floor)
        if mine.isfinite().all()
        else math.inf
        for name, mine, true in zip(("out", "dq", "dk", "dv"), ours, right, strict=True)
    }


def complaint(case: dict[str, Any], errors: dict[str, float], limit: float) -> str:
    """What is beyond the limit, with the whole case, which pytest would cut short; nothing if nothing is."""
    beyond = ", ".join(f"{name} is off by {error:.2e}" for name, error in errors.items() if not error < limit)
    return beyond and f"{beyond} (limit {limit:.1e}) in {case}"


def errors_of(case: dict[str, Any]) -> dict[str, float]:
    inputs, d_out = made(case)
    usual = case["head_dim"] ** -0.5
    causal, scale = case["causal"], case["scale"] and case["scale"] * usual
    with mock.patch.object(launch, "SHORT", launch.SHORT if case["short"] else 0):
        ours = with_grads(
            lambda *qkv: attention(*qkv, causal=causal, scale=scale, precision=case["precision"]), inputs, d_out
        )
    exact: Any = tuple(x.double() for x in inputs)
    factor = usual if scale is None else scale
    right = with_grads(lambda *qkv: in_float64(*qkv, causal=causal, scale=factor), exact, d_out.double())
    return relative_errors(ours, right)


def limit_of(case: dict[str, Any]) -> float:
    """A weight is as far off, relative to itself, as its score is absolutely, and that grows with the scale."""
    limit = LIMIT[case["precision"]] if case["dtype"] == torch.float32 else ERROR_16_BIT[case["dtype"]]
    return limit * max(1.0, abs(1.0 if case["scale"] is None else case["scale"]))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_cases_are_as_exact_as_their_class(chunk: int) -> None:
    complaints = [complaint(case, errors_of(case), limit_of(case)) for case in random_cases(chunk)]
    assert not any(complaints), "\n".join(filter(None, complaints))


def test_there_are_three_hundred_random_cases_and_none_is_like_another() -> None:
    cases = [tuple(case.items()) for chunk in range(CHUNKS) for case in random_cases(chunk)]
    assert len(set(cases)) == len(cases) >= 300
    for name in ("dtype", "precision", "causal", "layout", "head_dim"):
        assert len({dict(case)[name] for case in cases}) > 1


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize(("dtype", "precision"), ARITHMETIC)
def test_scores_may_rise_over_those_of_the_first_keys(dtype: torch.dtype, precision: str, causal: bool) -> None:
    complaints = []
    for rise in RISES:
        q, k, v = (x.to(CUDA, dtype) for x in rising(rise, seq_len=600, kv_len=700, at=300))
        d_out = torch.ones_like(q)
        ours = with_grads(
            lambda *qkv: attention(*qkv, causal=causal, scale=math.log(2), precision=precision), (q, k, v), d_out
        )
        exact: Any = (q.double(), k.double(), v.double())
        right = with_grads(lambda *qkv: in_float64(*qkv, causal=causal, scale=math.log(2)), exact, d_out.double())
        found = relative_errors(ours, right)
        case = {"dtype": dtype, "precision": precision, "scale": None}
        limit = limit_of(case) + rise * torch.finfo(torch.float32).eps  # to which scores are rounded
        complaints.append(complaint(case | {"rise": rise}, {name: found[name] for name in ("out", "dv")}, limit))
    assert not any(complaints), "\n".join(filter(None, complaints))


# --- long sums --------------------------------------------------------------------------------------------------------


def in_float64_by_blocks(inputs: Operands, d_out: Tensor, queries: int) -> list[Tensor]:
    """out, dq, dk and dv without a mask, of so many queries at a time."""
    q, k, v = (x.double() for x in inputs)
    scale = q.shape[-1] ** -0.5
    blocks = [
        with_grads(lambda *qkv: in_float64(*qkv, causal=False, scale=scale), (some, k, v), d_some)
        for some, d_some in zip(q.split(queries, 2), d_out.double().split(queries, 2), strict=True)
    ]
    out, dq, dk, dv = zip(*blocks, strict=True)
    return [torch.cat(out, 2), torch.cat(dq, 2), torch.stack(dk).sum(0), torch.stack(dv).sum(0)]


def errors_over(rows: int) -> dict[str, float]:
    """Of as many queries as keys."""
    inputs, d_out = plain(torch.float32, batch=1, heads=1, kv_heads=1, seq_len=rows, kv_len=rows)
    ours = with_grads(lambda *qkv: attention(*qkv, precision="fp16x3"), inputs, d_out)
    return relative_errors(ours, in_float64_by_blocks(inputs, d_out, rows // 16))


def test_long_sums_are_as_exact_as_short_ones() -> None:
    """Roundings that all go the same way, and weights that become ever smaller, would show here."""
    found = errors_over(16384)
    assert max(found.values()) < ERROR["fp16x3"], found


# --- what PyTorch does with it ----------------------------------------------------------------------------------------

ON_GPU = [(torch.float32, "fp16x3"), (torch.float32, "ieee"), (torch.bfloat16, "ieee")]


def plain(dtype: torch.dtype, **changes: Any) -> tuple[Operands, Tensor]:
    case = {"seed": 0, "batch": 2, "heads": 4, "kv_heads": 2, "seq_len": 200, "kv_len": 160, "head_dim": 64}
    return made(case | {"dtype": dtype, "layout": "side by side"} | changes)


@pytest.mark.parametrize(("dtype", "precision"), ON_GPU)
def test_operators_keep_pytorchs_rules_on_cuda(dtype: torch.dtype, precision: str) -> None:
    inputs, d_out = plain(dtype)
    chosen = precision if dtype == torch.float32 else "native"
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.attnbench.attention_forward, (*leaves, True, 0.25, chosen))
    with torch.no_grad():
        out, logsumexp, magnitudes = torch.ops.attnbench.attention_forward(*inputs, True, 0.25, chosen)
    arguments = (*inputs, out, d_out, logsumexp, magnitudes, True, 0.25, chosen)
    torch.library.opcheck(
        torch.ops.attnbench.attention_backward, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(("dtype", "precision"), ON_GPU)
def test_compiled_code_gives_the_same_bits(dtype: torch.dtype, precision: str) -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=True, precision=precision) * 2.0

    torch._dynamo.reset()
    inputs, d_out = plain(dtype)
    compiled = with_grads(torch.compile(twice, fullgraph=True), inputs, d_out)
    assert all(torch.equal(a, b) for a, b in zip(compiled, with_grads(twice, inputs, d_out), strict=True))


@pytest.mark.parametrize(("dtype", "precision"), ON_GPU)
def test_a_captured_step_follows_its_inputs(dtype: torch.dtype, precision: str) -> None:
    inputs, d_out = plain(dtype)
    leaves = [x.requires_grad_() for x in inputs]

    def step() -> list[Tensor]:
        out = attention(*leaves, causal=True, precision=precision)
        return [out, *torch.autograd.grad(out, leaves, d_out)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.5)
    graph.replay()
    replayed = [x.detach().clone() for x in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


@pytest.mark.parametrize(("dtype", "precision"), ON_GPU)
def test_a_step_gives_the_same_bits_each_time(dtype: torch.dtype, precision: str) -> None:
    inputs, d_out = plain(dtype, seq_len=1000, kv_len=1000)
    once, again = (
        with_grads(lambda *qkv: attention(*qkv, causal=True, precision=precision), inputs, d_out) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "peer"), [("bfloat16", "sdpa-flash"), ("float32", "sdpa-efficient")])
@pytest.mark.parametrize("d_model", [16, 32, 64, 128])
def test_a_step_holds_no_more_than_the_peer_and_a_twentieth(dtype: str, peer: str, d_model: int) -> None:
    case = small(batch=8, heads=1, kv_heads=1, seq_len=16384, kv_len=16384, d_model=d_model, dtype=dtype)
    peaks = {}
    for name in ("attnbench", peer):
        found = step_ledger(CUDA, case, name)
        peaks[name] = max(found["forward_peak_MiB"], found["backward_peak_MiB"])
    assert peaks["attnbench"] <= 1.05 * peaks[peer], peaks
