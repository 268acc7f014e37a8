"""Tiles timed on the GPU that is here: the launches of a step, repeated with other tiles."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from attnbench.kernels.portable import launch
from attnbench.kernels.portable.arithmetic import NATIVE, SHORT_FORWARD
from attnbench.kernels.portable.tiles import Tile

BATCH, LENGTHS, SHORT_LENGTHS = 8, (16384, 4096, 1024), (512, 256)
"""One head each; as many keys as queries. The second are of what serves no longer ones."""

HOLD_CYCLES, LONGEST_HOLD_CYCLES = 1 << 19, 1 << 26
"""For how long the device is held while a call is queued: a quarter of a millisecond, doubled where that is not enough."""


@dataclass(frozen=True)
class Row:
    """What a tile is chosen for."""

    kernel: str
    precision: str
    head_dim: int

    @property
    def is_short(self) -> bool:
        """Whether it serves short sequences alone."""
        return self.kernel.startswith("short")

    @property
    def lengths(self) -> tuple[int, ...]:
        """At which it is timed, the longest first."""
        return SHORT_LENGTHS if self.is_short else LENGTHS


RESULTS = {
    "forward": ("out", "logsumexp"),
    "dq": ("dq", "of_rows"),
    "dkdv": ("dk", "dv"),
    "short_forward": ("out", "logsumexp"),
    "short_backward": ("dq", "dk", "dv"),
}
CLOSE_ENOUGH, SLOW, ROUNDS = 1e-2, 1.4, 7
"""How far results may be from those of the tile in use; from how many times the best on a tile is given up; the rounds of
those that are left."""


Launched = tuple[Any, dict[str, Any]]
"""A kernel and its arguments by name, constants included."""


@dataclass(frozen=True)
class Call:
    """The launches of a kernel in a step, which any tile can take, and what the tile in use made of them."""

    kernel: str
    length: int
    launches: tuple[Launched, ...]
    own: dict[str, Tensor]
    expected: tuple[Tensor, ...]

    def __call__(self, tile: Tile) -> None:
        shape = {"BLOCK_M": tile.queries, "BLOCK_N": tile.keys} | tile.options()
        for kernel, arguments in self.launches:
            of_queries = triton.cdiv(arguments.get("ROWS", self.length), tile.queries)
            of_keys = triton.cdiv(self.length, tile.keys)
            of_all = (3 if arguments.get("APART") else 2) * of_queries
            programs = {"dkdv": of_keys, "short_backward": of_all}.get(self.kernel, of_queries)
            kernel[(programs, 1, BATCH)](**arguments | shape)

    def is_right(self, tile: Tile) -> bool:
        results = [self.own[name].fill_(torch.nan) for name in RESULTS[self.kernel]]
        try:
            self(tile)
        except triton.runtime.OutOfResources:
            return False
        return all(_close(got.float(), right.float()) for got, right in zip(results, self.expected, strict=True))


def _close(got: Tensor, right: Tensor) -> bool:
    """Where one is infinite the other must be the same; a NaN is close to nothing."""
    infinite = right.isinf()
    finite, others = right[~infinite], got[~infinite]
    return torch.equal(got[infinite], right[infinite]) and bool(
        (others - finite).norm() <= CLOSE_ENOUGH * finite.norm()
    )


@lru_cache(maxsize=1)  # all kernels of a precision and width follow each other
def calls(precision: str, head_dim: int, lengths: tuple[int, ...]) -> Mapping[tuple[str, int], Call]:
    """The launches of a step on random data, overheard, by kernel and length."""
    heard: dict[tuple[str, int], Call] = {}
    for length in lengths:
        for name, launches in _overheard(precision, head_dim, length).items():
            _, first = launches[0]
            expected = tuple(first[result] for result in RESULTS[name])  # which other kernels read
            own = {result: torch.empty_like(first[result]) for result in RESULTS[name]}
            instead = tuple((kernel, arguments | own) for kernel, arguments in launches)
            heard[name, length] = Call(name, length, instead, own, expected)
    return heard


def _overheard(precision: str, head_dim: int, length: int) -> dict[str, list[Launched]]:
    heard: dict[str, list[Launched]] = {}

    class Listener:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launched(*arguments: Any, **constants: Any) -> None:
                named = dict(zip(self.kernel.arg_names, arguments, strict=False)) | constants
                name = f"short_{self.name}" if short else self.name
                heard.setdefault(name, []).append((self.kernel, named))
                self.kernel[grid](*arguments, **constants)

            return launched

    dtype = torch.bfloat16 if precision == NATIVE else torch.float32
    precision = next((asked for asked, used in SHORT_FORWARD.items() if used == precision), precision)
    torch.manual_seed(0)
    q, k, v, d_out = (torch.randn(BATCH, 1, length, head_dim, device=_device(), dtype=dtype) for _ in range(4))
    short = launch.is_short(q, k, precision)
    instead: dict[str, Any] = {
        f"attnbench_{name}": Listener(name, getattr(launch, f"attnbench_{name}"))
        for name in ("forward", "dq", "dkdv", "backward")
    }
    with torch.no_grad(), mock.patch.multiple(launch, MUCH_BYTES=1 << 62, **instead):
        scale = head_dim**-0.5
        out, logsumexp, magnitudes = launch.forward(q, k, v, False, scale, precision)
        launch.backward(q, k, v, out, d_out, logsumexp, magnitudes, False, scale, precision)
    return heard


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def sample_ms(work: Callable[[], None], other_data: Tensor) -> float:
    """One call, from a cold cache, while the device is held until the host has queued it."""
    hold = HOLD_CYCLES
    while True:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(hold)
        other_data.zero_()
        start.record()
        work()
        end.record()
        ahead = not start.query()
        end.synchronize()
        if ahead or hold >= LONGEST_HOLD_CYCLES:
            return start.elapsed_time(end)
        hold *= 2


def _other_data() -> Tensor:
    """What fills the L2 cache twice."""
    return torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device="cuda")


def time_tiles(row: Row, tiles: Sequence[Tile], over: Callable[[], bool]) -> dict[Tile, dict[int, float]]:
    """The median of each tile at each length, in turns; of tiles that are far behind in the first, that one sample."""
    known, longest = calls(row.precision, row.head_dim, row.lengths), row.lengths[0]
    heard = {length: known[row.kernel, length] for length in row.lengths}
    other_data = _other_data()
    samples: dict[Tile, dict[int, list[float]]] = {}
    for tile in tiles:
        if over():
            break
        if all(call.is_right(tile) for call in heard.values()):
            samples[tile] = {longest: [sample_ms(partial(heard[longest], tile), other_data)]}
    best = min((taken[longest][0] for taken in samples.values()), default=0.0)
    near = [tile for tile, taken in samples.items() if taken[longest][0] <= SLOW * best]
    for _ in range(ROUNDS):
        for tile, length in product(near, row.lengths):
            samples[tile].setdefault(length, []).append(sample_ms(partial(heard[length], tile), other_data))
    return {
        tile: {length: statistics.median(taken) for length, taken in of_tile.items()}
        for tile, of_tile in samples.items()
    }
