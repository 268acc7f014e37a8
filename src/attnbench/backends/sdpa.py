"""`torch.nn.functional.scaled_dot_product_attention`, left to its own choice (`sdpa`) or pinned to one kernel family."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from attnbench.backends import Ask, Attention, Backend, Support
from attnbench.backends.support import SIXTEEN_BIT, HeadDims
from attnbench.backends.written_out import torch_version
from attnbench.case import Case

PINNED = {
    "sdpa-math": SDPBackend.MATH,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}
TORCH_SAYS = {
    "sdpa-flash": can_use_flash_attention,
    "sdpa-efficient": can_use_efficient_attention,
    "sdpa-cudnn": can_use_cudnn_attention,
}
OWN_KERNELS = {
    "sdpa-math": ("softmax",),
    "sdpa-flash": ("flash_fwd", "flash_attention_for_cpu"),
    "sdpa-efficient": ("fmha",),
    "sdpa-cudnn": ("cudnn",),
}
ALL_BUT_FLOAT64 = ("float32", *SIXTEEN_BIT)
FLASH = HeadDims(most=256, kernels=(32, 64, 96, 128, 192, 256))
"""The sizes for which FlashAttention-2's kernels are made."""

SUPPORT = {
    # The flash kernel sees to queries that see no key; what the dispatcher takes for float32 does not.
    "sdpa": {"cpu": Support(), "cuda": Support(blind=("float64", *SIXTEEN_BIT))},
    "sdpa-math": {"cpu": Support(), "cuda": Support()},
    # On CPU a causal mask over unequal lengths is materialised, which is no longer the flash kernel.
    "sdpa-flash": {"cpu": Support(causal_unequal=False), "cuda": Support(SIXTEEN_BIT, head_dims=FLASH)},
    "sdpa-efficient": {"cuda": Support(ALL_BUT_FLOAT64, blind=())},
    "sdpa-cudnn": {"cuda": Support(SIXTEEN_BIT, blind=())},
}


def build(name: str, case: Case) -> Attention:
    # is_causal aligns the mask to the top left; with unequal lengths a case means the bottom right.
    aligned = case.seq_len == case.kv_len
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of NaN for queries that see no key; which kernels give them is known
        mask = causal_lower_right(case.seq_len, case.kv_len) if case.causal and not aligned else None
    grouped = case.heads != case.kv_heads

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(PINNED[name]) if name in PINNED else nullcontext():
            return scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=case.causal and aligned, enable_gqa=grouped
            )

    return attention


def objects(name: str, ask: Ask) -> str | None:
    """On CUDA torch is asked, and answers in its own words."""
    return torch_refuses(name, ask) if name in TORCH_SAYS and ask.device == "cuda" else None


def torch_refuses(name: str, ask: Ask) -> str | None:
    """The reason `can_use_*_attention` gives for tensors of the case's shape on the current GPU; None if it takes them."""
    case, dtype = ask.case, getattr(torch, ask.case.dtype)
    sizes = [(case.heads, case.seq_len), (case.kv_heads, case.kv_len), (case.kv_heads, case.kv_len)]
    try:
        q, k, v = (
            torch.empty(case.batch, heads, length, case.d_model, dtype=dtype, device="cuda", requires_grad=ask.backward)
            for heads, length in sizes
        )
    except torch.OutOfMemoryError:
        return None  # not for want of support: running the cell tells where memory ends
    causal = case.causal and case.seq_len == case.kv_len
    params = SDPAParams(q, k, v, None, 0.0, causal, case.heads != case.kv_heads)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if TORCH_SAYS[name](params, True):
            return None
    words = [str(warning.message).split(" (Triggered internally")[0].strip() for warning in told]
    return " ".join(words) or "torch takes another kernel for this case and does not say why"


ABOUT = {
    "sdpa": "scaled_dot_product_attention, the dispatcher's choice of kernel",
    "sdpa-math": "SDPA pinned to its reference in tensor operations",
    "sdpa-flash": "SDPA pinned to FlashAttention-2 (on CPU, to the flash kernel of ATen)",
    "sdpa-efficient": "SDPA pinned to the memory-efficient kernels from xFormers",
    "sdpa-cudnn": "SDPA pinned to cuDNN",
}
BACKENDS = {
    name: Backend(
        name,
        about,
        partial(build, name),
        torch_version,
        SUPPORT[name],
        objects=partial(objects, name),
        memory_model=name,
        rehearsable=name == "sdpa-math",
        own_kernels=OWN_KERNELS.get(name, ()),
    )
    for name, about in ABOUT.items()
}
