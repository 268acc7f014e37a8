# pyright: basic, reportIncompatibleMethodOverride=false
"""Attention functions with every fault that a benchmark must survive, for the tests."""

import ctypes
import math
import os
import signal
import sys
import time

import torch


def right(q, k, v, *, causal, scale):
    scores = q @ k.transpose(-2, -1) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(k.shape[-2] - q.shape[-2] + 1)
        scores = scores.masked_fill(hidden, -math.inf)
    return torch.softmax(scores, -1) @ v


def plain(q, k, v):
    return right(q, k, v, causal=False, scale=1 / math.sqrt(q.shape[-1]))


def killed(q, k, v, **_):
    os.kill(os.getpid(), signal.SIGKILL)


def segfault(q, k, v, **_):
    ctypes.string_at(0)


def aborts(q, k, v, **_):
    print("assertion failed: tile % 16 == 0", file=sys.stderr, flush=True)
    os.abort()


def forks(q, k, v, **_):
    """Dies while a child of its lives on, with all its open files."""
    if os.fork() == 0:
        time.sleep(30)
        os._exit(0)
    os.abort()


def turns_gradients_off(q, k, v, **given):
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    return right(q, k, v, **given)


def writes_to_its_inputs(q, k, v, **given):
    with torch.no_grad():
        q *= 2
    return right(q, k, v, **given)


def says_what_cannot_be_written(q, k, v, **_):
    raise ValueError("\ud800 \x1b[31m red")


def exits(q, k, v, **_):
    os._exit(7)


def hangs(q, k, v, **_):
    while True:
        time.sleep(0.01)


class HangsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out):
        return out.clone()

    @staticmethod
    def backward(ctx, grad):
        while True:
            time.sleep(0.01)


def hangs_in_backward(q, k, v, *, causal, scale):
    return HangsInBackward.apply(right(q, k, v, causal=causal, scale=scale))


def raises(q, k, v, **_):
    raise ValueError("no kernel for this shape")


class Faulty(torch.autograd.Function):
    """Identity whose gradient is changed in one row."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[-1, -1] *= 1.5
        return grad


def wrong_dq(q, k, v, **given):
    return right(Faulty.apply(q), k, v, **given)


def wrong_dk(q, k, v, **given):
    return right(q, Faulty.apply(k), v, **given)


def wrong_dv(q, k, v, **given):
    return right(q, k, Faulty.apply(v), **given)


def wrong_out(q, k, v, **given):
    return right(q, k, v, **given) * 1.001


def nan_in_one_row(q, k, v, **given):
    out = right(q, k, v, **given)
    keep = torch.ones_like(out)
    keep[-1, -1, -1] = math.nan
    return out * keep


def allocates_without_end(q, k, v, **_):
    held = []
    while True:
        held.append(torch.ones(64 << 20, dtype=torch.uint8))


class AllocatesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out):
        return out.clone()

    @staticmethod
    def backward(ctx, grad):
        return allocates_without_end(grad, grad, grad)


def allocates_in_backward(q, k, v, **given):
    return AllocatesInBackward.apply(right(q, k, v, **given))


def wrong_shape(q, k, v, **given):
    return right(q, k, v, **given)[..., :-1]


def wrong_dtype(q, k, v, **given):
    return right(q, k, v, **given).double()


def off_the_graph(q, k, v, **given):
    return right(q, k, v, **given).detach()


def not_a_tensor(q, k, v, **_):
    return None


def speaks(q, k, v, **given):
    print("{}" * 100)
    print("noise on standard error", file=sys.stderr)
    os.write(1, b'{"reply": {"fields": {"status": "ok"}}}\n')
    return right(q, k, v, **given)


def slow(q, k, v, **given):
    time.sleep(0.2)
    return right(q, k, v, **given)


not_callable = 3


def takes_two(q, k):
    return q
