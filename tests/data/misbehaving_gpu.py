# pyright: basic, reportIncompatibleMethodOverride=false
"""Attention functions with faults that only a GPU can show."""

import os
import time

import torch
from misbehaving import right  # noqa: F401 - the healthy one
from torch.nn.attention import SDPBackend, sdpa_kernel


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


def waits_for_the_device(q, k, v, *, causal, scale):
    """Attention that looks at a value of its result: nothing can be queued ahead of it."""
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    out.sum().item()
    return out


def flash_after_a_spin(q, k, v, *, causal, scale):
    """FlashAttention-2 behind a kernel that spins for `$SPIN_US` microseconds."""
    if spin_us := float(os.environ["SPIN_US"]):
        torch.cuda._sleep(int(spin_us * torch.cuda.get_device_properties(q.device).clock_rate / 1e3))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
