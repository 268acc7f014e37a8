"""JAX: XLA's attention, cuDNN by way of `jax.nn`, and the Mosaic kernels for Hopper that ship inside JAX."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from attnbench.backends import Ask, Attention, Backend, Support
from attnbench.backends.packages import PACKAGES
from attnbench.backends.support import SIXTEEN_BIT, HeadDims
from attnbench.case import Case

JAX = PACKAGES["jax"]
MATMUL_PRECISION = {"ieee": "highest", "tf32": "tensorfloat32"}
"""What a case's precision is called in JAX, which by itself takes products of float32 as the device is fastest."""


def xla(case: Case) -> Callable[..., Any]:
    import jax

    offset, scale = case.kv_len - case.seq_len, 1 / math.sqrt(case.d_model)
    triangle = offset == 0

    def attention(q: Any, k: Any, v: Any) -> Any:
        mask = None
        if case.causal and not triangle:  # is_causal aligns to the top left
            mask = jax.numpy.tril(jax.numpy.ones((1, 1, case.seq_len, case.kv_len), dtype=bool), offset)
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, scale=scale, is_causal=case.causal and triangle, implementation="xla"
        )

    return attention


def cudnn(case: Case) -> Callable[..., Any]:
    import jax

    return partial(
        jax.nn.dot_product_attention,
        scale=1 / math.sqrt(case.d_model),
        is_causal=case.causal,
        implementation="cudnn",
    )


MOSAIC = "jax.experimental.pallas.ops.gpu.attention_mgpu"
BLOCK = 64
"""Queries and keys of a tile; two groups of warps take one each. The least there is, so that most cases can be taken."""


def mosaic(case: Case) -> Callable[..., Any]:
    """Its kernels know no scale: q is scaled before."""
    kernels: Any = importlib.import_module(MOSAIC)
    blocks = dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), BLOCK)
    config = kernels.TuningConfig(
        block_q=BLOCK, block_kv=BLOCK, max_concurrent_steps=2, causal=case.causal, **({} if case.causal else blocks)
    )
    scale = 1 / math.sqrt(case.d_model)

    def attention(q: Any, k: Any, v: Any) -> Any:
        return kernels.attention(q * scale, k, v, config)

    return attention


def build(make: Callable[[Case], Callable[..., Any]], case: Case) -> Attention:
    from attnbench.measure.jax_call import JaxAttention

    return JaxAttention(make(case), MATMUL_PRECISION[case.precision])  # pyright: ignore[reportReturnType]


def lacks(device: str) -> str | None:
    import jax

    try:
        jax.devices(device)
    except RuntimeError:
        return f"jax {jax.__version__} was installed without CUDA; pip install 'jax[cuda13]'"
    return None


def lacks_mosaic(device: str) -> str | None:
    if reason := lacks(device):
        return reason
    try:
        importlib.import_module(MOSAIC)
    except Exception as error:
        return f"importing {MOSAIC} raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def xla_objects(ask: Ask) -> str | None:
    """jax.nn asks for products of float16 with sums of float32, and XLA makes none of them with a vector on a GPU."""
    if ask.device == "cuda" and ask.case.dtype == "float16":
        for name in ("seq_len", "kv_len", "d_model"):
            if getattr(ask.case, name) == 1:
                return f"multiplies no float16 with vectors, and {name} is 1"
    return None


def cudnn_objects(ask: Ask) -> str | None:
    for name in ("seq_len", "kv_len"):
        if ask.backward and (length := getattr(ask.case, name)) % 2:
            return (
                f"has a backward for {name} that are even, not {length}; ask for the forward alone with --pass forward"
            )
    if ask.capability is not None and ask.capability < (9, 0):
        return HeadDims(most=128).reason_against(ask.case.d_model)
    return None


def mosaic_objects(ask: Ask) -> str | None:
    case = ask.case
    if case.causal and ask.backward:
        return "has no backward of a causal mask; ask for the forward alone with --pass forward"
    for name, multiple in (("seq_len", 2 * BLOCK), ("kv_len", BLOCK)):
        if (length := getattr(case, name)) % multiple:
            return f"takes {name} that are multiples of {multiple}, not {length}"
    return None


# The masks that JAX itself makes are aligned to the top left, and none of them promises zeros for queries without keys.
# On a CPU there are no products of float16.
XLA = Support(("float32", *SIXTEEN_BIT), blind=())
SUPPORT = {
    "jax-xla": {"cpu": replace(XLA, dtypes=("float32", "bfloat16")), "cuda": XLA},
    "jax-cudnn": {
        "cuda": Support(
            SIXTEEN_BIT, head_dims=HeadDims(8, 256, 8), causal_unequal=False, blind=(), capability=(8, 0),
        )
    },
    "jax-mosaic": {
        "cuda": Support(
            ("float16",), head_dims=HeadDims(64, 256, 64), causal_unequal=False, blind=(),
            capability=(9, 0), capability_below=(10, 0),
        )
    },
}  # fmt: skip


def _backend(name: str, about: str, make: Callable[[Case], Callable[..., Any]], **more: Any) -> Backend:
    common = Backend(
        name, about, partial(build, make), JAX.version, SUPPORT[name], JAX,
        lacks=lacks, layout="BNHd", framework="jax", compiles=True,
    )  # fmt: skip
    return replace(common, **more)


BACKENDS = {
    found.name: found
    for found in (
        _backend("jax-xla", "jax.nn.dot_product_attention, compiled by XLA", xla, objects=xla_objects),
        _backend(
            "jax-cudnn", "jax.nn.dot_product_attention by cuDNN", cudnn,
            objects=cudnn_objects, memory_model="sdpa-cudnn", own_kernels=("cudnn",),
        ),
        _backend(
            "jax-mosaic", "the Mosaic kernels for Hopper that ship inside JAX", mosaic,
            lacks=lacks_mosaic, objects=mosaic_objects,
        ),
    )
}  # fmt: skip
