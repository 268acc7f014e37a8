"""xFormers, Transformer Engine and FlashInfer, each as its package calls attention."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from attnbench.backends import Ask, Attention, Backend, Support
from attnbench.backends.packages import PACKAGES
from attnbench.backends.support import SIXTEEN_BIT, HeadDims
from attnbench.case import Case
from attnbench.errors import printable

ALL_BUT_FLOAT64 = ("float32", *SIXTEEN_BIT)

# --- xFormers ---------------------------------------------------------------------------------------------------------


def xformers(case: Case) -> Attention:
    """Grouped heads are a dimension more, over which k and v are expanded: (batch, seq, kv_heads, group, head_dim)."""
    ops: Any = PACKAGES["xformers"].load()
    bias: Any = importlib.import_module("xformers.ops.fmha.attn_bias")
    triangle = bias.LowerTriangularMask if case.seq_len == case.kv_len else bias.LowerTriangularFromBottomRightMask
    mask = triangle() if case.causal else None
    scale, group = 1 / math.sqrt(case.d_model), case.heads // case.kv_heads

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if group == 1:
            return ops.memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale)
        q = q.unflatten(2, (case.kv_heads, group))
        k, v = (x.unsqueeze(3).expand(-1, -1, -1, group, -1) for x in (k, v))
        return ops.memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale).flatten(2, 3)

    return attention


def xformers_lacks(_device: str) -> str | None:
    """It can be imported without what is compiled in it, and then has no attention for a GPU."""
    library: Any = importlib.import_module("xformers._cpp_lib")
    if (problem := library._cpp_library_load_exception) is None:
        return None
    said = str(problem.__cause__ or problem).strip().partition("\n")[0]
    remedy = "; pip install nvidia-cuda-runtime-cu12" if PACKAGES["xformers"].library in said else ""
    return f"{PACKAGES['xformers'].version()}: what is compiled in it was not loaded: {printable(said)}{remedy}"


def xformers_objects(ask: Ask) -> str | None:
    if ask.case.heads != ask.case.kv_heads and ask.backward:
        return "takes fewer key heads than query heads in the forward alone; ask for it with --pass forward"
    return HeadDims(multiple_of=16 // ask.case.element_bytes).reason_against(ask.case.d_model)  # loads of 16 bytes


# --- Transformer Engine -----------------------------------------------------------------------------------------------


def transformer_engine(case: Case) -> Attention:
    module: Any = importlib.import_module("transformer_engine.pytorch").DotProductAttention(
        num_attention_heads=case.heads,
        kv_channels=case.d_model,
        num_gqa_groups=case.kv_heads,
        attention_dropout=0.0,
        qkv_format="bshd",
        attn_mask_type=_te_mask(case),
        attention_type="self" if case.seq_len == case.kv_len else "cross",
        softmax_scale=1 / math.sqrt(case.d_model),
    )

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return module(q, k, v).view(q.shape)  # it folds the heads into one dimension

    return attention


def _te_mask(case: Case) -> str:
    if not case.causal:
        return "no_mask"
    return "causal" if case.seq_len == case.kv_len else "causal_bottom_right"


# --- FlashInfer -------------------------------------------------------------------------------------------------------

WORKSPACE_BYTES = 128 << 20
"""As FlashInfer recommends."""


def flashinfer(case: Case) -> Attention:
    """A batch of sequences of one length, end to end: (batch · seq, heads, head_dim). Planned in the first call, as users
    plan once for all layers."""
    library: Any = importlib.import_module("flashinfer")
    planned: Any = None

    def plan(q: Tensor) -> Any:
        wrapper = library.BatchPrefillWithRaggedKVCacheWrapper(
            torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device), "NHD"
        )
        starts = torch.arange(case.batch + 1, dtype=torch.int32, device=q.device)
        wrapper.plan(
            starts * case.seq_len,
            starts * case.kv_len,
            case.heads,
            case.kv_heads,
            case.d_model,
            causal=case.causal,
            sm_scale=1 / math.sqrt(case.d_model),
            q_data_type=q.dtype,
        )
        return wrapper

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal planned
        planned = planned or plan(q)
        return planned.run(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).view(q.shape)

    return attention


def _backend(name: str, package: str, about: str, build: Any, support: Support, **more: Any) -> Backend:
    brings = PACKAGES[package]
    return Backend(name, about, build, brings.version, {"cuda": support}, brings, layout="BNHd", **more)


# What is not `blind` gives other than zeros for queries that see no key, or promises none.
BACKENDS = {
    "xformers": _backend(
        "xformers", "xformers", "memory_efficient_attention of xFormers, the kernel its own choice", xformers,
        Support(ALL_BUT_FLOAT64, blind=SIXTEEN_BIT), lacks=xformers_lacks,
        objects=xformers_objects, memory_model="sdpa-flash", own_kernels=("fmha", "flash", "splitk"),
    ),
    "transformer-engine": _backend(
        "transformer-engine", "transformer_engine", "DotProductAttention of Transformer Engine, the kernel its own choice",
        transformer_engine, Support(ALL_BUT_FLOAT64, blind=(), capability=(8, 0)), memory_model="sdpa-cudnn",
    ),
    "flashinfer": _backend(
        "flashinfer", "flashinfer", "batch prefill of FlashInfer", flashinfer,
        Support(SIXTEEN_BIT, head_dims=HeadDims(only=(64, 128, 256)), blind=(), backward=False, capability=(8, 0)),
        memory_model="sdpa-flash", compiles=True, own_kernels=("prefill",),
    ),
}  # fmt: skip
