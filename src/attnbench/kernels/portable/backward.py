"""The fused backward in two kernels, both recomputing the weights: dq by tiles of queries, dk and dv by tiles of keys.

Each result is summed by one program in a fixed order, so the backward is deterministic. The price is seven products a
tile instead of five. With weights P = exp2(S − logsumexp), dP = dO·Vᵀ and δ = rowsum(dO ∘ O):
dS = P ∘ (dP − δ), dQ = scale·dS·K, dK = scale·dSᵀ·Q, dV = Pᵀ·dO (Dao et al., FlashAttention, appendix B.2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels.portable.arithmetic import TOP, exponent_at, narrowed, product, scaled, split
from attnbench.kernels.portable.forward import keys_seen, sees
from attnbench.kernels.portable.operands import load_parts, load_rows, store_rows


@triton.jit
def _exponent_of_ds(do_exponent, v_exponent, LOG2_D: tl.constexpr):
    """The exponent by which dS is scaled: |dP − δ| is at most twice D·max|dO|·max|V|, so the product stays below 2¹⁵."""
    return do_exponent + v_exponent - TOP - 2 - LOG2_D


@triton.jit
def _sum_dq(
    dq, delta, row_logsumexp, q_high, q_low, do_high, do_low, queries, k, v, k_to_low, v_to_low,
    stride_km, stride_kd, stride_vm, stride_vd, begin, end, M, offset, score_scale, dp_scale,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_high, k_low = load_parts(k, k_to_low, keys, stride_km, stride_kd, M, BLOCK_D, D, MASKED, PARTS)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        scores = product(q_high, q_low, tl.trans(k_high), tl.trans(k_low), zeros, PRECISION)
        p = tl.exp2(scores * score_scale - row_logsumexp[:, None])
        if MASKED:
            p = tl.where(sees(queries[:, None], keys[None, :], M, offset, CAUSAL), p, 0.0)
        v_high, v_low = load_parts(v, v_to_low, keys, stride_vm, stride_vd, M, BLOCK_D, D, MASKED, PARTS)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        dp = product(do_high, do_low, tl.trans(v_high), tl.trans(v_low), zeros, PRECISION)
        ds = p * (dp * dp_scale - delta[:, None])
        ds_high, ds_low = narrowed(ds, k_high.dtype, PARTS)
        dq = product(ds_high, ds_low, k_high, k_low, dq, PRECISION)
    return dq


@triton.jit
def backward_dq_kernel(
    q, k, v, out, do, logsumexp, delta, dq, q_magnitudes, k_magnitudes, v_magnitudes, do_magnitudes, k_to_low, v_to_low,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_km, stride_kd,
    stride_vb, stride_vh, stride_vm, stride_vd,
    stride_ob, stride_oh, stride_on,
    stride_gb, stride_gh, stride_gn, stride_gd,
    H, G, N, M, score_scale, scale,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, CAUSAL: tl.constexpr, NEGATED: tl.constexpr, LOG2_D: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq (B, H, N, D), laid out as `out` is, and delta (B, H, N). Grid: (tiles of queries, B·H)."""
    tile, head = tl.program_id(0), tl.program_id(1)
    if CAUSAL:
        tile = tl.num_programs(0) - 1 - tile
    b, h = head // H, head % H
    g = h // (H // G)
    kv_head = b * G + g
    offset = M - N
    queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q += b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
    k += b.to(tl.int64) * stride_kb + g.to(tl.int64) * stride_kh
    v += b.to(tl.int64) * stride_vb + g.to(tl.int64) * stride_vh
    do += b.to(tl.int64) * stride_gb + h.to(tl.int64) * stride_gh
    result = b.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh
    rows = head.to(tl.int64) * N + queries
    row_logsumexp = tl.load(logsumexp + rows, mask=queries < N, other=float("inf"))
    do_tile = load_rows(do, queries, stride_gn, stride_gd, N, BLOCK_D, D, True)
    out_tile = load_rows(out + result, queries, stride_on, 1, N, BLOCK_D, D, True)
    row_delta = tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + rows, row_delta, mask=queries < N)

    q_exponent = exponent_at(q_magnitudes, kv_head, PARTS)
    k_exponent = exponent_at(k_magnitudes, kv_head, PARTS)
    v_exponent = exponent_at(v_magnitudes, kv_head, PARTS)
    do_exponent = exponent_at(do_magnitudes, kv_head, PARTS)
    dp_scale = 1.0
    if PARTS > 0:
        score_scale = scaled(score_scale, -q_exponent - k_exponent)
        ds_exponent = _exponent_of_ds(do_exponent, v_exponent, LOG2_D)
        dp_scale = scaled(dp_scale, ds_exponent - do_exponent - v_exponent)
        row_delta = scaled(row_delta, ds_exponent)
    q_tile = load_rows(q, queries, stride_qn, stride_qd, N, BLOCK_D, D, True)
    if NEGATED:
        q_tile = -q_tile
    q_high, q_low = split(q_tile, q_exponent, PARTS)
    do_high, do_low = split(do_tile, do_exponent, PARTS)
    last = tl.minimum(tile * BLOCK_M + BLOCK_M, N) - 1
    whole, seen = keys_seen(tile * BLOCK_M, last, M, offset, BLOCK_N, CAUSAL)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    sums = _sum_dq(
        sums, row_delta, row_logsumexp, q_high, q_low, do_high, do_low, queries, k, v, k_to_low, v_to_low,
        stride_km, stride_kd, stride_vm, stride_vd, 0, whole, M, offset, score_scale, dp_scale,
        PRECISION, PARTS, CAUSAL, False, D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    sums = _sum_dq(
        sums, row_delta, row_logsumexp, q_high, q_low, do_high, do_low, queries, k, v, k_to_low, v_to_low,
        stride_km, stride_kd, stride_vm, stride_vd, whole, seen, M, offset, score_scale, dp_scale,
        PRECISION, PARTS, CAUSAL, True, D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if PARTS > 0:
        sums = scaled(sums, -ds_exponent - k_exponent)
    store_rows(dq + result, queries, stride_on, N, sums * scale, BLOCK_D, D)


@triton.jit
def _sum_dkdv(
    dk, dv, k_high, k_low, v_high, v_low, keys, q, do, q_to_low, do_to_low, logsumexp, delta,
    stride_qn, stride_qd, stride_gn, stride_gd, begin, end, N, M, offset, score_scale, dp_scale, delta_exponent,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Goes on over queries [begin, end), with everything transposed: keys are rows."""
    for start in range(begin, end, BLOCK_M):
        queries = start + tl.arange(0, BLOCK_M)
        q_high, q_low = load_parts(q, q_to_low, queries, stride_qn, stride_qd, N, BLOCK_D, D, True, PARTS)
        # Past the last query the logsumexp is infinite and all weights are zero.
        row_logsumexp = tl.load(logsumexp + queries, mask=queries < N, other=float("inf"))
        zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        scores = product(k_high, k_low, tl.trans(q_high), tl.trans(q_low), zeros, PRECISION)
        if PARTS > 0:
            p = tl.exp2(scores * score_scale - (row_logsumexp - TOP)[None, :])
        else:
            p = tl.exp2(scores * score_scale - row_logsumexp[None, :])
        if MASKED:
            p = tl.where(sees(queries[None, :], keys[:, None], M, offset, CAUSAL), p, 0.0)
        do_high, do_low = load_parts(do, do_to_low, queries, stride_gn, stride_gd, N, BLOCK_D, D, True, PARTS)
        p_high, p_low = narrowed(p, q_high.dtype, PARTS)
        dv = product(p_high, p_low, do_high, do_low, dv, PRECISION)
        row_delta = tl.load(delta + queries, mask=queries < N, other=0.0)
        zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        dp = product(v_high, v_low, tl.trans(do_high), tl.trans(do_low), zeros, PRECISION)
        if PARTS > 0:
            row_delta = scaled(row_delta, delta_exponent)
        ds = p * (dp * dp_scale - row_delta[None, :])
        ds_high, ds_low = narrowed(ds, q_high.dtype, PARTS)
        dk = product(ds_high, ds_low, q_high, q_low, dk, PRECISION)
    return dk, dv


@triton.jit
def backward_dkdv_kernel(
    q, k, v, do, logsumexp, delta, dk, dv, q_magnitudes, k_magnitudes, v_magnitudes, do_magnitudes, q_to_low, do_to_low,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_km, stride_kd,
    stride_vb, stride_vh, stride_vm, stride_vd,
    stride_ob, stride_oh, stride_om,
    stride_gb, stride_gh, stride_gn, stride_gd,
    H, G, N, M, score_scale, scale,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, CAUSAL: tl.constexpr, NEGATED: tl.constexpr, LOG2_D: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv (B, G, M, D), summed over the query heads that share a key head. Grid: (tiles of keys, B·G).

    `scale` keeps its sign, since k is negated to make up for the scores' where it is negative.
    """
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    b, g = kv_head // G, kv_head % G
    shared = H // G
    offset = M - N
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k += b.to(tl.int64) * stride_kb + g.to(tl.int64) * stride_kh
    v += b.to(tl.int64) * stride_vb + g.to(tl.int64) * stride_vh
    q_exponent = exponent_at(q_magnitudes, kv_head, PARTS)
    k_exponent = exponent_at(k_magnitudes, kv_head, PARTS)
    v_exponent = exponent_at(v_magnitudes, kv_head, PARTS)
    do_exponent = exponent_at(do_magnitudes, kv_head, PARTS)
    k_tile = load_rows(k, keys, stride_km, stride_kd, M, BLOCK_D, D, True)
    if NEGATED:
        k_tile = -k_tile
    k_high, k_low = split(k_tile, k_exponent, PARTS)
    v_high, v_low = split(load_rows(v, keys, stride_vm, stride_vd, M, BLOCK_D, D, True), v_exponent, PARTS)
    dk_sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # Queries before `first` see none of these keys, those from `whole` on see all of them.
    first, whole = 0, 0
    if CAUSAL:
        first = tl.minimum(N, tl.maximum(0, tile * BLOCK_N - offset)) // BLOCK_M * BLOCK_M
        whole = tl.cdiv(tl.maximum(0, tl.minimum(tile * BLOCK_N + BLOCK_N, M) - 1 - offset), BLOCK_M) * BLOCK_M
        whole = tl.maximum(first, tl.minimum(whole, tl.cdiv(N, BLOCK_M) * BLOCK_M))
    dp_scale, delta_exponent = 1.0, 0
    if PARTS > 0:
        score_scale = scaled(score_scale, -q_exponent - k_exponent)
        ds_exponent = _exponent_of_ds(do_exponent, v_exponent, LOG2_D)
        dp_scale = scaled(dp_scale, ds_exponent - do_exponent - v_exponent - TOP)  # weights are scaled by 2ᵀᴼᴾ
        delta_exponent = ds_exponent - TOP
    for i in range(shared):
        h = g * shared + i
        rows = (b * H + h).to(tl.int64) * N
        head_q = q + b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
        head_do = do + b.to(tl.int64) * stride_gb + h.to(tl.int64) * stride_gh
        dk_sums, dv_sums = _sum_dkdv(
            dk_sums, dv_sums, k_high, k_low, v_high, v_low, keys,
            head_q, head_do, q_to_low, do_to_low, logsumexp + rows, delta + rows,
            stride_qn, stride_qd, stride_gn, stride_gd, first, whole, N, M, offset, score_scale, dp_scale, delta_exponent,
            PRECISION, PARTS, CAUSAL, True, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        dk_sums, dv_sums = _sum_dkdv(
            dk_sums, dv_sums, k_high, k_low, v_high, v_low, keys,
            head_q, head_do, q_to_low, do_to_low, logsumexp + rows, delta + rows,
            stride_qn, stride_qd, stride_gn, stride_gd, whole, N, N, M, offset, score_scale, dp_scale, delta_exponent,
            PRECISION, PARTS, CAUSAL, False, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if PARTS > 0:
        dk_sums = scaled(dk_sums, -ds_exponent - q_exponent)
        dv_sums = scaled(dv_sums, -do_exponent - TOP)
    result = b.to(tl.int64) * stride_ob + g.to(tl.int64) * stride_oh
    store_rows(dk + result, keys, stride_om, M, dk_sums * scale, BLOCK_D, D)
    store_rows(dv + result, keys, stride_om, M, dv_sums, BLOCK_D, D)
