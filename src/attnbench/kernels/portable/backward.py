"""The fused backward in two kernels, both recomputing the weights: dq by tiles of queries, dk and dv by tiles of keys. Of short
sequences a third has the programs of both.

Each result is summed by one program in a fixed order, so the backward is deterministic. The price is seven products a
tile instead of five. With weights P = exp2(S − logsumexp), dP = dO·Vᵀ and δ = rowsum(dO ∘ O):
dS = P ∘ (dP − δ), dQ = scale·dS·K, dK = scale·dSᵀ·Q, dV = Pᵀ·dO (Dao et al., FlashAttention, appendix B.2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels.portable.arithmetic import (
    TOP,
    add_scaled_product,
    exponent_at,
    narrowed,
    row_products,
    scaled,
    whole,
)
from attnbench.kernels.portable.forward import keys_seen, sees
from attnbench.kernels.portable.operands import key_head, load_operand, load_rows, of_head, place, store_rows


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


@triton.jit
def _scales_of_ds(do_exponent, v_exponent, top, PARTS: tl.constexpr, LOG2_D: tl.constexpr):
    """By what dP is scaled, and the exponents by which delta is, once scaled as dO, and dS; 2ᵗᵒᵖ is in the weights already."""
    if PARTS > 0:
        ds_exponent = _exponent_of_ds(do_exponent, v_exponent, LOG2_D)
        return scaled(1.0, ds_exponent - do_exponent - v_exponent - top), ds_exponent - do_exponent - top, ds_exponent
    else:  # noqa: RET505
        return 1.0, 0, 0


@triton.jit
def _delta(do_parts, out, queries, stride_row, N, PARTS: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr):
    """rowsum(dO ∘ O) of a tile of queries, scaled as dO is."""
    out_tile = load_rows(out, queries, stride_row, 1, N, BLOCK_D, D, True)
    return tl.sum(whole(do_parts, PARTS) * out_tile.to(tl.float32), 1)


@triton.jit
def _logsumexp(logsumexp, head, queries, N):
    """That of queries; past the last it is infinite, so that all weights are zero."""
    return tl.load(logsumexp + head.to(tl.int64) * N + queries, mask=queries < N, other=float("inf"))


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
    GROUPED: tl.constexpr, SORTED: tl.constexpr, ALONE: tl.constexpr, TOGETHER: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """dq (B, H, N, D), laid out as `out` is, and what `attnbench_dkdv` reads of rows, in whole tiles: (B, H, ROWS, 2).

    That is the logsumexp by which it shifts scores, infinite past the last query, and delta as it scales dS. Reading them
    apart, and by masks, would cost it a quarter of its instructions. TOGETHER with the others, in `attnbench_backward`, it
    is not wanted, and the programs of all tiles of keys come first, AHEAD times. ALONE says that no other kernel has split
    anything, GROUPED that several query heads share a key head, SORTED that tiles of all heads take turns. Grid: as `place`
    says, of tiles of ROWS queries.
    """
    GIVEN: tl.constexpr = 0 if ALONE else PARTS
    tile, h, b = place(SORTED)
    if TOGETHER:
        tile -= AHEAD * tl.cdiv(M, BLOCK_M)
    elif CAUSAL:
        tile = tl.cdiv(ROWS, BLOCK_M) - 1 - tile
    head = b * H + h
    g = key_head(h, H, G, GROUPED)
    kv_head = b * G + g
    offset = M - N
    queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q, do = of_head(q, b, h, stride_qb, stride_qh), of_head(do, b, h, stride_gb, stride_gh)
    k, v = of_head(k, b, g, stride_kb, stride_kh), of_head(v, b, g, stride_vb, stride_vh)
    k_exponent = exponent_at(kv_magnitudes, 2 * kv_head, GIVEN)
    v_exponent = exponent_at(kv_magnitudes, 2 * kv_head + 1, GIVEN)
    q_parts, q_own = load_operand(q, q_to_low, queries, stride_qn, stride_qd, N, BLOCK_D, D, True, PARTS, ALONE)
    do_parts, do_own = load_operand(do, q_to_low, queries, stride_gn, stride_gd, N, BLOCK_D, D, True, PARTS, ALONE)
    q_exponent = q_own + exponent_at(q_do_magnitudes, 2 * kv_head, GIVEN)
    do_exponent = do_own + exponent_at(q_do_magnitudes, 2 * kv_head + 1, GIVEN)

    row_logsumexp = _logsumexp(logsumexp, head, queries, N)
    row_delta = _delta(do_parts, of_head(out, b, h, stride_ob, stride_oh), queries, stride_on, N, PARTS, BLOCK_D, D)
    dp_scale, delta_exponent, ds_exponent = _scales_of_ds(do_exponent, v_exponent, 0, GIVEN, LOG2_D)
    if PARTS > 0:
        score_scale = scaled(score_scale, -q_exponent - k_exponent)
        row_delta = scaled(row_delta, delta_exponent)
    if not TOGETHER:
        pairs = of_rows + 2 * (head.to(tl.int64) * ROWS + queries)
        tl.store(pairs, row_logsumexp - _top(PARTS))
        tl.store(pairs + 1, scaled(row_delta, -_top(PARTS)))  # there, weights are scaled as well

    last = tl.minimum(tile * BLOCK_M + BLOCK_M, N) - 1
    by_all, seen = keys_seen(tile * BLOCK_M, last, M, offset, BLOCK_N, CAUSAL)
    if tile * BLOCK_M >= N:
        by_all, seen = 0, 0
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    FIRST: tl.constexpr = 1 if TOGETHER else 0  # as in the forward
    begin, end = 0, seen if TOGETHER else by_all
    for MASKED in tl.static_range(FIRST, 2):
        if begin < end:
            for start in range(begin, end, BLOCK_N):
                keys = start + tl.arange(0, BLOCK_N)
                k_parts, k_own = load_operand(
                    k, k_to_low, keys, stride_km, stride_kd, M, BLOCK_D, D, MASKED, PARTS, ALONE
                )
                factor, dp_factor, delta, ds_own = score_scale, dp_scale, row_delta, 0
                if ALONE:
                    factor = scaled(score_scale, -k_own)
                v_parts, v_own = load_operand(
                    v, k_to_low, keys, stride_vm, stride_vd, M, BLOCK_D, D, MASKED, PARTS, ALONE
                )
                scores = row_products(q_parts, k_parts, PRECISION)
                dp = row_products(do_parts, v_parts, PRECISION)  # while it is multiplied, the exponentials of the other
                p = tl.exp2(scores * factor - row_logsumexp[:, None])
                if MASKED:
                    p = tl.where(sees(queries[:, None], keys[None, :], M, offset, CAUSAL), p, 0.0)
                if ALONE:
                    dp_factor, delta_own, ds_own = _scales_of_ds(do_exponent, v_own, 0, PARTS, LOG2_D)
                    delta = scaled(row_delta, delta_own)
                ds = p * (dp * dp_factor - delta[:, None])
                ds_parts = narrowed(ds, k_parts[0].dtype, PARTS)
                sums = add_scaled_product(sums, ds_parts, k_parts, -ds_own - k_own, PRECISION, PARTS, ALONE)
        begin, end = by_all, seen
    if GIVEN > 0:
        sums = scaled(sums, -ds_exponent - k_exponent)
    store_rows(of_head(dq, b, h, stride_ob, stride_oh), queries, stride_on, N, sums * scale, BLOCK_D, D)


@triton.jit(do_not_specialize=["H", "G"], do_not_specialize_on_alignment=["kv_magnitudes", "q_do_magnitudes"])
def attnbench_dkdv(
    q, k, v, do, out, logsumexp, of_rows, dk, dv, kv_magnitudes, q_do_magnitudes,
    score_scale, scale, q_to_low, k_to_low,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_km, stride_kd,
    stride_vb, stride_vh, stride_vm, stride_vd,
    stride_gb, stride_gh, stride_gn, stride_gd,
    stride_ob, stride_oh, stride_on,
    stride_rb, stride_rh, stride_rm,
    H, G, N, M, ROWS,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, CAUSAL: tl.constexpr, LOG2_D: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    PACKED: tl.constexpr, GROUPED: tl.constexpr, SORTED: tl.constexpr, ALONE: tl.constexpr, TOGETHER: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """dk if DK and dv if DV (B, G, M, D), summed over the query heads that share a key head.

    Both of wide heads would take more registers than there are. PACKED: rows of q and of do touch each other. GROUPED: several
    query heads share a key head. TOGETHER with the others, in `attnbench_backward`, there is no `of_rows`, and what it would
    tell is made of `out` and `logsumexp`. ALONE, SORTED and AHEAD are as in `attnbench_dq`. Grid: as `place` says, of tiles of
    keys and of key heads.
    """
    GIVEN: tl.constexpr = 0 if ALONE else PARTS
    tile, g, b = place(SORTED)
    tile -= AHEAD * tl.cdiv(M, BLOCK_N)
    kv_head = b * G + g
    shared = H // G
    if not GROUPED:  # what the compiler knows saves it registers
        shared = 1
    if PACKED:
        stride_qn, stride_gn = D, D
    offset = M - N
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k, v = of_head(k, b, g, stride_kb, stride_kh), of_head(v, b, g, stride_vb, stride_vh)
    q_exponent = exponent_at(q_do_magnitudes, 2 * kv_head, GIVEN)
    do_exponent = exponent_at(q_do_magnitudes, 2 * kv_head + 1, GIVEN)
    k_parts, k_own = load_operand(k, k_to_low, keys, stride_km, stride_kd, M, BLOCK_D, D, True, PARTS, ALONE)
    v_parts, v_own = load_operand(v, k_to_low, keys, stride_vm, stride_vd, M, BLOCK_D, D, True, PARTS, ALONE)
    k_exponent = k_own + exponent_at(kv_magnitudes, 2 * kv_head, GIVEN)
    v_exponent = v_own + exponent_at(kv_magnitudes, 2 * kv_head + 1, GIVEN)
    dp_scale, delta_exponent, ds_exponent = _scales_of_ds(do_exponent, v_exponent, TOP, GIVEN, LOG2_D)
    if PARTS > 0:
        score_scale = scaled(score_scale, -q_exponent - k_exponent)
    dk_sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # Queries before `first` see none of these keys, those from `unmasked` on see all of them.
    first, unmasked = 0, 0
    if CAUSAL:
        first = tl.minimum(N, tl.maximum(0, tile * BLOCK_N - offset)) // BLOCK_M * BLOCK_M
        unmasked = tl.cdiv(tl.maximum(0, tl.minimum(tile * BLOCK_N + BLOCK_N, M) - 1 - offset), BLOCK_M) * BLOCK_M
        unmasked = tl.maximum(first, tl.minimum(unmasked, tl.cdiv(N, BLOCK_M) * BLOCK_M))
    # The last query sees every key. A loop that might be empty would keep the products in it from overlapping.
    tl.assume(first < N)
    for i in range(shared):
        h = g * shared + i
        head = b * H + h
        head_q, head_do = of_head(q, b, h, stride_qb, stride_qh), of_head(do, b, h, stride_gb, stride_gh)
        if TOGETHER:
            head_out = of_head(out, b, h, stride_ob, stride_oh)
        else:
            pairs = of_rows + 2 * head.to(tl.int64) * ROWS
        for start in range(first, N, BLOCK_M):  # everything transposed: keys are rows
            queries = start + tl.arange(0, BLOCK_M)
            q_parts, q_own = load_operand(
                head_q, q_to_low, queries, stride_qn, stride_qd, N, BLOCK_D, D, True, PARTS, ALONE
            )
            factor, dp_factor, delta_own, ds_own = score_scale, dp_scale, delta_exponent, 0
            if ALONE:
                factor = scaled(score_scale, -q_own)
            if TOGETHER:
                row_logsumexp = _logsumexp(logsumexp, head, queries, N) - _top(PARTS)
            else:
                row_logsumexp, row_delta = tl.split(tl.load(pairs + 2 * queries[:, None] + tl.arange(0, 2)[None, :]))
            do_parts, do_own = load_operand(
                head_do, q_to_low, queries, stride_gn, stride_gd, N, BLOCK_D, D, True, PARTS, ALONE
            )
            scores = row_products(k_parts, q_parts, PRECISION)
            if DK:
                dp = row_products(v_parts, do_parts, PRECISION)
            p = tl.exp2(scores * factor - row_logsumexp[None, :])
            if CAUSAL:  # noqa: SIM102  which the compiler decides, and the loop the next
                if start < unmasked:
                    p = tl.where(queries[None, :] >= (keys - offset)[:, None], p, 0.0)
            if DK:
                if ALONE:
                    dp_factor, delta_own, ds_own = _scales_of_ds(do_own, v_exponent, TOP, PARTS, LOG2_D)
                if TOGETHER:
                    row_delta = _delta(do_parts, head_out, queries, stride_on, N, PARTS, BLOCK_D, D)
                    row_delta = scaled(row_delta, delta_own)
                ds = p * (dp * dp_factor - row_delta[None, :])
                ds_parts = narrowed(ds, q_parts[0].dtype, PARTS)
                dk_sums = add_scaled_product(dk_sums, ds_parts, q_parts, -ds_own - q_own, PRECISION, PARTS, ALONE)
            if DV:
                p_parts = narrowed(p, q_parts[0].dtype, PARTS)
                dv_sums = add_scaled_product(dv_sums, p_parts, do_parts, -do_own, PRECISION, PARTS, ALONE)
    if PARTS > 0:
        dk_sums = scaled(dk_sums, -ds_exponent - q_exponent)
        dv_sums = scaled(dv_sums, -do_exponent - TOP)
    if DK:
        store_rows(of_head(dk, b, g, stride_rb, stride_rh), keys, stride_rm, M, dk_sums * scale, BLOCK_D, D)
    if DV:
        store_rows(of_head(dv, b, g, stride_rb, stride_rh), keys, stride_rm, M, dv_sums, BLOCK_D, D)


@triton.jit(do_not_specialize=["H", "G"], do_not_specialize_on_alignment=["kv_magnitudes", "q_do_magnitudes"])
def attnbench_backward(
    q, k, v, do, out, logsumexp, dq, dk, dv, kv_magnitudes, q_do_magnitudes,
    score_scale, scale, q_to_low, k_to_low,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_km, stride_kd,
    stride_vb, stride_vh, stride_vm, stride_vd,
    stride_gb, stride_gh, stride_gn, stride_gd,
    stride_ob, stride_oh, stride_on,
    stride_rb, stride_rh, stride_rm,
    H, G, N, M,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, CAUSAL: tl.constexpr, LOG2_D: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PACKED: tl.constexpr, GROUPED: tl.constexpr, ALONE: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of short sequences by one launch, which ALONE splits what it multiplies itself.

    A program has BLOCK_M rows of its own, of queries or keys, and goes through the others by BLOCK_N. APART, dv and dk have
    programs of their own. Grid: (tiles of keys, APART again, then of queries, H, B).
    """
    AHEAD: tl.constexpr = 2 if APART else 1
    tiles, tile = tl.cdiv(M, BLOCK_M), tl.program_id(0)
    if tile >= AHEAD * tiles:
        attnbench_dq(
            q, k, v, do, out, logsumexp, None, dq, kv_magnitudes, q_do_magnitudes,
            score_scale, scale, q_to_low, k_to_low,
            stride_qb, stride_qh, stride_qn, stride_qd,
            stride_kb, stride_kh, stride_km, stride_kd,
            stride_vb, stride_vh, stride_vm, stride_vd,
            stride_gb, stride_gh, stride_gn, stride_gd,
            stride_ob, stride_oh, stride_on,
            H, G, N, M, N,
            PRECISION, PARTS, CAUSAL, LOG2_D, D, BLOCK_M, BLOCK_N, BLOCK_D, GROUPED, False, ALONE, True, AHEAD,
        )  # fmt: skip
    elif tl.program_id(1) < G:
        for GROUP in tl.static_range(AHEAD):
            if tile // tiles == GROUP:
                attnbench_dkdv(
                    q, k, v, do, out, logsumexp, None, dk, dv, kv_magnitudes, q_do_magnitudes,
                    score_scale, scale, q_to_low, k_to_low,
                    stride_qb, stride_qh, stride_qn, stride_qd,
                    stride_kb, stride_kh, stride_km, stride_kd,
                    stride_vb, stride_vh, stride_vm, stride_vd,
                    stride_gb, stride_gh, stride_gn, stride_gd,
                    stride_ob, stride_oh, stride_on,
                    stride_rb, stride_rh, stride_rm,
                    H, G, N, M, N,
                    PRECISION, PARTS, CAUSAL, LOG2_D, D, BLOCK_N, BLOCK_M, BLOCK_D,
                    GROUP == AHEAD - 1, GROUP == 0, PACKED, GROUPED, False, ALONE, True, GROUP,
                )  # fmt: skip
