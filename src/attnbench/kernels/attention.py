"""`attention`: the function that callers see, and the operators behind it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnbench.kernels.portable import launch
from attnbench.kernels.portable.arithmetic import FLOAT32_PRECISIONS, NATIVE, SERVED_BY

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GREATEST_HEAD_DIM = 256

PRECISION_BY_SWITCH = {"highest": "fp16x3", "high": "tf32", "medium": "tf32"}
"""What `torch.get_float32_matmul_precision` asks for, and the precision that gives it."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, precision: str | None = None
) -> Tensor:
    """softmax(scale · q kᵀ) v, fused: no score is ever written to memory, in the forward or the backward.

    q is (batch, heads, seq_len, head_dim), or (batch, seq_len, head_dim) for one head; k and v have kv_heads, of which heads
    is a multiple, and kv_len. Strides may be any. `causal` lets query i see key j where j ≤ i + kv_len − seq_len: the
    mask is aligned to the bottom right, unlike that of `scaled_dot_product_attention(is_causal=True)`. A query that sees
    no key gives zeros, and gets a gradient of zeros. `scale` is 1/√head_dim unless given.

    `precision` is how products of float32 are made: `ieee`, in full; `fp16x3`, as accurate, by three products on tensor
    cores, also under the names `tf32x3` and `bf16x3`; `tf32`, by one product with eleven bits of each operand, which but
    for the forward of short sequences is `fp16x1`. By default it is what `torch.get_float32_matmul_precision` says: fp16x3 for `highest`, else
    tf32. It does nothing for 16-bit types.

    The backward is deterministic. It cannot be differentiated again. The forward's time depends on values where later scores
    of a row rise far above those of its first keys (docs/kernels.md): up to 2.2 times as long.

    Returns:
        A tensor of q's shape and dtype.

    Raises:
        ValueError: shapes, dtypes, devices or the precision do not fit.
    """
    if q.dim() == k.dim() == v.dim() == 3:
        return attention(
            q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), causal=causal, scale=scale, precision=precision
        ).squeeze(1)
    _check(q, k, v)
    if precision is None:
        precision = _precision_of_switch()
    if precision not in (*FLOAT32_PRECISIONS, *SERVED_BY):
        known = ", ".join((*FLOAT32_PRECISIONS, *SERVED_BY))
        raise ValueError(f"precision {precision!r} is not known; there are {known}")
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not math.isfinite(factor):
        raise ValueError(f"scale is {scale}; it must be finite")
    return _forward(q, k, v, causal, factor, _products(precision, q, k))[0]


def _products(precision: str, q: Tensor, k: Tensor) -> str:
    """How the kernels multiply, for what was asked for."""
    if q.dtype != torch.float32:
        return NATIVE
    return SERVED_BY.get(precision, precision)


@torch.compiler.assume_constant_result  # compiled code is guarded by the switch, and made anew where it changes
def _precision_of_switch() -> str:
    return PRECISION_BY_SWITCH[torch.get_float32_matmul_precision()]


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(
            f"q, k and v must be (batch, heads, seq, head_dim) or (batch, seq, head_dim), all alike; "
            f"got {q.dim()}, {k.dim()} and {v.dim()} dimensions"
        )
    (batch, heads, _, head_dim), (kv_batch, kv_heads, _, kv_head_dim) = q.shape, k.shape
    if k.shape != v.shape or batch != kv_batch or head_dim != kv_head_dim:
        raise ValueError(f"batch, kv_heads, kv_len and head_dim must agree; got {_shapes(q, k, v)}")
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads; got {_shapes(q, k, v)}")
    if not q.numel() or not k.numel():
        raise ValueError(f"no dimension may be empty; got {_shapes(q, k, v)}")
    if head_dim > GREATEST_HEAD_DIM:
        raise ValueError(f"head_dim may be up to {GREATEST_HEAD_DIM}; got {head_dim}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(
            f"q, k and v must be of one dtype, float32, float16 or bfloat16; got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device; got {q.device}, {k.device}, {v.device}")


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


# --- operators --------------------------------------------------------------------------------------------------------

_library = torch.library.Library("attnbench", "DEF")
_library.define(
    "attention_forward(Tensor q, Tensor k, Tensor v, bool causal, float scale, str precision)"
    " -> (Tensor out, Tensor logsumexp, Tensor magnitudes)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "attention_backward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor d_out, Tensor logsumexp, Tensor magnitudes,"
    " bool causal, float scale, str precision) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=torch.Tag.pt2_compliant_tag,
)
for _key in ("CUDA", "CPU"):  # on a CPU, Triton's interpreter runs the kernels, where it is asked to
    _library.impl("attention_forward", launch.forward, _key)
    _library.impl("attention_backward", launch.backward, _key)


@torch.library.register_fake("attnbench::attention_forward", lib=_library)
def _fake_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, precision: str) -> tuple[Tensor, ...]:
    return launch.forward_results(q, k, precision)


@torch.library.register_fake("attnbench::attention_backward", lib=_library)
def _fake_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    d_out: Tensor,
    logsumexp: Tensor,
    magnitudes: Tensor,
    causal: bool,
    scale: float,
    precision: str,
) -> tuple[Tensor, ...]:
    return launch.backward_results(q, k, v)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, precision: str) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            out, logsumexp, magnitudes = _forward(q, k, v, causal, scale, precision)
        ctx.save_for_backward(q, k, v, out, logsumexp, magnitudes)
        ctx.others = causal, scale, precision
        ctx.mark_non_differentiable(logsumexp, magnitudes)
        ctx.set_materialize_grads(False)
        return out, logsumexp, magnitudes

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsumexp, magnitudes = ctx.saved_tensors
        if (d_out := grads[0]) is None:
            return (None,) * 6
        return (*_backward(q, k, v, out, d_out, logsumexp, magnitudes, *ctx.others), None, None, None)


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs: Any) -> tuple[Tensor, ...]:  # noqa: ARG004
        with torch._C._AutoDispatchBelowAutograd():
            return _backward(*inputs)

    @staticmethod
    def backward(ctx, *grads: object) -> None:  # noqa: ARG004
        raise RuntimeError("attnbench.attention has no second derivative; use another attention for double backward")


# By hand, since `torch.library.register_autograd` takes some 50 µs a call for what these few lines do.
def _forward_with_autograd(*inputs: Any) -> tuple[Tensor, ...]:
    return _differentiable(_Attention, _forward, inputs)


def _backward_with_autograd(*inputs: Any) -> tuple[Tensor, ...]:
    return _differentiable(_Gradients, _backward, inputs)


def _differentiable(
    function: type[torch.autograd.Function], operator: Any, inputs: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return function.apply(*inputs)  # pyright: ignore[reportReturnType]
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*inputs)


_forward, _backward = torch.ops.attnbench.attention_forward.default, torch.ops.attnbench.attention_backward.default
_library.impl("attention_forward", _forward_with_autograd, "Autograd")
_library.impl("attention_backward", _backward_with_autograd, "Autograd")
