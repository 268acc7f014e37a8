"""Operands in parts, made by small kernels before others stream over them: their rows, warps and grids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnbench.kernels.portable import operands
from attnbench.kernels.portable.arithmetic import HALVES
from attnbench.kernels.portable.launches import Launches, Rest, programs

attnbench_magnitudes: Any = operands.attnbench_magnitudes
attnbench_halves: Any = operands.attnbench_halves

ELEMENTS, AT_ONCE = 8192, 256
"""Of an operand, in a program that looks at each once; magnitudes of tiles that it looks at at a time."""

FEW = 32768
"""Elements of the heads that share a scale, up to which what splits them finds it as well: a launch that finds it beforehand
would take longer. Where that is one head, and its parts have no more, one program splits it; else each of several looks at
all."""

ELEMENTS_A_WARP, WARPS = 2048, (4, 16)
"""Of what splits a whole head at once; the least warps, and the most."""


def in_parts(
    launch: Launches, step: str, x: Tensor, y: Tensor, found: Tensor | None, magnitudes: Tensor, precision: str
) -> tuple[Tensor, Tensor, int]:
    """x and y (B, H, N, D) as products want them: themselves, or first halves and how far behind them the second lie.

    `magnitudes` (B, G, 2) become the largest of heads that share a key head: those of `found` (B, G, any, 2), where there are
    some.
    """
    if precision not in HALVES:
        return x, y, 0
    (batch, heads, rows, head_dim), kv_heads = x.shape, magnitudes.shape[1]
    if found is None and heads // kv_heads * rows * block_for(head_dim) > FEW:
        found = _of_tiles(launch, step, x, y)
    parts, to_low = HALVES[precision], x.numel()
    x_parts, y_parts = (x.new_empty((parts, *x.shape), dtype=torch.float16) for _ in range(2))

    def rest() -> Rest:
        tiles = 0 if found is None else found.shape[1] * found.shape[2] // kv_heads
        whole = found is None and heads == kv_heads and parts * rows * block_for(head_dim) <= FEW
        of_rows = _by_head(x) if whole else _by_rows(x)
        return (
            (programs(rows, of_rows["BLOCK"]), batch * heads, 2),
            (to_low, *x.stride(), *y.stride(), heads, kv_heads, rows, tiles),
            of_rows | {"PARTS": parts, "AT_ONCE": AT_ONCE, "FOUND": found is not None, "WHOLE": whole},
        )

    of_tiles = magnitudes if found is None else found
    launch(("halves", step), attnbench_halves, (x, y, x_parts, y_parts, of_tiles, magnitudes), rest)
    return x_parts[0], y_parts[0], to_low


def _of_tiles(launch: Launches, step: str, x: Tensor, y: Tensor) -> Tensor:
    """The largest magnitudes of tiles of x and y (B, H, N, D), as bits: (B, H, tiles, 2)."""
    batch, heads, rows, _ = x.shape
    of_rows = _by_rows(x)
    tiles = programs(rows, of_rows["BLOCK"])
    found = x.new_empty((batch, heads, tiles, 2), dtype=torch.int32)

    def rest() -> Rest:
        return (tiles, batch * heads, 2), (*x.stride(), *y.stride(), heads, rows), of_rows

    launch(("magnitudes", step), attnbench_magnitudes, (x, y, found), rest)
    return found


def _by_rows(x: Tensor) -> dict[str, int]:
    """The constants of kernels in which a program looks at some rows once."""
    head_dim = x.shape[3]
    return {"D": head_dim, "BLOCK": ELEMENTS // block_for(head_dim), "BLOCK_D": block_for(head_dim)}


def _by_head(x: Tensor) -> dict[str, int]:
    """The same of one in which a program looks at all rows of a head."""
    _, _, rows, head_dim = x.shape
    return _by_rows(x) | {"BLOCK": block_for(rows), "num_warps": warps_for(block_for(rows) * block_for(head_dim))}


def warps_for(elements: int) -> int:
    """Of a program that splits so many at once."""
    least, most = WARPS
    return min(most, max(least, elements // ELEMENTS_A_WARP))


def block_for(count: int) -> int:
    """The power of two that holds so many rows or columns, at least what products take."""
    return max(16, 1 << (count - 1).bit_length())
