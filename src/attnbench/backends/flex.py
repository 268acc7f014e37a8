"""`flex`: FlexAttention, compiled for each shape, causal by a block mask; `flex-causal-score`: causal by a score function."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attnbench.backends import Attention, Backend, Support
from attnbench.backends.support import SIXTEEN_BIT, HeadDims
from attnbench.backends.written_out import no_compiler, torch_version
from attnbench.case import Case


def compiled_flex() -> Attention:
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)  # pyright: ignore[reportReturnType]


def by_block_mask(case: Case) -> Attention:
    compiled = compiled_flex()
    offset, grouped = case.kv_len - case.seq_len, case.heads != case.kv_heads

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query + offset >= key

    mask = None

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal mask
        if case.causal and mask is None:  # made once, on the tensors' device: users keep it across layers and steps
            mask = create_block_mask(sees, None, None, case.seq_len, case.kv_len, device=str(q.device))
        return compiled(q, k, v, block_mask=mask, enable_gqa=grouped)  # pyright: ignore[reportCallIssue]

    return attention


def by_score(case: Case) -> Attention:
    """Every score is computed, and those that a query does not see are set to -inf."""
    compiled = compiled_flex()
    offset, grouped = case.kv_len - case.seq_len, case.heads != case.kv_heads

    def hide(score: Tensor, _batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.where(query + offset >= key, score, -math.inf)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, score_mod=hide, enable_gqa=grouped)  # pyright: ignore[reportCallIssue]

    return attention


DTYPES = ("float32", *SIXTEEN_BIT)
KERNELS = HeadDims(least=16, kernels=(16, 32, 64, 128, 256, 512))
"""Triton's tiles are powers of two."""

ON_CPU, ON_CUDA = Support(DTYPES, backward=False), Support(DTYPES, head_dims=KERNELS)
OWN_KERNELS = ("flex_attention", "compiledfxgraph")
BACKENDS = {
    "flex": Backend(
        "flex", "FlexAttention, compiled anew for each shape, causal by a block mask", by_block_mask, torch_version,
        {"cpu": ON_CPU, "cuda": ON_CUDA}, lacks=no_compiler, memory_model="flex", compiles=True, own_kernels=OWN_KERNELS,
    ),
    "flex-causal-score": Backend(
        "flex-causal-score", "FlexAttention, causal by a score function: nothing is left out", by_score, torch_version,
        {"cpu": replace(ON_CPU, full=False), "cuda": replace(ON_CUDA, full=False)},
        lacks=no_compiler, memory_model="flex", compiles=True, own_kernels=OWN_KERNELS,
    ),
}  # fmt: skip
