"""attnbench's own attention against float64, its kernels run by Triton's interpreter."""

from __future__ import annotations

import math
import os
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

INTERPRET = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}

with mock.patch.dict(os.environ, INTERPRET):
    from attnbench.kernels import attention
    from attnbench.kernels.portable import launch, splitting
    from attnbench.kernels.portable.arithmetic import FLOAT32_PRECISIONS, SERVED_BY

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="these are for the interpreter"),
    pytest.mark.filterwarnings(
        "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
    ),  # the interpreter's own
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in INTERPRET.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=[(launch.SHORT, splitting.FEW), (0, splitting.FEW), (0, 0)], ids=["short", "long", "longer"])
def short(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems worked on as they are, by one launch a pass, and then as large ones are, of a few rows and of many.

    What many rows are streamed from does not fit in the cache.
    """
    short, few = request.param
    monkeypatch.setattr(launch, "SHORT", short)
    monkeypatch.setattr(splitting, "FEW", few)
    if not few:
        monkeypatch.setattr(launch, "_cache_bytes", lambda device: 0)


ERROR = {"ieee": 2e-6, "tf32": 2e-3, "fp16x3": 2e-6, "fp16x1": 2e-3}
"""Largest relative error of out, dq, dk and dv."""
ERROR_16_BIT = {torch.float16: 2e-3, torch.bfloat16: 2e-2}

Operands = tuple[Tensor, Tensor, Tensor]


def operands(
    batch: int = 1, heads: int = 1, kv_heads: int = 1, seq_len: int = 33, kv_len: int = 20, head_dim: int = 16,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> Operands:  # fmt: skip
    torch.manual_seed(seed)
    q = torch.randn(batch, heads, seq_len, head_dim)
    k, v = torch.randn(2, batch, kv_heads, kv_len, head_dim)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def in_float64(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """Rows that see no key give zeros."""
    shared = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(shared, 1).mT * scale
    n, m = scores.shape[-2:]
    seen = torch.ones(n, m, dtype=torch.bool, device=q.device)
    seen = seen.tril(m - n) if causal else seen
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1).masked_fill(~seen, 0.0)
    return weights @ v.repeat_interleave(shared, 1)


def with_grads(function: Any, inputs: Operands, d_out: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def errors(
    inputs: Operands, *, causal: bool = False, scale: float | None = None, precision: str | None = None
) -> list[float]:
    """Of out, dq, dk and dv: the norm of the difference over that of the whole; a lone one of zeros must be met exactly."""
    factor = inputs[0].shape[-1] ** -0.5 if scale is None else scale
    d_out = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(7)).to(inputs[0].dtype)
    ours = with_grads(lambda *qkv: attention(*qkv, causal=causal, scale=scale, precision=precision), inputs, d_out)
    exact: Any = tuple(x.double() for x in inputs)
    right = with_grads(lambda *qkv: in_float64(*qkv, causal=causal, scale=factor), exact, d_out.double())
    whole = max(float(grad.norm()) for grad in right[1:])
    floors = (0.0, 1e-3 * whole, 1e-3 * whole, 0.0)  # dq and dk are differences, which may all but cancel
    found = []
    for mine, true, floor in zip(ours, right, floors, strict=True):
        assert mine.dtype == inputs[0].dtype
        assert mine.isfinite().all()
        size = max(float(true.norm()), floor)
        found.append(float((mine.double() - true).norm()) / size if size else float(mine.norm()))
    return found


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads, shared = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (1, 3)]))
    return {
        "batch": draw(st.integers(1, 2)),
        "heads": kv_heads * shared,
        "kv_heads": kv_heads,
        "seq_len": draw(st.integers(1, 40)),
        "kv_len": draw(st.integers(1, 40)),
        "head_dim": draw(st.sampled_from([1, 3, 16, 20, 32, 40])),
        "seed": draw(st.integers(0, 1000)),
    }


few = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.mark.usefixtures("short")
@few
@given(problems(), st.booleans(), st.sampled_from(FLOAT32_PRECISIONS))
def test_any_shape_in_float32(problem: dict[str, Any], causal: bool, precision: str) -> None:
    assert max(errors(operands(**problem), causal=causal, precision=precision)) < ERROR[precision]


@pytest.mark.usefixtures("short")
@few
@given(problems(), st.booleans(), st.sampled_from(list(ERROR_16_BIT)))
def test_any_shape_in_16_bits(problem: dict[str, Any], causal: bool, dtype: torch.dtype) -> None:
    assert max(errors(operands(**problem, dtype=dtype), causal=causal)) < ERROR_16_BIT[dtype]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("precision", FLOAT32_PRECISIONS)
def test_every_precision_is_as_exact_as_its_class(precision: str) -> None:
    assert max(errors(operands(seq_len=70, kv_len=90, head_dim=24), precision=precision)) < ERROR[precision]


def test_one_half_of_float16_is_told_from_two() -> None:
    assert max(errors(operands(), precision="fp16x1")) > 100 * max(errors(operands(), precision="fp16x3"))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("head_dim", [128, 200, 256])
def test_wide_heads(head_dim: int) -> None:
    assert max(errors(operands(seq_len=33, kv_len=35, head_dim=head_dim), causal=True)) < ERROR["fp16x3"]


def test_the_switch_of_pytorch_chooses_the_precision() -> None:
    inputs, before = operands(), torch.get_float32_matmul_precision()
    try:
        for switch, precision in (("highest", "fp16x3"), ("high", "tf32")):
            torch.set_float32_matmul_precision(switch)
            assert torch.equal(attention(*inputs), attention(*inputs, precision=precision))
    finally:
        torch.set_float32_matmul_precision(before)


def test_tf32_rounds_to_the_nearest_of_eleven_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One key, so that the output is its value."""
    monkeypatch.setattr(launch, "SHORT", 0)
    q, k, _ = operands(seq_len=1, kv_len=1)
    v = 1 + torch.arange(16, dtype=torch.float32).reshape(1, 1, 1, 16) * 2.0**-12
    off = attention(q, k, v, precision="tf32") - v
    assert 0 < off.abs().max() <= 2.0**-11
    assert off.max() > 0 > off.min()


def test_other_schemes_are_served_by_the_one_of_their_class() -> None:
    inputs = operands()
    for name, serving in SERVED_BY.items():
        assert torch.equal(attention(*inputs, precision=name), attention(*inputs, precision=serving))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("precision", ["fp16x3", "ieee"])
def test_queries_that_see_no_key_give_zeros_and_get_none(precision: str) -> None:
    q, k, v = operands(seq_len=50, kv_len=20)
    d_out = torch.randn(q.shape)
    out, dq, dk, dv = with_grads(lambda *qkv: attention(*qkv, causal=True, precision=precision), (q, k, v), d_out)
    assert not out[:, :, :30].any()
    assert not dq[:, :, :30].any()
    assert out[:, :, 30:].all()
    assert dk.isfinite().all()
    assert dv.isfinite().all()
    assert max(errors((q, k, v), causal=True, precision=precision)) < ERROR[precision]


def test_the_causal_mask_is_aligned_to_the_bottom_right() -> None:
    q, k, v = operands(seq_len=3, kv_len=8)
    out = attention(q, k, v, causal=True)
    changed = v.clone()
    changed[:, :, 6:] += 1.0
    moved = (attention(q, k, changed, causal=True) - out).abs().amax(-1).squeeze()
    assert moved[0] == 0, "query 0 sees keys 0 to 5"
    assert moved[1:].all(), "the others see more"


RISES = [4.0, 11.5, 12.5, 15.5, 16.5, 126.0, 129.0, 1000.0]
"""To base 2; what is known of the first keys holds weights up to 2¹² in halves, 2¹⁶ in float16 and 2¹²⁸ in bfloat16."""


def rising(rise: float, *, seq_len: int, kv_len: int, at: int) -> Operands:
    """Of scores that are about 0 up to a key, and `rise` from there on, where the scale is log 2."""
    q, k, v = operands(seq_len=seq_len, kv_len=kv_len)
    q, k = q / 64, k / 64
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[:, :, at:, 0] = rise
    return q, k, v


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("products", [*FLOAT32_PRECISIONS, *ERROR_16_BIT], ids=str)
@pytest.mark.parametrize("rise", RISES)
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # which is what is seen
def test_scores_may_rise_over_those_of_the_first_keys(rise: float, products: Any, causal: bool) -> None:
    dtype, precision = (torch.float32, products) if isinstance(products, str) else (products, None)
    q, k, v = rising(rise, seq_len=70, kv_len=100, at=70)
    limit = ERROR[precision] if precision else ERROR_16_BIT[dtype]
    of_scores = rise * torch.finfo(torch.float32).eps  # to which they are rounded, whatever is taken off them
    inputs = q.to(dtype), k.to(dtype), v.to(dtype)
    out, _, _, dv = errors(inputs, causal=causal, scale=math.log(2), precision=precision)  # others all but cancel
    assert max(out, dv) < limit + of_scores


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("precision", FLOAT32_PRECISIONS)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0])
def test_scales_of_any_sign(scale: float, precision: str) -> None:
    assert max(errors(operands(), scale=scale, precision=precision)) < ERROR[precision]


@pytest.mark.parametrize("dtype", list(ERROR_16_BIT))
def test_a_negative_scale_in_16_bits(dtype: torch.dtype) -> None:
    assert max(errors(operands(dtype=dtype), scale=-0.3)) < ERROR_16_BIT[dtype]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("gain", [1e-36, 1e-20, 1e4, 1e15])
def test_operands_of_any_magnitude(gain: float) -> None:
    """Scores stay moderate; values and gradients scale with the gain."""
    q, k, v = operands()
    leaves = [q.requires_grad_(), (k * gain).requires_grad_(), (v * gain).requires_grad_()]
    out = attention(*leaves, scale=0.25 / gain, precision="fp16x3")
    plain = attention(q, k, v, scale=0.25, precision="ieee")
    assert torch.allclose(out / gain, plain, atol=1e-5)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("gain", [1e-17, 1e-8, 1e8, 1e16])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_where_values_and_their_own_gradients_are_all_large_or_small(gain: float, causal: bool) -> None:
    """dS goes with the product of the two."""
    (q, k, v), d_out = operands(), torch.randn(1, 1, 33, 16)
    ours = with_grads(lambda *qkv: attention(*qkv, causal=causal, precision="fp16x3"), (q, k, v * gain), d_out * gain)
    exact: Any = (q.double(), k.double(), (v * gain).double())
    right = with_grads(lambda *qkv: in_float64(*qkv, causal=causal, scale=0.25), exact, (d_out * gain).double())
    for mine, true in zip(ours, right, strict=True):
        assert float((mine.double() - true).norm() / true.norm()) < ERROR["fp16x3"]


@pytest.mark.parametrize(("precision", "bits", "reach"), [("fp16x3", 22, 27), ("fp16x1", 11, 27)])
def test_what_is_far_smaller_than_the_largest_of_its_head_keeps_its_bits(
    precision: str, bits: int, reach: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One key, so that the output is its value."""
    monkeypatch.setattr(launch, "SHORT", 0)
    q, k, _ = operands(seq_len=1, kv_len=1, head_dim=40)
    v = (1 + torch.rand(1, 1, 1, 40)) * 2.0 ** -torch.arange(40)
    off = (attention(q, k, v, precision=precision) - v).abs().flatten()
    assert (off / v.flatten())[: reach + 1].max() <= 2.0**-bits
    assert off[reach + 1 :].max() <= 2.0 ** -(bits + reach - 1)
    assert (off / v.flatten()).max() > 2.0**-bits, "the last ones have lost some"


@pytest.mark.usefixtures("short")
def test_scores_of_ten_thousand() -> None:
    q, k, v = operands()
    out, *grads = with_grads(lambda *qkv: attention(*qkv, scale=1.0), (q * 1000, k * 10, v), torch.ones_like(q))
    right = in_float64((q * 1000).double(), (k * 10).double(), v.double(), causal=False, scale=1.0)
    assert float((q * 1000 @ (k * 10).mT).abs().max()) > 1e4
    assert torch.allclose(out.double(), right, atol=1e-2)
    assert all(grad.isfinite().all() for grad in grads)


def test_identical_scores_give_the_mean() -> None:
    q, k, v = operands(kv_len=40)
    out = attention(torch.zeros_like(q), k, v)
    assert torch.allclose(out, v.mean(2, keepdim=True).expand_as(out), atol=1e-6)


def test_one_key_is_the_answer() -> None:
    q, k, v = operands(kv_len=1)
    assert torch.allclose(attention(q, k, v), v.expand_as(q), rtol=1e-6)


@pytest.mark.usefixtures("short")
def test_subnormal_operands() -> None:
    q, k, v = (x * 1e-40 for x in operands())
    assert torch.allclose(attention(q, k, v), v.mean(2, keepdim=True).expand_as(q), atol=1e-44)


@pytest.mark.usefixtures("short")
def test_what_is_not_finite_is_not_hidden() -> None:
    q, k, v = operands()
    v[0, 0, 3, 0] = math.nan
    assert attention(q, k, v).isnan().any()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("precision", ["fp16x3", "ieee"])
def test_strides_of_any_kind(precision: str) -> None:
    q, k, v = operands(heads=2, kv_heads=2)
    straight = attention(q, k, v, precision=precision)
    woven = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    upright = [x.mT.contiguous().mT for x in (q, k, v)]
    sliced = [torch.stack((x, x), -1)[..., 0] for x in (q, k, v)]
    for strided in (woven, upright, sliced):
        assert not strided[0].is_contiguous()
        assert torch.equal(attention(*strided, precision=precision), straight)
    spread = torch.ones(1).expand_as(q)  # the gradient of a sum has no strides at all
    wanted = with_grads(lambda *qkv: attention(*qkv, precision=precision), (q, k, v), torch.ones_like(q))
    for mine, other in zip(with_grads(lambda *qkv: attention(*qkv, precision=precision), (q, k, v), spread), wanted, strict=True):  # fmt: skip
        assert torch.equal(mine, other)


def test_three_dimensions_are_one_head() -> None:
    q, k, v = operands(batch=2)
    flat = attention(q.squeeze(1), k.squeeze(1), v.squeeze(1))
    assert torch.equal(flat, attention(q, k, v).squeeze(1))


def test_the_backward_is_deterministic() -> None:
    inputs = operands(heads=2, kv_heads=1, seq_len=40, kv_len=40)
    d_out = torch.randn(inputs[0].shape)
    once, again = (with_grads(attention, inputs, d_out) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"q": torch.randn(33, 16)}, "got 2, 4 and 4 dimensions"),
        ({"v": torch.randn(1, 1, 21, 16)}, "must agree"),
        ({"q": torch.randn(1, 3, 20, 16), "k": torch.randn(1, 2, 20, 16), "v": torch.randn(1, 2, 20, 16)}, "multiple"),
        ({"q": torch.randn(1, 1, 0, 16)}, "empty"),
        ({"k": torch.randn(1, 1, 20, 16).half()}, "one dtype"),
        ({"q": torch.randn(1, 1, 4, 257), "k": torch.randn(1, 1, 4, 257), "v": torch.randn(1, 1, 4, 257)}, "257"),
        ({"precision": "tf33"}, "fp16x3"),
        ({"scale": math.inf}, "finite"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(change: dict[str, Any], complaint: str) -> None:
    given: dict[str, Any] = dict(zip("qkv", operands(), strict=True)) | change
    with pytest.raises(ValueError, match=complaint):
        attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def test_a_second_derivative_is_refused() -> None:
    q, k, v = (x.requires_grad_() for x in operands())
    (dq,) = torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.sum().backward()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("precision", ["fp16x3", "ieee"])
def test_the_operators_keep_pytorchs_rules(precision: str) -> None:
    q, k, v = (x.requires_grad_() for x in operands(seq_len=8, kv_len=8))
    torch.library.opcheck(torch.ops.attnbench.attention_forward, (q, k, v, True, 0.25, precision))


@pytest.mark.filterwarnings("default")  # torch's compiler warns of what is not ours to mend
def test_compiled_code_calls_it_whole() -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=True) * 2.0

    inputs = operands()
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    d_out = torch.randn(inputs[0].shape)
    plain = with_grads(twice, inputs, d_out)
    assert all(torch.equal(a, b) for a, b in zip(with_grads(compiled, inputs, d_out), plain, strict=True))
