"""The fused forward: one program a tile of queries, softmax over tiles of keys as they come.

A softmax is the same whatever is taken off all scores of a row; that it is their maximum keeps exponentials in range. Weights
have range to spare, so what is taken off is the peak of the first tile of keys, for as long as that holds: no maxima, no sums
scaled anew. If sums come out infinite, or are not numbers, the program begins again with the peak of what it has seen so far.
So it does from the start with tiles that a mask touches, and with short sequences.

Exponentials are to base 2. `logsumexp` is kept to base 2 as well, and +inf for a row that sees no key, so that its weights
come out zero in the backward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels.portable.arithmetic import (
    LEVEL_OF_HALVES,
    add_scaled_product,
    exponent_at,
    exponent_of,
    narrowed,
    negated,
    row_products,
    scaled,
    split,
)
from attnbench.kernels.portable.operands import (
    key_head,
    load_operand,
    load_parts,
    load_rows,
    of_head,
    place,
    store_rows,
)


@triton.jit
def sees(queries, keys, M, offset, CAUSAL: tl.constexpr):
    """Whether each query may look at each key; the causal mask is aligned to the bottom right."""
    allowed = keys < M
    if CAUSAL:
        allowed = allowed & (queries + offset >= keys)
    return allowed


@triton.jit
def keys_seen(first_query, last_query, M, offset, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """How many keys all queries of a tile see, in whole tiles of keys, and how many keys any of them sees."""
    by_all, by_any = M, M
    if CAUSAL:
        by_all = tl.minimum(M, tl.maximum(0, first_query + offset + 1))
        by_any = tl.minimum(M, tl.maximum(0, last_query + offset + 1))
    return by_all // BLOCK_N * BLOCK_N, by_any


@triton.jit
def are_finite(weight, acc):
    """Whether the sums of all rows are: neither infinite nor NaN, which `tl.max` would pass over."""
    finite = (weight < float("inf")) & (tl.min((tl.abs(acc) < float("inf")).to(tl.int32), 1) == 1)
    return tl.min(finite.to(tl.int32), 0) == 1


@triton.jit(do_not_specialize=["H", "G"], do_not_specialize_on_alignment=["kv_magnitudes"])
def attnbench_forward(
    q, k, v, out, logsumexp, kv_magnitudes, score_scale, to_low,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_km, stride_kd,
    stride_vb, stride_vh, stride_vm, stride_vd,
    stride_ob, stride_oh, stride_on,
    H, G, N, M,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, CAUSAL: tl.constexpr, NEGATED: tl.constexpr, ALONE: tl.constexpr,
    GROUPED: tl.constexpr, SORTED: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out (B, H, N, D) and logsumexp (B, H, N) of q (B, H, N, D), k and v (B, G, M, D), these two in parts unless ALONE.

    `score_scale` is |scale|·log2(e); NEGATED says that the scale is negative; ALONE that no other kernel has split anything;
    GROUPED that several query heads share a key head; SORTED that tiles of all heads take turns. Grid: as `place` says, of
    tiles of queries.
    """
    GIVEN: tl.constexpr = 0 if ALONE else PARTS
    tile, h, b = place(SORTED)
    if CAUSAL:
        tile = tl.cdiv(N, BLOCK_M) - 1 - tile  # the longest rows first
    g = key_head(h, H, G, GROUPED)
    kv_head = b * G + g
    offset = M - N
    queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q = of_head(q, b, h, stride_qb, stride_qh)
    k, v = of_head(k, b, g, stride_kb, stride_kh), of_head(v, b, g, stride_vb, stride_vh)
    q_tile = load_rows(q, queries, stride_qn, stride_qd, N, BLOCK_D, D, True)
    if NEGATED:
        q_tile = negated(q_tile)
    q_exponent = exponent_of(q_tile, PARTS)
    k_exponent = exponent_at(kv_magnitudes, 2 * kv_head, GIVEN)
    if PARTS > 0:
        score_scale = scaled(score_scale, -q_exponent - k_exponent)
    q_parts = split(q_tile, q_exponent, PARTS)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # less LEVEL, the exponent of its own weight
    LEVEL: tl.constexpr = LEVEL_OF_HALVES if PARTS > 0 else 0
    last = tl.minimum(tile * BLOCK_M + BLOCK_M, N) - 1
    whole, seen = keys_seen(tile * BLOCK_M, last, M, offset, BLOCK_N, CAUSAL)
    # What is short has the loop with masks alone; so has `ieee`, in which there are no registers for two.
    FIRST: tl.constexpr = 1 if ALONE or PRECISION == "ieee" else 0
    begin, end = 0, seen if FIRST else whole
    for MASKED in tl.static_range(FIRST, 2):
        if begin < end:  # a loop that might be empty would keep products from overlapping
            if not MASKED:
                keys = tl.arange(0, BLOCK_N)
                k_parts = load_parts(k, to_low, keys, stride_km, stride_kd, M, BLOCK_D, D, False, PARTS)
                peak = tl.max(row_products(q_parts, k_parts, PRECISION), 1) * score_scale - LEVEL
            for start in range(begin, end, BLOCK_N):
                keys = start + tl.arange(0, BLOCK_N)
                k_parts, k_own = load_operand(
                    k, to_low, keys, stride_km, stride_kd, M, BLOCK_D, D, MASKED, PARTS, ALONE
                )
                scores = row_products(q_parts, k_parts, PRECISION)
                factor = score_scale  # positive, or so small that it is zero
                if ALONE:
                    factor = scaled(factor, -k_own)
                base = peak
                if MASKED:
                    allowed = sees(queries[:, None], keys[None, :], M, offset, CAUSAL)
                    scores = tl.where(allowed, scores * factor, float("-inf"))
                    factor = 1.0
                    new_peak = tl.maximum(peak, tl.max(scores, 1) - LEVEL)
                    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen no key yet
                    shrink = tl.exp2(peak - base)
                    weight *= shrink
                    acc *= shrink[:, None]
                    peak = new_peak
                p = tl.exp2(scores * factor - base[:, None])
                weight += tl.sum(p, 1)
                v_parts, v_own = load_operand(
                    v, to_low, keys, stride_vm, stride_vd, M, BLOCK_D, D, MASKED, PARTS, ALONE
                )
                weights = narrowed(p, v_parts[0].dtype, PARTS)
                acc = add_scaled_product(acc, weights, v_parts, -v_own, PRECISION, PARTS, ALONE)
        if not MASKED:
            held = are_finite(weight, acc)
            begin, end = tl.where(held, whole, 0), seen
            peak, weight, acc = (
                tl.where(held, peak, float("-inf")),
                tl.where(held, weight, 0.0),
                tl.where(held, acc, 0.0),
            )
    blind = weight == 0.0
    weight = tl.where(blind, 1.0, weight)
    acc = acc / weight[:, None]
    if PARTS > 0:
        acc = scaled(acc, -exponent_at(kv_magnitudes, 2 * kv_head + 1, GIVEN))
    store_rows(of_head(out, b, h, stride_ob, stride_oh), queries, stride_on, last + 1, acc, BLOCK_D, D)
    rows = logsumexp + (b * H + h).to(tl.int64) * N + queries
    tl.store(rows, tl.where(blind, float("inf"), peak + tl.log2(weight)), mask=queries <= last)
