"""attnbench's own fused attention (`attnbench.kernels`), in Triton."""

from __future__ import annotations

import importlib.util
from importlib import metadata

from torch import Tensor

from attnbench import __version__
from attnbench.backends import Attention, Backend, Support
from attnbench.backends.sdpa import ALL_BUT_FLOAT64
from attnbench.backends.support import HeadDims
from attnbench.case import Case

PRECISION = {"ieee": "fp16x3", "tf32": "tf32"}
"""The scheme of float32 products that has the accuracy a case asks for; 16-bit types have one way of their own."""


def build(case: Case) -> Attention:
    from attnbench.kernels import attention as fused  # loads Triton, which need not be there

    precision = PRECISION[case.precision]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fused(q, k, v, causal=case.causal, precision=precision)

    return attention


def no_triton(device: str) -> str | None:
    return None if importlib.util.find_spec("triton") else f"needs the package triton on {device.upper()}"


def version() -> str:
    return f"attnbench {__version__}, triton {metadata.version('triton')}"


BACKENDS = {
    "attnbench": Backend(
        "attnbench", "attnbench's own fused attention, in Triton", build, version,
        {"cuda": Support(
            ALL_BUT_FLOAT64, head_dims=HeadDims(most=256, kernels=(16, 32, 64, 128, 256)), blind=ALL_BUT_FLOAT64,
            capability=(8, 0),
        )},
        lacks=no_triton, memory_model="attnbench", compiles=True, own_kernels=("attnbench_forward",),
    ),
}  # fmt: skip
