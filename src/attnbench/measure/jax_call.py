"""A call of JAX: compiled for its inputs, no PyTorch tensor inside, and a backward from what the forward left.

Loads JAX; imported where a JAX backend is measured and nowhere else.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import torch
from torch import Tensor

from attnbench.inputs import Inputs
from attnbench.measure.call import LAYOUTS, BrokenPromise, Grads

Compiling = Callable[[], AbstractContextManager[None]]
"""Books the time of a block as compilation."""

Function = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Recorded(NamedTuple):
    """An output, and what its backward needs beside the inputs and the output itself."""

    out: jax.Array
    saved: Sequence[jax.Array]


class JaxAttention:
    """A traceable function, compiled for the shapes it is first called with: alone, recorded, and its backward.

    Of what the backward needs, q, k, v and the output are not given out a second time by the recorded forward: XLA would
    copy them.
    """

    def __init__(self, function: Function, matmul_precision: str) -> None:
        self.function, self.matmul_precision = function, matmul_precision
        self.executables: dict[str, Any] = {}
        self.ran = ""

    def run(self, name: str, compiling: Compiling, *args: Any) -> Any:
        """Carries out `infer`, `record` or `pull`, compiling it on its first call."""
        if name not in self.executables:
            with compiling(), jax.default_matmul_precision(self.matmul_precision):
                self.executables[name] = jax.jit(getattr(self, name)).lower(*args).compile()
        self.ran = name
        return self.executables[name](*args)

    def infer(self, q: jax.Array, k: jax.Array, v: jax.Array) -> Recorded:
        return Recorded(self.function(q, k, v), ())

    def record(self, q: jax.Array, k: jax.Array, v: jax.Array) -> Recorded:
        out, pull = jax.vjp(self.function, q, k, v)
        leaves, self.tree = jax.tree.flatten(pull)
        known = (q, k, v, out)
        self.places = [next((i for i, array in enumerate(known) if leaf is array), None) for leaf in leaves]
        return Recorded(out, [leaf for leaf, place in zip(leaves, self.places, strict=True) if place is None])

    def pull(self, q: jax.Array, k: jax.Array, v: jax.Array, recorded: Recorded, do: jax.Array) -> Any:
        known, saved = (q, k, v, recorded.out), iter(recorded.saved)
        leaves = [next(saved) if place is None else known[place] for place in self.places]
        return jax.tree.unflatten(self.tree, leaves)(do)

    @property
    def allocates_bytes(self) -> int:
        """What the executable that ran last allocates when it starts: its results and temporaries, by XLA's own plan."""
        plan = self.executables[self.ran].memory_analysis()
        return plan.output_size_in_bytes + plan.temp_size_in_bytes - plan.alias_size_in_bytes


@dataclass(frozen=True)
class JaxCall:
    """A `JaxAttention` on JAX arrays of its `layout`, made from the same tensors as everyone's.

    JAX computes behind its caller's back. On a CPU a call here ends when its result is there; on CUDA it ends when it is
    queued, as PyTorch's does, on a stream of JAX's own.
    """

    attention: JaxAttention
    arrays: tuple[jax.Array, ...]
    layout: str
    records: bool
    waits: bool
    compiling: Compiling

    on_torch_stream = False

    @classmethod
    def on(cls, attention: JaxAttention, inputs: Inputs, layout: str, compiling: Compiling) -> JaxCall:
        """A call on `inputs`, (batch, heads, seq, d_model), which are laid out and handed over without a detour."""
        on_cpu = inputs.q.device.type == "cpu"
        tensors = (LAYOUTS[layout](x.detach()).contiguous() for x in inputs)
        arrays = tuple(map(jax.dlpack.from_dlpack, tensors))
        if not on_cpu:  # of its own memory, so that its statistics know of them and PyTorch's can go
            torch.cuda.synchronize(inputs.q.device)
            arrays = jax.block_until_ready(tuple(jax.numpy.array(array, copy=True) for array in arrays))
        return cls(attention, arrays, layout, inputs.q.requires_grad, on_cpu, compiling)

    def forward(self) -> Recorded:
        return self._done(self.attention.run("record" if self.records else "infer", self.compiling, *self.arrays[:3]))

    def backward(self, out: Recorded) -> Any:
        *qkv, do = self.arrays
        return self._done(self.attention.run("pull", self.compiling, *qkv, out, do))

    def _done(self, result: Any) -> Any:
        return jax.block_until_ready(result) if self.waits else result

    def wait(self, result: Any) -> None:
        jax.block_until_ready(result)

    def output(self, out: Recorded) -> Tensor:
        q = self.arrays[0]
        if (out.out.shape, out.out.dtype) != (q.shape, q.dtype):
            raise BrokenPromise(f"returned {out.out.dtype}{list(out.out.shape)}, not {q.dtype}{list(q.shape)}")
        return self._tensor(out.out)

    def gradients(self, grads: Sequence[jax.Array]) -> Grads:
        return tuple(map(self._tensor, grads))

    def _tensor(self, array: jax.Array) -> Tensor:
        return LAYOUTS[self.layout](torch.from_dlpack(jax.block_until_ready(array)))

    def check_inputs(self) -> None:
        """A JAX array cannot be written to."""


class JaxProbe:
    """Memory by JAX's own statistics of a GPU; on a CPU, of which there are none, by the arrays that are alive.

    The statistics' peak cannot be reset. A phase is one executable, and that allocates all it needs when it starts: its peak
    is what was in use before and what the executable allocates. The resident set would tell nothing: JAX keeps what it has
    freed.
    """

    def __init__(self, attention: JaxAttention, device: torch.device) -> None:
        self._attention = attention
        self._gpu = jax.devices("cuda")[device.index] if device.type == "cuda" else None
        self._before = 0

    def settle(self) -> None:
        gc.collect()

    def forget_peak(self) -> None:
        self._before = self.now_bytes()

    def now_bytes(self) -> int:
        if self._gpu is None:
            return sum(array.nbytes for array in jax.live_arrays())
        return self._gpu.memory_stats()["bytes_in_use"]

    def peak_bytes(self) -> int:
        return self._before + self._attention.allocates_bytes
