"""Finds the tiles: times candidates on the GPU that is here, and prints the table as `tiles.py` keeps it.

    python -m attnbench.kernels.portable.search --out timings.jsonl --limit-seconds 600

Kernels are compiled by as many processes as there are cores; what spills registers or asks for too much shared memory, with a
causal mask or without, is not timed, nor is what comes out wrong. Timings are appended to the file as they come, and what stands
there is not timed again, so that a search that was cut off goes on. Where no GPU is, `--dry-run` lists the candidates and what
they take.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, astuple, fields, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import click
import torch

from attnbench.kernels.portable.arithmetic import NATIVE
from attnbench.kernels.portable.inspection import KERNELS, Resources, resources
from attnbench.kernels.portable.tiles import (
    HOPPER,
    SHARED_BYTES,
    TILES,
    WIDTHS,
    Table,
    Tile,
    is_wide,
    passes,
    table_for,
)
from attnbench.kernels.portable.timing import Row, time_tiles

PRECISIONS = ("fp16x3", "fp16x1", "tf32", NATIVE, "ieee")

Timings = dict[Tile, dict[int, float]]
"""Of a row, ms by tile and length."""

# --- candidates -------------------------------------------------------------------------------------------------------

QUERIES, KEYS, WARPS = (16, 32, 64, 128, 256), (16, 32, 64, 128), (2, 4, 8)
FIRST_STAGES, OTHER_STAGES, REFINED = (3, 2, 1), (1, 2, 3, 4), 3
"""Every shape of tile is tried with the first of these stages that it fits with; the fastest few of them with the others too,
and with fewer registers."""

REGISTERS = (128, 168)
"""Of a thread, so that four or three programs of four warps share a multiprocessor."""


def rows(kernels: Iterable[str], precisions: Iterable[str], head_dims: Iterable[int]) -> list[Row]:
    """The heads that are in most use come first, and so do the precisions that are taken where none is named."""
    widths = sorted(set(head_dims), key=lambda width: (width > 128, width))
    return [
        Row(kernel, precision, width)
        for late in (False, True)
        for precision in PRECISIONS
        for width in widths
        for kernel in KERNELS
        if precision in precisions and kernel in kernels and (width > 128) is late and (kernel, precision) in HOPPER
    ]


def candidates(row: Row) -> list[tuple[Tile, ...]]:
    """Shapes whose float32 sums may fit into registers, and that leave no thread without work; of each, tiles in order."""
    shapes = product(QUERIES, KEYS, WARPS)
    return [
        tuple(Tile(queries, keys, warps, stages) for stages in FIRST_STAGES)
        for queries, keys, warps in shapes
        if (6 if row.is_short else 12) <= _sums_of_a_thread(row, queries, keys, warps) <= 200
        and _worth_it(row, queries, keys, warps)
    ]


def _sums_of_a_thread(row: Row, queries: int, keys: int, warps: int) -> int:
    """Elements of the results and of what a step makes of them, in float32, of each thread."""
    scores, results = queries * keys, 2 // len(passes(row.precision, row.head_dim))
    sums = {
        "forward": queries * row.head_dim + scores,
        "dq": queries * row.head_dim + 2 * scores,
        "dkdv": results * keys * row.head_dim + 2 * scores,
        "short_forward": queries * row.head_dim + scores,
        "short_backward": results * queries * row.head_dim + 2 * scores,
    }
    return sums[row.kernel] // (32 * warps)


def _worth_it(row: Row, queries: int, keys: int, warps: int) -> bool:
    own, streamed = (keys, queries) if row.kernel == "dkdv" else (queries, keys)
    if row.precision == "ieee":  # products are written out in full: larger ones compile for minutes
        return own <= 64 and streamed <= 64 and queries * keys * row.head_dim // (32 * warps) <= 1024
    if warps < 4 and (row.kernel != "short_forward" or row.head_dim > 64):
        return False
    if row.is_short:  # small tiles spread it over more of the GPU
        most = 128 if is_wide(row.precision, row.head_dim) else 64
        return own <= most and streamed <= (64 if row.kernel == "short_backward" else 128)
    own_least, streamed_least = (
        (16 * warps, 32) if row.head_dim <= 64 else (32, 32) if row.head_dim <= 128 else (16, 16)
    )
    return own >= own_least and streamed_least <= streamed <= 128  # Hopper's products take 64 rows of four warps


def usable(
    row: Row, choices: Sequence[Sequence[Tile]], capability: int, pool: Executor
) -> Iterator[tuple[Tile, Resources | None, str]]:
    """Of each choice the first tile that fits, or its last, with what it takes and why it is dropped, or nothing.

    All are handed to the pool at once, before the first is asked for. The compiled kernels stay in Triton's cache.
    """
    return pool.map(partial(_first_that_fits, row, capability), choices)


def _first_that_fits(row: Row, capability: int, tiles: Sequence[Tile]) -> tuple[Tile, Resources | None, str]:
    tile, *others = tiles
    found, fault = _taken(row, capability, tile, causal=False)
    if not fault:
        _, fault = _taken(row, capability, tile, causal=True)
    return _first_that_fits(row, capability, others) if fault and others else (tile, found, fault)


def _taken(row: Row, capability: int, tile: Tile, *, causal: bool) -> tuple[Resources | None, str]:
    """What the compiler makes of a tile, and what is wrong with it."""
    try:
        found = resources(row.kernel, row.precision, row.head_dim, tile, causal=causal, capability=capability)
    except Exception as error:  # the compiler's, of many kinds
        return None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:100]}"
    if found.spilled_bytes:
        return found, f"spills {found.spilled_bytes} bytes" + (" under a causal mask" if causal else "")
    if found.shared_bytes > SHARED_BYTES[capability]:
        return found, f"needs more than {SHARED_BYTES[capability]} bytes of shared memory"
    return found, ""


# --- choosing ---------------------------------------------------------------------------------------------------------


def slowness(ms: Mapping[Tile, Mapping[int, float]]) -> dict[Tile, float]:
    """Of tiles timed at every length: the mean, over lengths, of how many times the best they take."""
    lengths = max((set(found) for found in ms.values()), key=len, default=set())
    whole = {tile: found for tile, found in ms.items() if set(found) == lengths}
    best = {length: min(found[length] for found in whole.values()) for length in lengths}
    return {
        tile: statistics.geometric_mean(found[length] / best[length] for length in lengths)
        for tile, found in whole.items()
    }


def chosen(table: Table, found: Mapping[Row, Mapping[Tile, Mapping[int, float]]]) -> Table:
    """The table with the fastest tile of each row that was timed."""
    new = {key: list(tiles) for key, tiles in table.items()}
    for row, ms in found.items():
        if ranked := slowness(ms):
            new[row.kernel, row.precision][WIDTHS.index(row.head_dim)] = min(ranked, key=lambda tile: ranked[tile])
    return {key: tuple(tiles) for key, tiles in new.items()}


def table_text(table: Table) -> str:
    """As it stands in `tiles.py`, between the braces."""
    lines = []
    for (kernel, precision), tiles in table.items():
        words = ", ".join(f"Tile({', '.join(str(one) for one in astuple(tile) if one is not None)})" for tile in tiles)
        lines.append(f'    ("{kernel}", "{precision}"): (\n        {words},\n    ),')
    return "\n".join(lines)


def timings(file: Path | None, capability: int) -> dict[Row, Timings]:
    """What a file holds of this capability; the last of several timings of a tile counts."""
    found: dict[Row, Timings] = {}
    for line in file.read_text("utf-8").splitlines() if file and file.exists() else ():
        told = json.loads(line)
        if told["capability"] == capability:
            tile = Tile(**{field.name: told[field.name] for field in fields(Tile)})
            row = Row(told["kernel"], told["precision"], told["head_dim"])
            found.setdefault(row, {})[tile] = {int(length): ms for length, ms in told["ms"].items()}
    return found


# --- the command ------------------------------------------------------------------------------------------------------


def search(
    wanted: Sequence[Row], found: Mapping[Row, Timings], capability: int, pool: Executor, over: Callable[[], bool]
) -> Iterator[tuple[Row, Timings]]:
    """Timings of the rows in lots: of every shape, and of the best shapes with other stages and fewer registers.

    What a lot needs of all rows is compiled while the first of them are timed.
    """
    known: dict[Row, Timings] = {row: dict(found.get(row, {})) for row in wanted}
    for refine in (False, True):
        compiling: dict[Row, Iterator[tuple[Tile, Resources | None, str]]] = {}
        for row in wanted:
            choices = refinements(known[row]) if refine else [(in_use(row, capability),), *candidates(row)]
            new = [choice for choice in choices if known[row].keys().isdisjoint(choice)]
            compiling[row] = usable(row, new, capability, pool)
        for row, told in compiling.items():
            fit = list(dict.fromkeys(tile for tile, _, why in told if not why))
            if over():
                return
            timed = time_tiles(row, fit, over) if fit else {}
            known[row].update(timed)
            yield row, timed


def refinements(known: Timings) -> list[tuple[Tile]]:
    ranked = slowness(known)
    best = sorted(ranked, key=lambda tile: ranked[tile])[:REFINED]
    others = [{"stages": stages} for stages in OTHER_STAGES] + [{"max_registers": most} for most in REGISTERS]
    return [(replace(tile, **other),) for tile in best for other in others]


def in_use(row: Row, capability: int) -> Tile:
    return TILES[capability][row.kernel, row.precision][WIDTHS.index(row.head_dim)]


@click.command(help=__doc__)
@click.option("--kernel", "kernels", multiple=True, type=click.Choice(list(KERNELS)), default=tuple(KERNELS))
@click.option("--precision", "precisions", multiple=True, type=click.Choice(PRECISIONS), default=PRECISIONS)
@click.option("--head-dim", "head_dims", multiple=True, type=click.Choice([str(x) for x in WIDTHS]), default=tuple(map(str, WIDTHS)))  # fmt: skip
@click.option("--capability", type=click.Choice([str(x) for x in TILES]), help="Which table; by default the GPU's.")
@click.option("--limit-seconds", type=float, default=float("inf"), help="Start nothing new after this long.")
@click.option("--out", type=click.Path(path_type=Path), help="Lines of JSON, one a timing, which are appended.")
@click.option("--dry-run", is_flag=True, help="List the candidates with what the compiler makes of them; time none.")
def main(
    kernels: tuple[str, ...], precisions: tuple[str, ...], head_dims: tuple[str, ...], capability: str | None,
    limit_seconds: float, out: Path | None, dry_run: bool,
) -> None:  # fmt: skip
    began = time.monotonic()
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not dry_run:
        raise click.UsageError("there is no CUDA GPU; --dry-run lists the candidates")
    which = int(capability) if capability else table_for(torch.cuda.get_device_capability()) if has_gpu else max(TILES)
    found = timings(out, which)
    over = lambda: time.monotonic() - began > limit_seconds  # noqa: E731
    wanted = rows(kernels, precisions, map(int, head_dims))
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        if dry_run:
            for row in wanted:
                for tile, taken, why in usable(row, candidates(row), which, pool):
                    told = asdict(row) | asdict(tile) | (asdict(taken) if taken else {}) | {"dropped": why}
                    click.echo(json.dumps(told))
            return
        for row, lot in search(wanted, found, which, pool, over):
            found.setdefault(row, {}).update(lot)
            _append(out, row, which, lot)
            _report(row, which, found[row], time.monotonic() - began)
        if over():
            click.echo(f"{limit_seconds:g} s are over, and the search was cut short", err=True)
        pool.shutdown(cancel_futures=True)
    click.echo(table_text(chosen(TILES[which], found)))


def _append(out: Path | None, row: Row, capability: int, lot: Mapping[Tile, Mapping[int, float]]) -> None:
    if out is None:
        return
    with out.open("a", encoding="utf-8") as file:
        for tile, ms in lot.items():
            device = {"device": torch.cuda.get_device_name(), "capability": capability}
            file.write(json.dumps(device | asdict(row) | asdict(tile) | {"ms": ms}) + "\n")


def _report(row: Row, capability: int, ms: Mapping[Tile, Mapping[int, float]], seconds: float) -> None:
    """The best tile beside the one in use."""
    ranked = slowness(ms)
    if not ranked:
        click.echo(f"{seconds:5.0f} s  {row}: nothing was timed", err=True)
        return
    best = min(ranked, key=lambda tile: ranked[tile])
    used = in_use(row, capability)
    beside = "the one in use" if best == used else f"{used} {ms.get(used)}"
    click.echo(f"{seconds:5.0f} s  {row}: {len(ms)} timed; {best} {ms[best]}; {beside}", err=True)


if __name__ == "__main__":
    main()
