"""One attention call as every measurement makes it: the forward with its graph recorded, and the pure backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from attnbench.backends import Attention, Backend
from attnbench.inputs import Inputs
from attnbench.measure.memory import Probe, probe

Grads = tuple[Tensor, ...]


class BrokenPromise(Exception):
    """A backend returned something that is no attention output: its shape, dtype or graph is wrong."""


class Call(Protocol):
    """A backend's callable on its inputs, whatever its framework.

    `on_torch_stream` tells that its work on a GPU is queued on PyTorch's current stream, where PyTorch's events see it. What `forward` gives is for `backward` to take, and is a result to `output` alone; so with `backward` and `gradients`.
    """

    @property
    def on_torch_stream(self) -> bool: ...

    def forward(self) -> Any: ...

    def backward(self, out: Any) -> Any:
        """The gradients of q, k and v for the random output gradient; `out` can be used again."""
        ...

    def wait(self, result: Any) -> None:
        """Returns when a result is there, on whatever device."""
        ...

    def output(self, out: Any) -> Tensor:
        """(batch, heads, seq_len, d_model) of what `forward` gave. Raises `BrokenPromise` where it is no such thing."""
        ...

    def gradients(self, grads: Any) -> Grads:
        """dq, dk and dv of what `backward` gave, (batch, heads, seq, d_model) each."""
        ...

    def check_inputs(self) -> None:
        """Raises `BrokenPromise` if q, k or v were written to since they were made."""
        ...


def make_call(
    backend: Backend,
    attention: Attention,
    inputs: Inputs,
    compiling: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Call:
    """A call of what `backend` built, on inputs (batch, heads, seq, d_model) that are laid out for it here.

    `compiling` is entered while a framework compiles that does not tell PyTorch's own listeners so.
    """
    if backend.framework == "jax":
        from attnbench.measure.jax_call import JaxAttention, JaxCall

        assert isinstance(attention, JaxAttention)
        return JaxCall.on(attention, inputs, backend.layout, compiling)
    return TorchCall(attention, _laid_out(inputs, backend.layout), backend.layout)


def make_probe(backend: Backend, attention: Attention, device: torch.device) -> Probe | None:
    """Where the memory of a backend's calls can be read; None where this system has no way to tell."""
    if backend.framework == "jax":
        from attnbench.measure.jax_call import JaxAttention, JaxProbe

        assert isinstance(attention, JaxAttention)
        return JaxProbe(attention, device)
    return probe(device)


# --- layouts ----------------------------------------------------------------------------------------------------------


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _swapped(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"BHNd": _as_it_is, "BNHd": _swapped}
"""Orders of dimensions: batch (B), heads (H), sequence (N), head dimension (d); and what leads from the first to each, and
back."""


def _laid_out(inputs: Inputs, layout: str) -> Inputs:
    if layout == "BHNd":
        return inputs
    to = LAYOUTS[layout]
    return Inputs(*(to(x.detach()).contiguous().requires_grad_(x.requires_grad) for x in inputs))


# --- PyTorch ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TorchCall:
    """A function of PyTorch tensors. `inputs`, and what the function returns, have their dimensions as `layout` says."""

    attention: Attention
    inputs: Inputs
    layout: str = "BHNd"

    on_torch_stream = True

    def forward(self) -> Tensor:
        return self.attention(self.inputs.q, self.inputs.k, self.inputs.v)

    def backward(self, out: Tensor) -> Grads:
        """dq, dk and dv for the random output gradient; nothing is accumulated and the graph stays."""
        q, k, v, do = self.inputs
        return torch.autograd.grad(out, (q, k, v), do, retain_graph=True)

    def wait(self, result: object) -> None:  # noqa: ARG002 - the device works in order
        if self.inputs.q.device.type == "cuda":
            torch.cuda.synchronize(self.inputs.q.device)

    def check_inputs(self) -> None:
        if any(tensor._version for tensor in (self.inputs.q, self.inputs.k, self.inputs.v)):
            raise BrokenPromise("wrote to q, k or v: every later call would have other inputs")

    def output(self, out: object) -> Tensor:
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
        return LAYOUTS[self.layout](out)

    def gradients(self, grads: Grads) -> Grads:
        return tuple(map(LAYOUTS[self.layout], grads))
