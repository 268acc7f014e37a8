"""The few lines of Python that call a backend on a case."""

from __future__ import annotations

import math
from collections.abc import Sequence

from attnbench.case import Case

# Three-dimensional, as it was measured: of four dimensions torch.compile makes scaled_dot_product_attention.
_WRITTEN_OUT = """\
import math

import torch


def attention(q, k, v):
    (B, H, N, d), (G, M) = q.shape, k.shape[1:3]
    scores = torch.bmm(q.reshape(B * G, -1, d), k.reshape(B * G, M, d).transpose(1, 2)) / math.sqrt(d)
{hidden}    WEIGHTS
    return torch.bmm(weights, v.reshape(B * G, M, d)).view(q.shape)


out = attention(q, k, v)
"""
_NAIVE = """\
exponentials = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    weights = exponentials / exponentials.sum(dim=-1, keepdim=True)"""
_EAGER = _WRITTEN_OUT.replace("WEIGHTS", "weights = torch.softmax(scores, dim=-1)")
_SDPA = """\
{lower_right}from torch.nn.functional import scaled_dot_product_attention

out = scaled_dot_product_attention(q, k, v{sdpa})
"""
_PINNED = """\
from torch.nn.attention import SDPBackend, sdpa_kernel
{lower_right}from torch.nn.functional import scaled_dot_product_attention

with sdpa_kernel(SDPBackend.KERNEL):
    out = scaled_dot_product_attention(q, k, v{sdpa})
"""
_FLEX = """\
import torch
from torch.nn.attention.flex_attention import {create_mask}flex_attention

{block_mask}attention = torch.compile(flex_attention, fullgraph=True, dynamic=False)
out = attention(q, k, v{flex})
"""
_FLEX_SCORE = """\
import math

import torch
from torch.nn.attention.flex_attention import flex_attention

{hide}attention = torch.compile(flex_attention, fullgraph=True, dynamic=False)
out = attention(q, k, v{flex_score})
"""
# Packages that take (batch, seq, heads, head_dim).
_FLASH_ATTN = """\
from MODULE import flash_attn_func

out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal={causal}SWITCH)TAIL
out = out.transpose(1, 2)
"""
_OWN = """\
from attnbench import attention

out = attention(q, k, v, causal={causal})
"""
_JAX = """\
import jax
{jax_precision}
attention = jax.jit(jax.nn.dot_product_attention, static_argnames=("is_causal", "implementation"))
q, k, v = (jax.dlpack.from_dlpack(x.detach().transpose(1, 2).contiguous()) for x in (q, k, v))
out = attention(q, k, v{jax_mask}, implementation="KIND").transpose(0, 2, 1, 3)
"""


def _flash_attn(module: str, tail: str = "") -> dict[bool, str]:
    """Without and with its deterministic backward."""
    code = _FLASH_ATTN.replace("MODULE", module).replace("TAIL", tail)
    return {switch: code.replace("SWITCH", ", deterministic=True" * switch) for switch in (False, True)}


_FA2, _FA3, _FA4 = _flash_attn("flash_attn"), _flash_attn("flash_attn_interface"), _flash_attn("flash_attn.cute", "[0]")

SNIPPETS: dict[str, str] = {
    "naive": _WRITTEN_OUT.replace("WEIGHTS", _NAIVE),
    "eager": _EAGER,
    "compile": _EAGER.replace("\nout", "\nattention = torch.compile(attention, fullgraph=True, dynamic=False)\nout"),
    "compile-max-autotune": _EAGER.replace(
        "\nout",
        '\nattention = torch.compile(attention, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")\nout',
    ),
    "sdpa": _SDPA,
    "sdpa-math": _PINNED.replace("KERNEL", "MATH"),
    "sdpa-flash": _PINNED.replace("KERNEL", "FLASH_ATTENTION"),
    "sdpa-efficient": _PINNED.replace("KERNEL", "EFFICIENT_ATTENTION"),
    "sdpa-cudnn": _PINNED.replace("KERNEL", "CUDNN_ATTENTION"),
    "flex": _FLEX,
    "flex-causal-score": _FLEX_SCORE,
    "attnbench": _OWN,
    "flash-attn-2": _FA2[False],
    "flash-attn-2-deterministic": _FA2[True],
    "flash-attn-3": _FA3[False],
    "flash-attn-3-deterministic": _FA3[True],
    "flash-attn-4": _FA4[False],
    "flash-attn-4-deterministic": _FA4[True],
    "jax-xla": _JAX.replace("KIND", "xla"),
    "jax-cudnn": _JAX.replace("KIND", "cudnn"),
}
"""Code that makes `out` of q, k and v, by backend; what depends on the case stands in braces (`_details`)."""

_HIDDEN = """\
    hidden = torch.ones(N, M, dtype=torch.bool, device=q.device).triu(M - N + 1)
    scores = scores.view(-1, N, M).masked_fill(hidden, -math.inf).view_as(scores)
"""
_BLOCK_MASK = """\

def sees(batch, head, query, key):
    return query{offset} >= key


mask = create_block_mask(sees, None, None, {N}, {M}, device=str(q.device))
"""
_TF32 = 'torch.set_float32_matmul_precision("high")'
_WORKSPACE = 'os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before the first call on the GPU'
_DETERMINISTIC = "torch.use_deterministic_algorithms(True)"
_HIDE = """\

def hide(score, batch, head, query, key):
    return torch.where(query{offset} >= key, score, -math.inf)


"""
_JAX_MASK = "jax.numpy.tril(jax.numpy.ones((1, 1, {N}, {M}), dtype=bool), {M} - {N})"
_JAX_TF32 = '\njax.config.update("jax_default_matmul_precision", "tensorfloat32")'


def snippet(backend: str, case: Case, source: str | None = None, deterministic_on: str | None = None) -> str:
    """Python that calls a backend on q, k and v of a case, giving `out`.

    `source` tells where a decorated function stands, as `FILE.py:function`. A name that neither has code here nor is a
    function's place is built as it was for measuring. `deterministic_on` names the device type on which gradients have
    to be the same each time.
    """
    where = source or backend
    if backend in SNIPPETS:
        code = SNIPPETS[backend].format(**_details(case))
    elif ":" in where:
        code = _import(where) + f"(q, k, v, causal={case.causal}, scale={1 / math.sqrt(case.d_model)!r})"
        code += "  # leave out what it does not take\n"
    else:
        code = (
            f"from attnbench import Case\nfrom attnbench.backends import load\nfrom attnbench.inputs import Inputs\n"
            f"from attnbench.measure.call import make_call\n\n"
            f"backend = load({backend!r})\n"
            f"call = make_call(backend, backend.build({case!r}), Inputs(q, k, v, do=q))\n"
            f"out = call.output(call.forward())\n"
        )
    settings = [_TF32] if case.precision == "tf32" and not backend.startswith("jax-") else []
    if deterministic_on:
        settings += [_WORKSPACE, _DETERMINISTIC] if deterministic_on == "cuda" else [_DETERMINISTIC]
    return _with_settings(code, settings) if settings else code


def _with_settings(code: str, settings: Sequence[str]) -> str:
    """The code with settings after its imports, and with the modules that they need."""
    if "import torch\n" not in code:
        code = f"import torch\n{code}"
    imported = code.index("\n\n", code.index("import torch\n"))
    code = code[:imported] + "\n\n" + "\n".join(settings) + code[imported:]
    if _WORKSPACE not in settings:
        return code
    own = "import math\n" if code.startswith("import math\n") else ""
    return f"{own}import os\n" + (code.removeprefix(own) if own else f"\n{code}")


def _details(case: Case) -> dict[str, str]:
    """What a case puts into a snippet. SDPA's own mask is the triangle of equal lengths; others align bottom right."""
    triangle, offset = case.seq_len == case.kv_len, case.kv_len - case.seq_len
    mask = ", is_causal=True" if triangle else f", attn_mask=causal_lower_right({case.seq_len}, {case.kv_len})"
    grouped = ", enable_gqa=True" if case.heads != case.kv_heads else ""
    of_mask = {
        "hidden": _HIDDEN,
        "lower_right": "" if triangle else "from torch.nn.attention.bias import causal_lower_right\n",
        "sdpa": mask,
        "create_mask": "create_block_mask, ",
        "block_mask": _BLOCK_MASK.format(offset=f" + {offset}" if offset else "", N=case.seq_len, M=case.kv_len),
        "flex": ", block_mask=mask",
        "hide": _HIDE.format(offset=f" + {offset}" if offset else ""),
        "flex_score": ", score_mod=hide",
        "jax_mask": ", is_causal=True" if triangle else f", mask={_JAX_MASK.format(N=case.seq_len, M=case.kv_len)}",
    }
    details = (of_mask if case.causal else dict.fromkeys(of_mask, "")) | {
        "causal": str(case.causal),
        "jax_precision": _JAX_TF32 if case.precision == "tf32" else "",
    }
    return details | {name: details[name] + grouped for name in ("sdpa", "flex", "flex_score")}


def _import(where: str) -> str:
    """Lines that import a user's function, the last of them up to its call."""
    place, _, function = where.rpartition(":")
    folder, _, file = place.rpartition("/")
    module = file.removesuffix(".py") if place.endswith(".py") else place
    on_path = f"import sys\n\nsys.path.insert(0, {folder!r})\n" if module != place and folder else ""
    if all(part.isidentifier() for part in module.split(".")):
        return f"{on_path}from {module} import {function.partition('.')[0]}\n\nout = {function}"
    return f"{on_path}from importlib import import_module\n\nout = import_module({module!r}).{function}"
