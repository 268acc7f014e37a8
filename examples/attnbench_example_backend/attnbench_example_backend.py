"""Attention with an online softmax: scores of one block of keys at a time, as flash attention does it.

`attention` is all that a backend has to be. `CAUSAL` says more of itself: which cases it takes, so that the others are
`unsupported` with a reason before anything runs, and which version it is.
"""

from __future__ import annotations

import math
from importlib.metadata import version

import torch

from attnbench.backends import Attention, Backend, Support
from attnbench.case import Case

BLOCK = 256
"""Keys at a time."""


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float) -> torch.Tensor:
    """q: (batch, heads, seq_len, head_dim); k, v: (batch, kv_heads, kv_len, head_dim); returns q's shape."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    queries, keys = q.shape[-2], k.shape[-2]
    last_seen = torch.arange(queries, device=q.device)[:, None] + keys - queries
    top = q.new_full((*q.shape[:-1], 1), torch.finfo(q.dtype).min)
    total, out = torch.zeros_like(top), torch.zeros_like(q)
    for start in range(0, keys, BLOCK):
        block = slice(start, min(start + BLOCK, keys))
        scores = q @ k[..., block, :].transpose(-2, -1) * scale
        if causal:
            hidden = torch.arange(block.start, block.stop, device=q.device) > last_seen
            scores = scores.masked_fill(hidden, -math.inf)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True)).detach()  # any finite number gives the same result
        weights, shrink = torch.exp(scores - higher), torch.exp(top - higher)
        total = total * shrink + weights.sum(-1, keepdim=True)
        out = out * shrink + weights @ v[..., block, :]
        top = higher
    return out / total


def build(case: Case) -> Attention:
    scale = 1 / math.sqrt(case.d_model)
    return lambda q, k, v: attention(q, k, v, causal=True, scale=scale)


TAKES = Support(("float32",), full=False, blind=())
CAUSAL = Backend(
    "example-online-causal",
    "online softmax under a causal mask, in float32",
    build,
    lambda: f"attnbench-example-backend {version('attnbench-example-backend')}",
    {"cpu": TAKES, "cuda": TAKES},
)
