"""`flex`: FlexAttention, compiled for each shape, causal by a block mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attnbench.backends import Ask, Attention, Backend
from attnbench.backends.written_out import no_compiler, torch_version
from attnbench.case import Case


def build(case: Case) -> Attention:
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    offset, grouped = case.kv_len - case.seq_len, case.heads != case.kv_heads

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query + offset >= key

    mask = None

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal mask
        if case.causal and mask is None:  # made once, on the tensors' device: users keep it across layers and steps
            mask = create_block_mask(sees, None, None, case.seq_len, case.kv_len, device=str(q.device))
        return compiled(q, k, v, block_mask=mask, enable_gqa=grouped)  # pyright: ignore[reportReturnType]

    return attention


def refuses(ask: Ask) -> str | None:
    case = ask.case
    if ask.device == "cpu" and ask.backward:
        return "FlexAttention has no backward on CPU; ask for the forward alone with --pass forward"
    if ask.device == "cpu" and case.precision == "tf32":
        return "tf32 is a mode of CUDA's tensor cores"
    if case.dtype == "float64":
        return "FlexAttention's kernels take float32, float16 and bfloat16, not float64"
    if case.d_model < 16 and ask.device == "cuda":
        return f"FlexAttention's kernels take head dimensions of 16 and more, not {case.d_model}"
    return None


BACKENDS = {
    "flex": Backend(
        "flex", "FlexAttention, compiled anew for each shape", build, torch_version,
        unavailable=no_compiler, refuses=refuses, memory_model="flex", compiles=True,
        own_kernels=("flex_attention", "compiledfxgraph"),
    )
}  # fmt: skip
