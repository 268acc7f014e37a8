"""From tensors to kernels: results, halves, strides, tiles and grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from attnbench.kernels.portable import backward as backwards
from attnbench.kernels.portable import forward as forwards
from attnbench.kernels.portable import operands
from attnbench.kernels.portable.arithmetic import HALVES
from attnbench.kernels.portable.tiles import Tile, tile

forward_kernel: Any = forwards.forward_kernel
backward_dq_kernel: Any = backwards.backward_dq_kernel
backward_dkdv_kernel: Any = backwards.backward_dkdv_kernel
magnitudes_kernel: Any = operands.magnitudes_kernel
halves_kernel: Any = operands.halves_kernel

LOG2_E = math.log2(math.e)

ELEMENTS = 8192
"""Of an operand, in a program that looks at each once."""


def forward_results(q: Tensor, k: Tensor, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for the output (as q), the logsumexp (B, H, N) and the magnitudes of q, k and v (3, B, G)."""
    batch, heads, seq_len, _ = q.shape
    operands = 3 if precision in HALVES else 0
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty((batch, heads, seq_len), dtype=torch.float32),
        q.new_empty((operands, batch, k.shape[1]), dtype=torch.int32),
    )


def backward_results(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for dq, dk and dv."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, H, N, D), its logsumexp to base 2 (B, H, N), and the magnitudes by which operands are scaled, as bits."""
    out, logsumexp, magnitudes = forward_results(q, k, precision)
    batch, heads, seq_len, head_dim = q.shape
    if precision in HALVES:
        magnitudes.zero_()
        for into, x in zip(magnitudes, (q, k, v), strict=True):
            _magnitudes(x, into)
    of_q, of_k, of_v = _each(magnitudes, 3)
    (k, k_to_low), (v, v_to_low) = (_streamed(x, own, precision) for x, own in ((k, of_k), (v, of_v)))
    chosen = tile("forward", head_dim, precision, q.device)
    forward_kernel[(triton.cdiv(seq_len, chosen.queries), batch * heads)](
        q, k, v, out, logsumexp, of_q, of_k, of_v, k_to_low, v_to_low,
        *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3],
        heads, k.shape[1], seq_len, k.shape[2], abs(scale) * LOG2_E,
        **_constants(head_dim, precision, causal, scale, chosen),
    )  # fmt: skip
    return out, logsumexp, magnitudes


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor, logsumexp: Tensor, magnitudes: Tensor,
    causal: bool, scale: float, precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv, each of its tensor's shape, contiguous."""
    dq, dk, dv = backward_results(q, k, v)
    batch, heads, seq_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    delta = torch.empty_like(logsumexp)
    if precision in HALVES:
        of_do = magnitudes.new_zeros((batch, kv_heads))
        _magnitudes(d_out, of_do)
        known = [*magnitudes, of_do]
    else:
        known = _each(magnitudes, 4)
    of_q, of_k, of_v, of_do = known
    sizes = (heads, kv_heads, seq_len, kv_len, abs(scale) * LOG2_E, scale)
    bound = {"LOG2_D": (head_dim - 1).bit_length()}

    chosen = tile("dq", head_dim, precision, q.device)
    (k_parts, k_to_low), (v_parts, v_to_low) = (_streamed(x, own, precision) for x, own in ((k, of_k), (v, of_v)))
    backward_dq_kernel[(triton.cdiv(seq_len, chosen.queries), batch * heads)](
        q, k_parts, v_parts, out, d_out, logsumexp, delta, dq, *known, k_to_low, v_to_low,
        *q.stride(), *k_parts.stride(), *v_parts.stride(), *out.stride()[:3], *d_out.stride(), *sizes,
        **_constants(head_dim, precision, causal, scale, chosen), **bound,
    )  # fmt: skip
    del k_parts, v_parts

    chosen = tile("dkdv", head_dim, precision, q.device)
    (q_parts, q_to_low), (do_parts, do_to_low) = (
        _streamed(x, own, precision) for x, own in ((q, of_q), (d_out, of_do))
    )
    backward_dkdv_kernel[(triton.cdiv(kv_len, chosen.keys), batch * kv_heads)](
        q_parts, k, v, do_parts, logsumexp, delta, dk, dv, *known, q_to_low, do_to_low,
        *q_parts.stride(), *k.stride(), *v.stride(), *dk.stride()[:3], *do_parts.stride(), *sizes,
        **_constants(head_dim, precision, causal, scale, chosen), **bound,
    )  # fmt: skip
    return dq, dk, dv


# --- operands ---------------------------------------------------------------------------------------------------------


def _magnitudes(x: Tensor, into: Tensor) -> None:
    """Raises the magnitudes `into` (B, G), as bits, to the largest in x (B, H, N, D) of the heads that share a key head."""
    batch, heads, rows, head_dim = x.shape
    block_d = _block_d(head_dim)
    block = ELEMENTS // block_d
    magnitudes_kernel[(triton.cdiv(rows, block), batch * heads)](
        x, into, *x.stride(), heads, into.shape[1], rows, D=head_dim, BLOCK=block, BLOCK_D=block_d
    )


def _streamed(x: Tensor, magnitudes: Tensor, precision: str) -> tuple[Tensor, int]:
    """What a kernel streams over for x (B, H, N, D): x itself, or its first halves and how far behind the second lie."""
    if precision not in HALVES:
        return x, 0
    batch, heads, rows, head_dim = x.shape
    parts = x.new_empty((HALVES[precision], *x.shape), dtype=torch.float16)
    block_d = _block_d(head_dim)
    block = ELEMENTS // block_d
    halves_kernel[(triton.cdiv(rows, block), batch * heads)](
        x, parts, magnitudes, parts.stride(0), *x.stride(), heads, magnitudes.shape[1], rows,
        D=head_dim, BLOCK=block, BLOCK_D=block_d, PARTS=len(parts),
    )  # fmt: skip
    return parts[0], parts.stride(0)


def _each(magnitudes: Tensor, count: int) -> Sequence[Tensor]:
    """One tensor for each operand; where nothing is scaled, the empty one, which no kernel reads."""
    return list(magnitudes) if len(magnitudes) else [magnitudes] * count


def _block_d(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def _constants(head_dim: int, precision: str, causal: bool, scale: float, chosen: Tile) -> dict[str, Any]:
    return {
        "PRECISION": precision,
        "PARTS": HALVES.get(precision, 0),
        "CAUSAL": causal,
        "NEGATED": scale < 0,
        "D": head_dim,
        "BLOCK_M": chosen.queries,
        "BLOCK_N": chosen.keys,
        "BLOCK_D": _block_d(head_dim),
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
    }
