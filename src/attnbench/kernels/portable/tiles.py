"""How large the tiles are, and how many warps and stages work on them: chosen by search, kept as data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """Queries by keys, in `short_backward` rows of its own by rows it goes through; the warps of a program, and the stages of
    its loads.

    `max_registers` is how many a thread may have, where the compiler would take more than lets another program run beside.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    max_registers: int | None = None

    def options(self) -> dict[str, int | None]:
        """Of the compiler."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.max_registers}


WIDTHS = (16, 32, 64, 128, 256)
"""Head dimensions as tiles have them; others take the next larger."""


INTERPRETED = Tile(32, 32, 4, 1)
"""On a CPU, where Triton's interpreter runs the kernels."""

Table = dict[tuple[str, str], tuple[Tile, ...]]
"""By kernel and precision, a tile for each of `WIDTHS`; `search` prints one."""

HOPPER: Table = {
    ("forward", "native"): (
        Tile(64, 128, 4, 3, 128), Tile(64, 128, 4, 3, 128), Tile(64, 128, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3),
    ),
    ("forward", "fp16x1"): (
        Tile(64, 128, 4, 3, 128), Tile(64, 64, 4, 3), Tile(64, 128, 4, 3), Tile(64, 64, 4, 3), Tile(128, 32, 8, 3),
    ),
    ("forward", "fp16x3"): (
        Tile(64, 128, 4, 3), Tile(64, 128, 4, 3), Tile(128, 128, 8, 3), Tile(128, 32, 8, 3), Tile(16, 32, 8, 3),
    ),
    ("forward", "ieee"): (
        Tile(32, 64, 2, 3, 168), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3), Tile(32, 64, 8, 2), Tile(32, 32, 8, 2),
    ),
    ("dq", "native"): (
        Tile(64, 64, 4, 4), Tile(64, 64, 4, 3), Tile(64, 128, 4, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 3),
    ),
    ("dq", "fp16x1"): (
        Tile(64, 128, 4, 3), Tile(64, 128, 4, 3), Tile(64, 128, 4, 3), Tile(128, 64, 8, 3), Tile(64, 32, 4, 4),
    ),
    ("dq", "fp16x3"): (
        Tile(64, 64, 4, 3), Tile(64, 128, 4, 3), Tile(128, 128, 8, 2), Tile(128, 32, 8, 3), Tile(32, 64, 8, 2),
    ),
    ("dq", "ieee"): (
        Tile(64, 64, 4, 4, 168), Tile(32, 64, 2, 3), Tile(64, 32, 8, 3, 128), Tile(32, 32, 4, 3, 168), Tile(32, 32, 8, 3, 168),
    ),
    ("dkdv", "native"): (
        Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3), Tile(32, 64, 8, 3),
    ),
    ("dkdv", "fp16x1"): (
        Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3), Tile(64, 32, 4, 2),
    ),
    ("dkdv", "fp16x3"): (
        Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 128, 8, 3), Tile(32, 128, 8, 3), Tile(64, 32, 8, 2),
    ),
    ("dkdv", "ieee"): (
        Tile(64, 64, 4, 3), Tile(32, 64, 2, 3), Tile(32, 16, 2, 3, 168), Tile(32, 32, 4, 2), Tile(32, 32, 8, 3),
    ),
    ("short_forward", "native"): (
        Tile(32, 128, 2, 3), Tile(64, 128, 4, 3), Tile(64, 128, 4, 3), Tile(64, 128, 4, 3), Tile(64, 64, 4, 3),
    ),
    ("short_forward", "tf32"): (
        Tile(32, 64, 2, 3, 128), Tile(16, 128, 4, 3), Tile(16, 64, 4, 3), Tile(16, 64, 4, 3), Tile(32, 64, 4, 2),
    ),
    ("short_forward", "fp16x3"): (
        Tile(32, 128, 4, 3), Tile(16, 128, 4, 3), Tile(32, 64, 4, 2), Tile(64, 64, 4, 3), Tile(16, 32, 8, 4),
    ),
    ("short_backward", "native"): (
        Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 8, 3), Tile(64, 64, 8, 3), Tile(64, 32, 8, 3),
    ),
    ("short_backward", "fp16x1"): (
        Tile(64, 64, 4, 4), Tile(64, 64, 4, 3), Tile(64, 64, 8, 3), Tile(32, 32, 4, 3), Tile(16, 64, 8, 1),
    ),
    ("short_backward", "fp16x3"): (
        Tile(64, 64, 4, 3), Tile(16, 64, 4, 3), Tile(32, 64, 8, 4), Tile(64, 32, 4, 3), Tile(16, 64, 8, 1),
    ),
}  # fmt: skip
"""By searches: of `ieee`, and of all at 256, on an H100 to their end; of the others on an H200, not to their end."""

AMPERE: Table = {
    ("forward", "native"): (
        Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2),
    ),
    ("forward", "fp16x1"): (
        Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(16, 32, 4, 1),
    ),
    ("forward", "fp16x3"): (
        Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 32, 4, 1), Tile(16, 32, 8, 1),
    ),
    ("forward", "ieee"): (
        Tile(32, 64, 2, 3, 168), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3), Tile(64, 32, 8, 2, 128), Tile(32, 16, 8, 3),
    ),
    ("dq", "native"): (
        Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 32, 4, 2),
    ),
    ("dq", "fp16x1"): (
        Tile(64, 64, 4, 3), Tile(64, 64, 4, 1), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 32, 4, 1),
    ),
    ("dq", "fp16x3"): (
        Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 128, 8, 2), Tile(64, 32, 8, 1), Tile(16, 32, 4, 1),
    ),
    ("dq", "ieee"): (
        Tile(64, 64, 4, 4, 168), Tile(32, 64, 2, 2), Tile(64, 32, 8, 3, 128), Tile(32, 32, 4, 2, 168), Tile(16, 32, 4, 2),
    ),
    ("dkdv", "native"): (
        Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 1), Tile(32, 64, 4, 1), Tile(32, 32, 8, 2),
    ),
    ("dkdv", "fp16x1"): (
        Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 64, 4, 1), Tile(32, 64, 4, 1), Tile(32, 32, 8, 2),
    ),
    ("dkdv", "fp16x3"): (
        Tile(64, 64, 4, 2), Tile(32, 128, 8, 1), Tile(64, 32, 8, 2), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1),
    ),
    ("dkdv", "ieee"): (
        Tile(64, 64, 4, 3), Tile(32, 64, 2, 3), Tile(32, 16, 2, 3, 168), Tile(32, 32, 4, 2), Tile(16, 16, 4, 2),
    ),
    ("short_forward", "native"): (
        Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 32, 4, 1),
    ),
    ("short_forward", "tf32"): (
        Tile(32, 64, 4, 2), Tile(32, 64, 4, 2), Tile(32, 64, 4, 2), Tile(32, 64, 4, 2), Tile(32, 32, 4, 1),
    ),
    ("short_forward", "fp16x3"): (
        Tile(32, 64, 4, 3), Tile(32, 64, 4, 3), Tile(32, 64, 4, 2), Tile(64, 32, 4, 1), Tile(16, 32, 8, 1),
    ),
    ("short_backward", "native"): (
        Tile(64, 64, 4, 3), Tile(32, 32, 4, 2), Tile(32, 32, 4, 3), Tile(32, 32, 8, 3), Tile(32, 32, 8, 1),
    ),
    ("short_backward", "fp16x1"): (
        Tile(32, 32, 4, 1), Tile(32, 32, 4, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1),
    ),
    ("short_backward", "fp16x3"): (
        Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1),
    ),
}  # fmt: skip
"""As Hopper's were, but for what spills there or needs more shared memory than the smallest of these GPUs has; of `ieee` what was
fastest on Hopper of what does neither. Not timed."""

TILES = {80: AMPERE, 90: HOPPER}
"""By the compute capability, ten times its number, that the kernels are compiled for to choose them."""

SHARED_BYTES = {80: 99 << 10, 90: 227 << 10}
"""The shared memory that every GPU of a table has for one program."""

FROM = {80: 80, 90: 90, 120: 80}
"""The table that serves GPUs from a compute capability on, up to the next."""


def table_for(capability: tuple[int, int]) -> int:
    """Which of `TILES` serves GPUs of this compute capability; older ones than any are left to the first."""
    has = 10 * capability[0] + capability[1]
    return FROM[max((first for first in FROM if first <= has), default=min(FROM))]


@cache
def _table_of(device: torch.device) -> Table:
    return TILES[table_for(torch.cuda.get_device_capability(device))]


def tile(kernel: str, head_dim: int, precision: str, device: torch.device) -> Tile:
    """The tile for a kernel, by its name in the table."""
    if device.type == "cpu":
        return INTERPRETED
    width = next(index for index, width in enumerate(WIDTHS) if head_dim <= width)
    return _table_of(device)[kernel, precision][width]


def is_wide(precision: str, head_dim: int) -> bool:
    """Whether a program has no registers for two results at a time, nor to split what it multiplies."""
    return precision == "fp16x3" and head_dim > 64


def passes(precision: str, head_dim: int) -> tuple[dict[str, bool], ...]:
    """The launches of `dkdv`: one for both results, or for one at a time."""
    if is_wide(precision, head_dim):
        return {"DK": False, "DV": True}, {"DK": True, "DV": False}
    return ({"DK": True, "DV": True},)
