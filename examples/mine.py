"""The least that a backend of your own has to be: attnbench run --preset quick --backend examples/mine.py:attention"""

import math

import torch


def attention(q, k, v, *, causal, scale):
    """q: (batch, heads, seq_len, head_dim); k, v: (batch, kv_heads, kv_len, head_dim); returns q's shape."""
    scores = q @ k.transpose(-2, -1) * scale
    if causal:  # aligned to the bottom right: the last query sees every key
        queries, keys = scores.shape[-2:]
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
        scores = scores.masked_fill(hidden, -math.inf)
    return torch.softmax(scores, dim=-1) @ v
