# pyright: basic, reportIncompatibleMethodOverride=false
"""Attention functions with faults that only a GPU can show."""

import time

import torch
from misbehaving import right  # noqa: F401 - the healthy one


def poisons_the_context(q, k, v, **_):
    """A device-side assertion: every later CUDA call of the process fails."""
    torch.zeros(4, device=q.device)[torch.tensor([10**6], device=q.device)]
    return q + k.sum() + v.sum()


def allocates_without_end(q, k, v, **_):
    held = []
    while True:
        held.append(torch.empty(1 << 30, dtype=torch.uint8, device=q.device))


class AllocatesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return allocates_without_end(grad, grad, grad)


def allocates_in_backward(q, k, v, *, causal, scale):
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    return AllocatesInBackward.apply(out)


def slow_to_launch(q, k, v, *, causal, scale):
    """Attention whose host side takes a millisecond more than its device side."""
    time.sleep(1e-3)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
