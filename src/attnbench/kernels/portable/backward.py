"""The fused backward in two kernels, both recomputing the weights: dq by tiles of queries, dk and dv by tiles of keys.

Each result is summed by one program in a fixed order, so the backward is deterministic. The price is seven products a
tile instead of five. With weights P = exp2(S − logsumexp), dP = dO·Vᵀ and δ = rowsum(dO ∘ O):
dS = P ∘ (dP − δ), dQ = scale·dS·K, dK = scale·dSᵀ·Q, dV = Pᵀ·dO (Dao et al., FlashAttention, appendix B.2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels.portable.arithmetic import (
    TOP,
    add_product,
    exponent_at,
    narrowed,
    row_products,
    scaled,
    whole,
)
from attnbench.kernels.portable.forward import keys_seen, sees
from attnbench.kernels.portable.operands import columns_of, load_parts, load_rows, of_head, store_rows


@triton.jit
def _exponent_of_ds(do_exponent, v_exponent, LOG2_D: tl.constexpr):
    """The exponent by which dS is scaled: |dP − δ| is at most twice D·max|dO|·max|V|, so the product stays below 2¹⁵.

    Two to that power, with the weights' scale taken off or not, must be a float32. Where the bound is beyond 2¹²⁸, float32
    has no such dP; of gradients so small that they would want more than 2¹²⁶, nothing is left in the end.
    """
    return tl.minimum(tl.maximum(do_exponent + v_exponent - TOP - 2 - LOG2_D, TOP - 126), 126)


@triton.jit
def _top(PARTS: tl.constexpr):
    """The binary exponent by which weights are scaled."""
    if PARTS > 0:
        return TOP
    else:  # noqa: RET505
        return 0


@triton.jit(do_not_specialize=["H", "G"], do_not_specialize_on_alignment=["kv_magnitudes", "q_do_magnitudes"])
def attnbench_dq(
    q, k, v, do, out, logsumexp, of_rows, dq, kv_magnitudes, q_do_magnitudes,
    score_scale, scale, q_to_low, k_to_low,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_km, stride_kd,
    stride_vb, stride_vh, stride_vm, stride_vd,
    stride_gb, stride_gh, stride_gn, stride_gd,
    stride_ob, stride_oh, stride_on,
    H, G, N, M, ROWS,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, CAUSAL: tl.constexpr, LOG2_D: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq (B, H, N, D), laid out as `out` is, and what `attnbench_dkdv` reads of rows, in whole tiles: (B, H, ROWS, 2).

    That is the logsumexp by which it shifts scores, infinite past the last query, and delta as it scales dS. Reading them
    apart, and by masks, would cost it a quarter of its instructions. Grid: (tiles of ROWS queries, B·H).
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    if CAUSAL:
        tile = tl.num_programs(0) - 1 - tile
    b, h = head // H, head % H
    g = h // (H // G)
    kv_head = b * G + g
    offset = M - N
    queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q, do = of_head(q, b, h, stride_qb, stride_qh), of_head(do, b, h, stride_gb, stride_gh)
    k, v = of_head(k, b, g, stride_kb, stride_kh), of_head(v, b, g, stride_vb, stride_vh)
    q_exponent = exponent_at(q_do_magnitudes, 2 * kv_head, PARTS)
    do_exponent = exponent_at(q_do_magnitudes, 2 * kv_head + 1, PARTS)
    k_exponent = exponent_at(kv_magnitudes, 2 * kv_head, PARTS)
    v_exponent = exponent_at(kv_magnitudes, 2 * kv_head + 1, PARTS)
    q_parts = load_parts(q, q_to_low, queries, stride_qn, stride_qd, N, BLOCK_D, D, True, PARTS)
    do_parts = load_parts(do, q_to_low, queries, stride_gn, stride_gd, N, BLOCK_D, D, True, PARTS)

    row_logsumexp = tl.load(logsumexp + head.to(tl.int64) * N + queries, mask=queries < N, other=float("inf"))
    out_tile = load_rows(of_head(out, b, h, stride_ob, stride_oh), queries, stride_on, 1, N, BLOCK_D, D, True)
    row_delta = tl.sum(whole(do_parts, PARTS) * out_tile.to(tl.float32), 1)
    dp_scale = 1.0
    if PARTS > 0:
        score_scale = scaled(score_scale, -q_exponent - k_exponent)
        ds_exponent = _exponent_of_ds(do_exponent, v_exponent, LOG2_D)
        dp_scale = scaled(dp_scale, ds_exponent - do_exponent - v_exponent)
        row_delta = scaled(row_delta, ds_exponent - do_exponent)
    pairs = of_rows + 2 * (head.to(tl.int64) * ROWS + queries)
    tl.store(pairs, row_logsumexp - _top(PARTS))
    tl.store(pairs + 1, scaled(row_delta, -_top(PARTS)))  # there, weights are scaled as well

    last = tl.minimum(tile * BLOCK_M + BLOCK_M, N) - 1
    by_all, seen = keys_seen(tile * BLOCK_M, last, M, offset, BLOCK_N, CAUSAL)
    if tile * BLOCK_M >= N:
        by_all, seen = 0, 0
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    begin, end = 0, by_all
    for MASKED in tl.static_range(2):
        for start in range(begin, end, BLOCK_N):
            keys = start + tl.arange(0, BLOCK_N)
            k_parts = load_parts(k, k_to_low, keys, stride_km, stride_kd, M, BLOCK_D, D, MASKED, PARTS)
            p = tl.exp2(row_products(q_parts, k_parts, PRECISION) * score_scale - row_logsumexp[:, None])
            if MASKED:
                p = tl.where(sees(queries[:, None], keys[None, :], M, offset, CAUSAL), p, 0.0)
            v_parts = load_parts(v, k_to_low, keys, stride_vm, stride_vd, M, BLOCK_D, D, MASKED, PARTS)
            ds = p * (row_products(do_parts, v_parts, PRECISION) * dp_scale - row_delta[:, None])
            sums = add_product(sums, narrowed(ds, k_parts[0].dtype, PARTS), k_parts, PRECISION)
        begin, end = by_all, seen
    if PARTS > 0:
        sums = scaled(sums, -ds_exponent - k_exponent)
    store_rows(of_head(dq, b, h, stride_ob, stride_oh), queries, stride_on, N, sums * scale, BLOCK_D, D)


@triton.jit(do_not_specialize=["H", "G"], do_not_specialize_on_alignment=["kv_magnitudes", "q_do_magnitudes"])
def attnbench_dkdv(
    q, k, v, do, of_rows, dk, dv, kv_magnitudes, q_do_magnitudes,
    score_scale, scale, q_to_low, k_to_low,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_km, stride_kd,
    stride_vb, stride_vh, stride_vm, stride_vd,
    stride_gb, stride_gh, stride_gn, stride_gd,
    stride_ob, stride_oh, stride_om,
    H, G, N, M, ROWS,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, CAUSAL: tl.constexpr, LOG2_D: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dk and dv (B, G, M, D), summed over the query heads that share a key head.

    A program sums so many COLUMNS of both as its registers hold, and makes weights of whole rows.
    Grid: (tiles of keys, B·G, tiles of COLUMNS).
    """
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    b, g = kv_head // G, kv_head % G
    shared = H // G
    offset = M - N
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k, v = of_head(k, b, g, stride_kb, stride_kh), of_head(v, b, g, stride_vb, stride_vh)
    k_exponent = exponent_at(kv_magnitudes, 2 * kv_head, PARTS)
    v_exponent = exponent_at(kv_magnitudes, 2 * kv_head + 1, PARTS)
    q_exponent = exponent_at(q_do_magnitudes, 2 * kv_head, PARTS)
    do_exponent = exponent_at(q_do_magnitudes, 2 * kv_head + 1, PARTS)
    k_parts = load_parts(k, k_to_low, keys, stride_km, stride_kd, M, BLOCK_D, D, True, PARTS)
    v_parts = load_parts(v, k_to_low, keys, stride_vm, stride_vd, M, BLOCK_D, D, True, PARTS)
    column = tl.program_id(2) * COLUMNS
    dk_sums = tl.zeros((BLOCK_N, COLUMNS), tl.float32)
    dv_sums = tl.zeros((BLOCK_N, COLUMNS), tl.float32)
    # Queries before `first` see none of these keys, those from `unmasked` on see all of them.
    first, unmasked = 0, 0
    if CAUSAL:
        first = tl.minimum(N, tl.maximum(0, tile * BLOCK_N - offset)) // BLOCK_M * BLOCK_M
        unmasked = tl.cdiv(tl.maximum(0, tl.minimum(tile * BLOCK_N + BLOCK_N, M) - 1 - offset), BLOCK_M) * BLOCK_M
        unmasked = tl.maximum(first, tl.minimum(unmasked, tl.cdiv(N, BLOCK_M) * BLOCK_M))
    dp_scale = 1.0
    if PARTS > 0:
        score_scale = scaled(score_scale, -q_exponent - k_exponent)
        ds_exponent = _exponent_of_ds(do_exponent, v_exponent, LOG2_D)
        dp_scale = scaled(dp_scale, ds_exponent - do_exponent - v_exponent - TOP)  # weights are scaled by 2ᵀᴼᴾ
    for i in range(shared):
        h = g * shared + i
        pairs = of_rows + 2 * (b * H + h).to(tl.int64) * ROWS
        head_q, head_do = of_head(q, b, h, stride_qb, stride_qh), of_head(do, b, h, stride_gb, stride_gh)
        for start in range(first, N, BLOCK_M):  # everything transposed: keys are rows
            queries = start + tl.arange(0, BLOCK_M)
            q_parts = load_parts(head_q, q_to_low, queries, stride_qn, stride_qd, N, BLOCK_D, D, True, PARTS)
            row_logsumexp, row_delta = tl.split(tl.load(pairs + 2 * queries[:, None] + tl.arange(0, 2)[None, :]))
            p = tl.exp2(row_products(k_parts, q_parts, PRECISION) * score_scale - row_logsumexp[None, :])
            if CAUSAL:  # noqa: SIM102  which the compiler decides, and the loop the next
                if start < unmasked:
                    p = tl.where(queries[None, :] >= (keys - offset)[:, None], p, 0.0)
            do_parts = load_parts(head_do, q_to_low, queries, stride_gn, stride_gd, N, BLOCK_D, D, True, PARTS)
            do_columns = columns_of(
                do_parts, head_do, q_to_low, queries, stride_gn, stride_gd, N, column, COLUMNS, BLOCK_D, D, PARTS
            )
            dv_sums = add_product(dv_sums, narrowed(p, q_parts[0].dtype, PARTS), do_columns, PRECISION)
            ds = p * (row_products(v_parts, do_parts, PRECISION) * dp_scale - row_delta[None, :])
            q_columns = columns_of(
                q_parts, head_q, q_to_low, queries, stride_qn, stride_qd, N, column, COLUMNS, BLOCK_D, D, PARTS
            )
            dk_sums = add_product(dk_sums, narrowed(ds, q_parts[0].dtype, PARTS), q_columns, PRECISION)
    if PARTS > 0:
        dk_sums = scaled(dk_sums, -ds_exponent - q_exponent)
        dv_sums = scaled(dv_sums, -do_exponent - TOP)
    dk, dv = of_head(dk, b, g, stride_ob, stride_oh) + column, of_head(dv, b, g, stride_ob, stride_oh) + column
    store_rows(dk, keys, stride_om, M, dk_sums * scale, COLUMNS, D - column)
    store_rows(dv, keys, stride_om, M, dv_sums, COLUMNS, D - column)
