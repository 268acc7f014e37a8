"""One attention call as every measurement makes it: the forward with its graph recorded, and the pure backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnbench.backends import Attention
from attnbench.inputs import Inputs

Grads = tuple[Tensor, ...]


class BrokenPromise(Exception):
    """A backend returned something that is no attention output: its shape, dtype or graph is wrong."""


@dataclass(frozen=True)
class Call:
    """A backend's callable on its inputs."""

    attention: Attention
    inputs: Inputs

    def forward(self) -> Tensor:
        return self.attention(self.inputs.q, self.inputs.k, self.inputs.v)

    def backward(self, out: Tensor) -> Grads:
        """dq, dk and dv for the random output gradient; nothing is accumulated and the graph stays."""
        q, k, v, do = self.inputs
        return torch.autograd.grad(out, (q, k, v), do, retain_graph=True)

    def check_inputs(self) -> None:
        """Raises `BrokenPromise` if q, k or v were written to since they were made."""
        if any(tensor._version for tensor in (self.inputs.q, self.inputs.k, self.inputs.v)):
            raise BrokenPromise("wrote to q, k or v: every later call would have other inputs")

    def check_output(self, out: object) -> Tensor:
        """`out`, if it is a tensor of q's shape and dtype that autograd reached.

        Raises:
            BrokenPromise: it is not; the message says in what.
        """
        q = self.inputs.q
        if not isinstance(out, Tensor):
            raise BrokenPromise(f"returned {type(out).__name__}, not a tensor")
        if out.shape != q.shape:
            raise BrokenPromise(f"returned shape {tuple(out.shape)}, not {tuple(q.shape)}")
        if out.dtype != q.dtype:
            raise BrokenPromise(f"returned {out.dtype}, not {q.dtype}")
        if out.device != q.device:
            raise BrokenPromise(f"returned a tensor on {out.device}, not on {q.device}")
        if q.requires_grad and not out.requires_grad:
            raise BrokenPromise("returned a tensor off the graph: no gradient can reach q, k and v")
        return out
