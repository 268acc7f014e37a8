"""Attention written out in tensor operations: `naive`, `eager`, and `compile`, which is `eager` compiled.

The work is done on three-dimensional tensors, (batch · kv_heads, group · seq_len, d_model), where group is the number
of query heads that share a key head. That is how the first such benchmark was written, it serves grouped-query attention
without copies of k and v, and it keeps `torch.compile` from replacing the whole by SDPA, which would measure SDPA twice.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from attnbench.backends import Attention, Backend, Support
from attnbench.case import Case


def softmax_naive(scores: Tensor) -> Tensor:
    """Softmax in four steps, each a pass over memory: max, exp, sum, divide."""
    exponentials = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return exponentials / exponentials.sum(dim=-1, keepdim=True)


def softmax_torch(scores: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1)


def written_out(case: Case, softmax: Callable[[Tensor], Tensor]) -> Attention:
    B, H, G, N, M, d = case.batch, case.heads, case.kv_heads, case.seq_len, case.kv_len, case.d_model
    scale = 1 / math.sqrt(d)

    def attention(q_BHNd: Tensor, k_BGMd: Tensor, v_BGMd: Tensor) -> Tensor:
        q = q_BHNd.reshape(B * G, H // G * N, d)
        k, v = k_BGMd.reshape(B * G, M, d), v_BGMd.reshape(B * G, M, d)
        scores = torch.bmm(q, k.transpose(1, 2)) * scale
        if case.causal:
            hidden_NM = torch.ones(N, M, dtype=torch.bool, device=q.device).triu(M - N + 1)
            scores = scores.view(B * G, H // G, N, M).masked_fill(hidden_NM, -math.inf).view(scores.shape)
        return torch.bmm(softmax(scores), v).view(B, H, N, d)

    return attention


def naive(case: Case) -> Attention:
    return written_out(case, softmax_naive)


def eager(case: Case) -> Attention:
    return written_out(case, softmax_torch)


def compiled(case: Case) -> Attention:
    return torch.compile(eager(case), fullgraph=True, dynamic=False)


def autotuned(case: Case) -> Attention:
    """Every choice of the compiler's timed on this device, for minutes; without CUDA graphs, which --graph is for."""
    return torch.compile(eager(case), fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")


def no_compiler(device: str) -> str | None:
    """Why `torch.compile` cannot generate code for the device here; None if it can."""
    if device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        return "torch.compile needs a C++ compiler on CPU: install g++ or set CXX"
    if device == "cuda" and not torch.utils._triton.has_triton_package():  # pyright: ignore[reportAttributeAccessIssue]
        return "torch.compile needs the package triton on CUDA"
    return None


def torch_version() -> str:
    return f"torch {torch.__version__}"


NO_BLIND = Support(blind=())
"""Softmax over no keys is not a number."""

SUPPORT = {"cpu": NO_BLIND, "cuda": NO_BLIND}
GENERATED = ("triton_", "compiledfxgraph")
BACKENDS = {
    "naive": Backend(
        "naive", "every score materialised, softmax as max, exp, sum, divide", naive, torch_version, SUPPORT,
        memory_model="naive", rehearsable=True,
    ),
    "eager": Backend(
        "eager", "every score materialised, torch.softmax", eager, torch_version, SUPPORT,
        memory_model="eager", rehearsable=True,
    ),
    "compile": Backend(
        "compile", "torch.compile of eager, anew for each shape", compiled, torch_version, SUPPORT,
        lacks=no_compiler, memory_model="compile", compiles=True, own_kernels=GENERATED,
    ),
    "compile-max-autotune": Backend(
        "compile-max-autotune", "compile, in mode max-autotune-no-cudagraphs", autotuned, torch_version, SUPPORT,
        lacks=no_compiler, memory_model="compile", compiles=True, own_kernels=GENERATED,
    ),
}  # fmt: skip
