"""Operands: tiles loaded and stored, and float32 made into float16 halves before a kernel streams over it.

Shapes throughout: B batch, H query heads, G key heads (H a multiple of G), N queries, M keys, D head dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.kernels.portable.arithmetic import (
    exponent_for,
    exponent_of,
    halves,
    largest_magnitude,
    scaled,
    split,
)


@triton.jit
def of_head(start, b, h, stride_b, stride_h):
    """Where a head's first row starts, beyond 2³¹ elements too."""
    return start + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h


@triton.jit
def key_head(h, H, G, GROUPED: tl.constexpr):
    """The key head of a query head. Known to be the same, its address takes no registers of each thread."""
    if GROUPED:
        return h // (H // G)
    else:  # noqa: RET505  Triton wants a return in each branch
        return h


@triton.jit
def place(SORTED: tl.constexpr):
    """Which tile, head and batch a program works on: of a grid (tiles, heads, batch), or SORTED, (heads, batch, tiles).

    Programs start in the order of their numbers, of which the first of three changes fastest.
    """
    if SORTED:
        return tl.program_id(2), tl.program_id(0), tl.program_id(1)
    else:  # noqa: RET505
        return tl.program_id(0), tl.program_id(1), tl.program_id(2)


@triton.jit
def load_rows(start, rows, stride_row, stride_d, count, BLOCK_D: tl.constexpr, D, MASKED: tl.constexpr):
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
    BLOCK_D: tl.constexpr, D, MASKED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A tile of an operand in parts, the second of which lies `to_low` elements behind the first."""
    high = load_rows(start, rows, stride_row, stride_d, count, BLOCK_D, D, MASKED)
    if PARTS == 2:
        return high, load_rows(start + to_low, rows, stride_row, stride_d, count, BLOCK_D, D, MASKED)
    else:  # noqa: RET505
        return high, high


@triton.jit
def load_operand(
    start, to_low, rows, stride_row, stride_d, count,
    BLOCK_D: tl.constexpr, D, MASKED: tl.constexpr, PARTS: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """A tile in parts, and the exponent by which it is scaled, where it is by one of its own.

    ALONE, it is as the caller gave it, and is split here; else it lies in parts, scaled as its head is.
    """
    if ALONE:
        tile = load_rows(start, rows, stride_row, stride_d, count, BLOCK_D, D, MASKED)
        exponent = exponent_of(tile, PARTS)
        return split(tile, exponent, PARTS), exponent
    else:  # noqa: RET505
        return load_parts(start, to_low, rows, stride_row, stride_d, count, BLOCK_D, D, MASKED, PARTS), 0


@triton.jit
def store_rows(start, rows, stride_row, count, tile, BLOCK_D: tl.constexpr, D):
    """A tile into rows whose elements lie side by side."""
    columns = tl.arange(0, BLOCK_D)
    pointers = start + rows[:, None] * stride_row + columns[None, :]
    tl.store(pointers, tile.to(start.dtype.element_ty), mask=(rows[:, None] < count) & (columns[None, :] < D))


# --- before a kernel streams over two operands of one shape -----------------------------------------------------------


@triton.jit
def _rows_of(
    x, tile, head, stride_b, stride_h, stride_n, stride_d, H, N,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK rows of a head of x (B, H, N, D)."""
    start = of_head(x, head // H, head % H, stride_b, stride_h)
    return load_rows(start, tile * BLOCK + tl.arange(0, BLOCK), stride_n, stride_d, N, BLOCK_D, D, True)


@triton.jit
def _largest_of_heads(
    x, first, count, stride_b, stride_h, stride_n, stride_d, H, N,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The largest magnitude of `count` heads of x (B, H, N, D)."""
    largest = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for head in range(first, first + count):
        for tile in range(tl.cdiv(N, BLOCK)):
            rows = _rows_of(x, tile, head, stride_b, stride_h, stride_n, stride_d, H, N, D, BLOCK, BLOCK_D)
            largest = tl.maximum(largest, tl.abs(rows))
    return largest_magnitude(largest)


@triton.jit
def _largest_of_tiles(of_tiles, kv_head, which, tiles, AT_ONCE: tl.constexpr):
    """The largest of what `attnbench_magnitudes` found."""
    largest = tl.zeros((AT_ONCE,), tl.int32)
    for start in range(0, tiles, AT_ONCE):
        one = start + tl.arange(0, AT_ONCE)
        found = tl.load(of_tiles + 2 * (kv_head * tiles + one) + which, mask=one < tiles, other=0)
        largest = tl.maximum(largest, found)
    return tl.max(largest, 0)


@triton.jit(do_not_specialize=["H"])
def attnbench_magnitudes(
    x, y, magnitudes,
    stride_xb, stride_xh, stride_xn, stride_xd,
    stride_yb, stride_yh, stride_yn, stride_yd,
    H, N, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The largest magnitude of every tile of x and y (B, H, N, D), into magnitudes (B, H, tiles, 2).

    Grid: (tiles of rows, B·H, 2), the last for x and y.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    into = magnitudes + 2 * (head * tl.num_programs(0) + tile)
    if tl.program_id(2) == 0:
        rows = _rows_of(x, tile, head, stride_xb, stride_xh, stride_xn, stride_xd, H, N, D, BLOCK, BLOCK_D)
        tl.store(into, largest_magnitude(rows))
    else:
        rows = _rows_of(y, tile, head, stride_yb, stride_yh, stride_yn, stride_yd, H, N, D, BLOCK, BLOCK_D)
        tl.store(into + 1, largest_magnitude(rows))


@triton.jit
def _store_halves(
    x, parts, of_tiles, to_low, stride_b, stride_h, stride_n, stride_d, H, G, N, tiles, WHICH: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, AT_ONCE: tl.constexpr,
    FOUND: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """This program's rows of x in parts, scaled by the largest magnitude of the heads that share a key head; returns that."""
    tile, head, shared = tl.program_id(0), tl.program_id(1), H // G
    kv_head = head // H * G + head % H // shared
    own = _rows_of(x, tile, head, stride_b, stride_h, stride_n, stride_d, H, N, D, BLOCK, BLOCK_D)
    if FOUND:
        magnitude = _largest_of_tiles(of_tiles, kv_head, WHICH, tiles, AT_ONCE)
    elif WHOLE:
        magnitude = largest_magnitude(own)
    else:
        magnitude = _largest_of_heads(
            x, kv_head * shared, shared, stride_b, stride_h, stride_n, stride_d, H, N, D, BLOCK, BLOCK_D
        )
    high, low = halves(scaled(own, exponent_for(magnitude)))
    rows, start = tile * BLOCK + tl.arange(0, BLOCK), parts + head.to(tl.int64) * N * D
    store_rows(start, rows, D, N, high, BLOCK_D, D)
    if PARTS == 2:
        store_rows(start + to_low, rows, D, N, low, BLOCK_D, D)
    return magnitude


@triton.jit(do_not_specialize=["H", "G", "tiles"], do_not_specialize_on_alignment=["of_tiles", "magnitudes"])
def attnbench_halves(
    x, y, x_parts, y_parts, of_tiles, magnitudes, to_low,
    stride_xb, stride_xh, stride_xn, stride_xd,
    stride_yb, stride_yh, stride_yn, stride_yd,
    H, G, N, tiles,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, AT_ONCE: tl.constexpr,
    FOUND: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """x and y (B, H, N, D), scaled, as parts (PARTS, B, H, N, D) in float16, and their largest magnitudes (B, G, 2).

    A head is scaled by the largest magnitude of all query heads that share its key head. FOUND, that is the largest of
    `of_tiles` (B, G, tiles, 2); else each program looks for it, WHOLE in its own rows, which are all there are. Grid: (tiles
    of rows, B·H, 2), the last for x and y.
    """
    which = tl.program_id(2)
    if which == 0:
        magnitude = _store_halves(
            x, x_parts, of_tiles, to_low, stride_xb, stride_xh, stride_xn, stride_xd, H, G, N, tiles, 0,
            D, BLOCK, BLOCK_D, PARTS, AT_ONCE, FOUND, WHOLE,
        )  # fmt: skip
    else:
        magnitude = _store_halves(
            y, y_parts, of_tiles, to_low, stride_yb, stride_yh, stride_yn, stride_yd, H, G, N, tiles, 1,
            D, BLOCK, BLOCK_D, PARTS, AT_ONCE, FOUND, WHOLE,
        )  # fmt: skip
    if tl.program_id(0) == 0:  # the query heads that share a key head store the same
        head = tl.program_id(1)
        tl.store(magnitudes + 2 * (head // H * G + head % H // (H // G)) + which, magnitude)
