"""FlashAttention 2, 3 and 4 from their own packages, each also with its deterministic backward."""

from __future__ import annotations

import importlib
import math
from functools import partial
from typing import Any

from torch import Tensor

from attnbench.backends import Ask, Attention, Backend, Support
from attnbench.backends.packages import PACKAGES
from attnbench.backends.sdpa import FLASH
from attnbench.backends.support import SIXTEEN_BIT, HeadDims
from attnbench.case import Case


def build(package: str, case: Case, **switches: bool) -> Attention:
    """All three are called alike, on (batch, seq, heads, head_dim), mask to the bottom right, and share key heads."""
    function: Any = importlib.import_module(PACKAGES[package].module).flash_attn_func
    scale = 1 / math.sqrt(case.d_model)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v, softmax_scale=scale, causal=case.causal, **switches)
        return out[0] if isinstance(out, tuple) else out  # version 4 gives the log-sum-exp along with it, 3 once did

    return attention


PADDED_8 = HeadDims(least=8, most=256, multiple_of=8)
SUPPORT = {
    "flash_attn": Support(SIXTEEN_BIT, head_dims=FLASH, capability=(8, 0)),
    "flash_attn_3": Support(
        SIXTEEN_BIT, head_dims=HeadDims(8, 256, 8, kernels=(64, 96, 128, 192, 256)),
        capability=(9, 0), capability_below=(10, 0),
    ),
    # On Hopper up to 256; on Blackwell up to 128, and 256: which it is, it is asked (`objects`).
    "flash_attn_4": Support(SIXTEEN_BIT, head_dims=PADDED_8, capability=(9, 0)),
}  # fmt: skip
NAMES = {"flash_attn": "flash-attn-2", "flash_attn_3": "flash-attn-3", "flash_attn_4": "flash-attn-4"}
ABOUT = {
    "flash_attn": "FlashAttention-2",
    "flash_attn_3": "FlashAttention-3 (Hopper)",
    "flash_attn_4": "FlashAttention-4",
}
LARGEST_DETERMINISTIC = {"flash_attn_3": 192}
"""Head dimensions up to which there is a deterministic backward, where not all have one."""


def objects(package: str, deterministic: bool, ask: Ask) -> str | None:
    d_model, largest = ask.case.d_model, LARGEST_DETERMINISTIC.get(package)
    if deterministic and largest is not None and d_model > largest:
        return f"has a deterministic backward for head dimensions up to {largest}, not {d_model}"
    if package != "flash_attn_4" or ask.capability is None:
        return None
    if (10, 0) <= ask.capability < (12, 0) and 128 < d_model != 256:
        return f"takes head dimensions up to 128, and 256, on this GPU, not {d_model}"
    if deterministic and ask.capability >= (12, 0):
        return "has no deterministic backward on this GPU"
    return None


def _backend(package: str, deterministic: bool) -> Backend:
    switches = {"deterministic": True} if deterministic else {}
    return Backend(
        NAMES[package] + "-deterministic" * deterministic,
        f"{ABOUT[package]} from package {PACKAGES[package].name}" + ", its backward deterministic" * deterministic,
        partial(build, package, **switches),
        PACKAGES[package].version,
        {"cuda": SUPPORT[package]},
        PACKAGES[package],
        objects=partial(objects, package, deterministic),
        layout="BNHd",
        memory_model="sdpa-flash",
        compiles=package == "flash_attn_4",
        own_kernels=("flash",),
    )


BACKENDS = {found.name: found for package in NAMES for found in (_backend(package, False), _backend(package, True))}
