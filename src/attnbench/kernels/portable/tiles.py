"""How large the tiles are, and how many warps and stages work on them: chosen by search, kept as data."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Queries by keys; the warps of a program, and the stages of its loads."""

    queries: int
    keys: int
    warps: int
    stages: int


WIDTHS = (16, 32, 64, 128, 256)
"""Head dimensions as tiles have them; others take the next larger."""

INTERPRETED = Tile(32, 32, 4, 1)
"""On a CPU, where Triton's interpreter runs the kernels."""

HOPPER: dict[tuple[str, str], tuple[Tile, ...]] = {
    ("forward", "native"): (
        Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 32, 4, 1),
    ),
    ("forward", "fp16x1"): (
        Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 32, 4, 1),
    ),
    ("forward", "fp16x3"): (
        Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(16, 32, 4, 1),
    ),
    ("forward", "tf32"): (
        Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 1),
    ),
    ("forward", "ieee"): (
        Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 4, 1),
    ),
    ("dq", "native"): (
        Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 32, 4, 2),
    ),
    ("dq", "fp16x1"): (
        Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 32, 4, 1),
    ),
    ("dq", "fp16x3"): (
        Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(16, 32, 4, 1),
    ),
    ("dq", "tf32"): (
        Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(16, 32, 4, 1),
    ),
    ("dq", "ieee"): (
        Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1),
    ),
    ("dkdv", "native"): (
        Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 128, 8, 1), Tile(32, 32, 4, 1),
    ),
    ("dkdv", "fp16x1"): (
        Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2), Tile(32, 32, 4, 1),
    ),
    ("dkdv", "fp16x3"): (
        Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1),
    ),
    ("dkdv", "tf32"): (
        Tile(32, 64, 4, 2), Tile(32, 64, 4, 2), Tile(32, 64, 4, 2), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1),
    ),
    ("dkdv", "ieee"): (
        Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(16, 32, 4, 1), Tile(16, 16, 4, 1),
    ),
}  # fmt: skip
"""By kernel and precision, a tile for each of `WIDTHS`: of those that spill no register, the largest. Not timed yet."""

LIKE = {"tf32x3": "fp16x3", "bf16x3": "fp16x3"}
"""Precisions without rows of their own."""


def tile(kernel: str, head_dim: int, precision: str, device: torch.device) -> Tile:
    """The tile for a kernel, `forward`, `dq` or `dkdv`."""
    if device.type == "cpu":
        return INTERPRETED
    width = next(index for index, width in enumerate(WIDTHS) if head_dim <= width)
    return HOPPER[kernel, LIKE.get(precision, precision)][width]
