"""Operands: tiles loaded and stored, and float32 made into float16 halves before a kernel streams over it.

Shapes throughout: B batch, H query heads, G key heads (H a multiple of G), N queries, M keys, D head dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels.portable.arithmetic import exponent_at, halves, scaled


@triton.jit
def of_head(start, b, h, stride_b, stride_h):
    """Where a head's first row starts, beyond 2³¹ elements too."""
    return start + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h


@triton.jit
def load_rows(start, rows, stride_row, stride_d, count, BLOCK_D: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """A tile (rows, BLOCK_D) from `start`; zeros past the last column, and past the last of `count` rows if MASKED."""
    columns = tl.arange(0, BLOCK_D)
    pointers = start + rows[:, None] * stride_row + columns[None, :] * stride_d
    if MASKED:
        return tl.load(pointers, mask=(rows[:, None] < count) & (columns[None, :] < D), other=0.0)
    elif BLOCK_D != D:  # noqa: RET505
        return tl.load(pointers, mask=columns[None, :] < D, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_parts(
    start, to_low, rows, stride_row, stride_d, count,
    BLOCK_D: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A tile of an operand in parts, the second of which lies `to_low` elements behind the first."""
    high = load_rows(start, rows, stride_row, stride_d, count, BLOCK_D, D, MASKED)
    if PARTS == 2:
        return high, load_rows(start + to_low, rows, stride_row, stride_d, count, BLOCK_D, D, MASKED)
    else:  # noqa: RET505
        return high, high


@triton.jit
def store_rows(start, rows, stride_row, count, tile, BLOCK_D: tl.constexpr, D: tl.constexpr):
    """A tile into rows whose elements lie side by side."""
    columns = tl.arange(0, BLOCK_D)
    pointers = start + rows[:, None] * stride_row + columns[None, :]
    tl.store(pointers, tile.to(start.dtype.element_ty), mask=(rows[:, None] < count) & (columns[None, :] < D))


@triton.jit
def magnitudes_kernel(
    x, magnitudes, stride_b, stride_h, stride_n, stride_d, H, G, N, D: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The largest magnitude in x (B, H, N, D) of the heads that share a key head, into magnitudes (B, G), as bits.

    Bits of positive floats are in the order of the floats. Grid: (tiles of rows, B·H).
    """
    head = tl.program_id(1)
    b, h = head // H, head % H
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = of_head(x, b, h, stride_b, stride_h)
    tile = load_rows(start, rows, stride_n, stride_d, N, BLOCK_D, D, True)
    largest = tl.max(tl.max(tl.abs(tile), 1), 0)
    tl.atomic_max(magnitudes + b * G + h // (H // G), largest.to(tl.int32, bitcast=True))


@triton.jit
def halves_kernel(
    x, parts, magnitudes, to_low, stride_b, stride_h, stride_n, stride_d, H, G, N, D: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """x (B, H, N, D), scaled, as parts (PARTS, B, H, N, D) in float16. Grid: (tiles of rows, B·H)."""
    head = tl.program_id(1)
    b, h = head // H, head % H
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = of_head(x, b, h, stride_b, stride_h)
    exponent = exponent_at(magnitudes, b * G + h // (H // G), PARTS)
    high, low = halves(scaled(load_rows(start, rows, stride_n, stride_d, N, BLOCK_D, D, True), exponent))
    result = parts + head.to(tl.int64) * N * D
    store_rows(result, rows, D, N, high, BLOCK_D, D)
    if PARTS == 2:
        store_rows(result + to_low, rows, D, N, low, BLOCK_D, D)
