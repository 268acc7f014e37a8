"""cuDNN's attention by graphs of its Python frontend, forward and backward; also with a deterministic backward."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from attnbench.backends import Ask, Attention, Backend, Support
from attnbench.backends.packages import PACKAGES
from attnbench.backends.support import SIXTEEN_BIT, HeadDims
from attnbench.case import Case
from attnbench.errors import printable

REMEDY = (
    "; keep that of xFormers out of LD_LIBRARY_PATH and in a folder like nvidia/cuda_runtime_12/lib (docs/backends.md)"
)
"""Where the frontend finds CUDA's runtime library in two versions."""

Pack = dict[Any, Tensor]
"""Tensors by the nodes of a graph that they stand for."""


class Graphs:
    """The graphs of a case, each built when it is first needed. Tensors are (batch, heads, seq, head_dim), contiguous.

    Without `plans` they are checked and cannot be run: building a plan compiles.

    Raises:
        Exception: cuDNN's own, where it has no plan for the case.
    """

    def __init__(self, case: Case, *, deterministic: bool = False, plans: bool = True) -> None:
        self.cudnn: Any = importlib.import_module("cudnn")
        self.case, self.deterministic, self.plans = case, deterministic, plans
        triangle = case.seq_len == case.kv_len
        self.options = {
            "attn_scale": 1 / math.sqrt(case.d_model),
            "use_causal_mask": case.causal and triangle,
            "use_causal_mask_bottom_right": case.causal and not triangle,
        }
        self.dtype = {"float16": self.cudnn.data_type.HALF, "bfloat16": self.cudnn.data_type.BFLOAT16}[case.dtype]
        self.float = self.cudnn.data_type.FLOAT
        self.q_shape = (case.batch, case.heads, case.seq_len, case.d_model)
        self.k_shape = (case.batch, case.kv_heads, case.kv_len, case.d_model)
        self.stats_shape = (*self.q_shape[:3], 1)

    @cached_property
    def inference(self) -> Forward:
        return self._forward(training=False)

    @cached_property
    def training(self) -> Forward:
        return self._forward(training=True)

    @cached_property
    def backward(self) -> Backward:
        graph = self._graph()
        inputs = [self._tensor(graph, name, shape) for name, shape in self._inputs(("q", "k", "v", "o", "dO"))]
        stats = self._tensor(graph, "stats", self.stats_shape, self.float)
        names = ("q", "k", "v", "o", "dO")
        grads = graph.sdpa_backward(
            **dict(zip(names, inputs, strict=True)), stats=stats, use_deterministic_algorithm=self.deterministic,
            **self.options,
        )  # fmt: skip
        for grad, shape in zip(grads, (self.q_shape, self.k_shape, self.k_shape), strict=True):
            self._emit(grad, shape)
        return Backward(self._planned(graph), tuple(inputs), stats, tuple(grads))

    def _forward(self, *, training: bool) -> Forward:
        graph = self._graph()
        q, k, v = (self._tensor(graph, name, shape) for name, shape in self._inputs(("q", "k", "v")))
        out, stats = graph.sdpa(q=q, k=k, v=v, is_inference=not training, **self.options)
        self._emit(out, self.q_shape)
        if training:
            self._emit(stats, self.stats_shape, self.float)
        return Forward(self._planned(graph), (q, k, v), out, stats if training else None)

    def _graph(self) -> Any:
        return self.cudnn.pygraph(
            io_data_type=self.dtype, intermediate_data_type=self.float, compute_data_type=self.float
        )

    def _inputs(self, names: tuple[str, ...]) -> list[tuple[str, tuple[int, ...]]]:
        return [(name, self.k_shape if name in ("k", "v") else self.q_shape) for name in names]

    def _tensor(self, graph: Any, name: str, shape: tuple[int, ...], dtype: Any = None) -> Any:
        return graph.tensor(name=name, dim=shape, stride=_strides(shape), data_type=dtype or self.dtype)

    def _emit(self, node: Any, shape: tuple[int, ...], dtype: Any = None) -> None:
        node.set_output(True).set_dim(shape).set_stride(_strides(shape)).set_data_type(dtype or self.dtype)

    def _planned(self, graph: Any) -> Any:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        graph.check_support()
        if self.plans:
            graph.build_plans()
        return graph

    @cached_property
    def _handle(self) -> Any:
        return self.cudnn.create_handle()

    def run(self, graph: Any, pack: Pack, like: Tensor) -> None:
        """Executes a graph on the current stream."""
        self.cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream().cuda_stream)
        workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=like.device)
        graph.execute(pack, workspace, handle=self._handle)


@dataclass(frozen=True)
class Forward:
    graph: Any
    inputs: tuple[Any, ...]
    out: Any
    stats: Any


@dataclass(frozen=True)
class Backward:
    graph: Any
    inputs: tuple[Any, ...]
    stats: Any
    grads: tuple[Any, ...]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, graphs: Graphs) -> Tensor:
        out, forward = torch.empty_like(q), graphs.training
        stats = torch.empty(graphs.stats_shape, dtype=torch.float32, device=q.device)
        pack = dict(zip(forward.inputs, (q, k, v), strict=True)) | {forward.out: out, forward.stats: stats}
        graphs.run(forward.graph, pack, q)
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.graphs = graphs
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, stats = ctx.saved_tensors
        grads, backward = tuple(torch.empty_like(x) for x in (q, k, v)), ctx.graphs.backward
        pack = dict(zip(backward.inputs, (q, k, v, out, grad_outputs[0].contiguous()), strict=True))
        ctx.graphs.run(
            backward.graph, pack | {backward.stats: stats} | dict(zip(backward.grads, grads, strict=True)), q
        )
        return *grads, None


def build(case: Case, *, deterministic: bool = False) -> Attention:
    graphs = Graphs(case, deterministic=deterministic)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.requires_grad:
            return _Attention.apply(q, k, v, graphs)  # pyright: ignore[reportReturnType]
        out, forward = torch.empty_like(q), graphs.inference
        graphs.run(forward.graph, dict(zip(forward.inputs, (q, k, v), strict=True)) | {forward.out: out}, q)
        return out

    return attention


def objects(deterministic: bool, ask: Ask) -> str | None:
    """What cuDNN says when it is asked whether it has a plan; none is built."""
    try:
        graphs = Graphs(ask.case, deterministic=deterministic, plans=False)
        _ = (graphs.training, graphs.backward) if ask.backward else graphs.inference
    except Exception as error:
        said = printable(str(error).strip().partition("\n")[0]) or type(error).__name__
        return said + (REMEDY if "Multiple libcudart" in said else "")
    return None


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


SUPPORT = {
    "cuda": Support(SIXTEEN_BIT, head_dims=HeadDims(least=8, most=256, multiple_of=8), blind=(), capability=(8, 0))
}
BACKENDS = {
    name: Backend(
        name, about, partial(build, deterministic=deterministic), PACKAGES["cudnn"].version, SUPPORT, PACKAGES["cudnn"],
        objects=partial(objects, deterministic), memory_model="sdpa-cudnn", compiles=True, own_kernels=("cudnn",),
    )
    for name, deterministic, about in (
        ("cudnn-frontend", False, "cuDNN's attention by its Python frontend"),
        ("cudnn-frontend-deterministic", True, "cuDNN's attention by its Python frontend, its backward deterministic"),
    )
}  # fmt: skip
