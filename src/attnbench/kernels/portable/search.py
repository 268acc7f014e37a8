"""Finds the tiles: times candidates on the GPU that is here, and prints the table as `tiles.py` keeps it.

    python -m attnbench.kernels.portable.search --out timings.jsonl --limit-seconds 600

Kernels are compiled by as many processes as there are cores; what spills registers or asks for too much shared memory is not
timed, nor is what comes out wrong. What is fastest is compiled with a causal mask as well, and dropped where it spills then.
Timings are appended to the file as they come, and what stands there is not timed again, so that a search that was cut off goes
on. Where no GPU is, `--dry-run` lists the candidates and what they take.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import click
import torch

from attnbench.kernels.portable.arithmetic import NATIVE
from attnbench.kernels.portable.inspection import KERNELS, Resources, resources
from attnbench.kernels.portable.tiles import SHARED_BYTES, TILES, WIDTHS, Table, Tile, table_for
from attnbench.kernels.portable.timing import LENGTHS, Row, time_tiles

PRECISIONS = ("fp16x3", "fp16x1", NATIVE, "ieee")

# --- candidates -------------------------------------------------------------------------------------------------------

QUERIES, KEYS, WARPS = (16, 32, 64, 128, 256), (16, 32, 64, 128), (4, 8)
FIRST_STAGES, OTHER_STAGES, REFINED = 2, (1, 3, 4), 3
"""Every shape of tile is tried with the first; the fastest few of them with the others too."""

MASKED = 8
"""How many of the fastest tiles are compiled with a causal mask, to find one that does not spill under it either."""


def rows(kernels: Iterable[str], precisions: Iterable[str], head_dims: Iterable[int]) -> list[Row]:
    """The heads that are in most use come first, and so do the precisions that are taken where none is named."""
    widths = sorted(set(head_dims), key=lambda width: (width > 128, width))
    return [
        Row(kernel, precision, width)
        for late in (False, True)
        for precision in PRECISIONS
        for width in widths
        for kernel in KERNELS
        if precision in precisions and kernel in kernels and (width > 128) is late
    ]


def candidates(row: Row) -> list[Tile]:
    """Tiles whose float32 sums may fit into registers, and that leave no thread without work."""
    shapes = product(QUERIES, KEYS, WARPS)
    return [
        Tile(queries, keys, warps, FIRST_STAGES)
        for queries, keys, warps in shapes
        if 12 <= _sums_of_a_thread(row, queries, keys, warps) <= 200 and _worth_it(row, queries, keys, warps)
    ]


def _sums_of_a_thread(row: Row, queries: int, keys: int, warps: int) -> int:
    """Elements of the results and of what a step makes of them, in float32, of each thread."""
    scores = queries * keys
    sums = {
        "forward": queries * row.head_dim + scores,
        "dq": queries * row.head_dim + 2 * scores,
        "dkdv": 2 * keys * row.head_dim + 2 * scores,
    }
    return sums[row.kernel] // (32 * warps)


def _worth_it(row: Row, queries: int, keys: int, warps: int) -> bool:
    own, streamed = (keys, queries) if row.kernel == "dkdv" else (queries, keys)
    if row.precision == "ieee":  # products are written out in full: larger ones compile for minutes
        return own <= 64 and streamed <= 64 and queries * keys * row.head_dim // (32 * warps) <= 1024
    return streamed <= 128 and (row.head_dim > 128 or min(queries, keys) >= 32)


def usable(
    row: Row, tiles: Sequence[Tile], capability: int, pool: Executor
) -> Iterator[tuple[Tile, Resources | None, str]]:
    """What each takes, and why it is dropped, or nothing; the compiled kernels stay in Triton's cache."""
    for tile, (found, why) in zip(tiles, pool.map(partial(_taken, row, capability), tiles), strict=True):
        if found and found.spilled_bytes:
            why = f"spills {found.spilled_bytes} bytes"
        elif found and found.shared_bytes > SHARED_BYTES[capability]:
            why = f"needs more than {SHARED_BYTES[capability]} bytes of shared memory"
        yield tile, found, why


def spilling_under_a_mask(
    row: Row, ms: Mapping[Tile, Mapping[int, float]], capability: int, pool: Executor
) -> list[Tile]:
    """The tiles that are faster than the fastest of those that do not spill under a causal mask either."""
    ranked = slowness(ms)
    first = sorted(ranked, key=lambda tile: ranked[tile])[:MASKED]
    spilling: list[Tile] = []
    for tile, (found, _) in zip(first, pool.map(partial(_taken, row, capability, causal=True), first), strict=True):
        if found and not found.spilled_bytes:
            break
        spilling.append(tile)
    return spilling


def _taken(row: Row, capability: int, tile: Tile, *, causal: bool = False) -> tuple[Resources | None, str]:
    try:
        return resources(row.kernel, row.precision, row.head_dim, tile, causal=causal, capability=capability), ""
    except Exception as error:  # the compiler's, of many kinds
        return None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:100]}"


# --- choosing ---------------------------------------------------------------------------------------------------------


def slowness(ms: Mapping[Tile, Mapping[int, float]]) -> dict[Tile, float]:
    """Of tiles timed at every length: the product, over lengths, of how many times the best they take."""
    whole = {tile: found for tile, found in ms.items() if set(found) == set(LENGTHS)}
    best = {length: min((found[length] for found in whole.values()), default=1.0) for length in LENGTHS}
    return {
        tile: statistics.geometric_mean(found[length] / best[length] for length in LENGTHS)
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
        words = ", ".join(f"Tile({tile.queries}, {tile.keys}, {tile.warps}, {tile.stages})" for tile in tiles)
        lines.append(f'    ("{kernel}", "{precision}"): (\n        {words},\n    ),')
    return "\n".join(lines)


def timings(file: Path | None, capability: int) -> dict[Row, dict[Tile, dict[int, float]]]:
    """What a file holds of this capability; the last of several timings of a tile counts."""
    found: dict[Row, dict[Tile, dict[int, float]]] = {}
    for line in file.read_text("utf-8").splitlines() if file and file.exists() else ():
        told = json.loads(line)
        if told["capability"] == capability:
            tile = Tile(**{name: told[name] for name in ("queries", "keys", "warps", "stages")})
            row = Row(told["kernel"], told["precision"], told["head_dim"])
            found.setdefault(row, {})[tile] = {int(length): ms for length, ms in told["ms"].items()}
    return found


# --- the command ------------------------------------------------------------------------------------------------------


def search(
    row: Row, known: Mapping[Tile, Mapping[int, float]], capability: int, pool: Executor, over: Callable[[], bool]
) -> Iterator[dict[Tile, dict[int, float]]]:
    """Timings of a row in lots: every shape, the best shapes with other stages, and none of what is of no use."""
    clock = time.perf_counter
    in_use = TILES[capability][row.kernel, row.precision][WIDTHS.index(row.head_dim)]
    for refine in (False, True):
        tiles = candidates(row)
        if refine:
            ranked = slowness(known)
            best = sorted(ranked, key=lambda tile: ranked[tile])[:REFINED]
            tiles = [Tile(tile.queries, tile.keys, tile.warps, stages) for tile in best for stages in OTHER_STAGES]
        new = [tile for tile in dict.fromkeys([*tiles, in_use]) if tile not in known]
        began = clock()
        fit = [tile for tile, _, why in usable(row, new, capability, pool) if not why]
        compiled = clock()
        found = time_tiles(row, fit, over) if fit and not over() else {}
        click.echo(
            f"         {len(new)} compiled in {compiled - began:.0f} s, {len(fit)} tried in {clock() - compiled:.0f} s",
            err=True,
        )
        known = {**known, **found}
        yield found
    yield {tile: {} for tile in spilling_under_a_mask(row, known, capability, pool)}


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
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for row in rows(kernels, precisions, map(int, head_dims)):
            if over():
                click.echo(f"{limit_seconds:g} s are over; not searched: {row} and what follows", err=True)
                break
            if dry_run:
                for tile, taken, why in usable(row, candidates(row), which, pool):
                    told = asdict(row) | asdict(tile) | (asdict(taken) if taken else {}) | {"dropped": why}
                    click.echo(json.dumps(told))
                continue
            for lot in search(row, found.get(row, {}), which, pool, over):
                found.setdefault(row, {}).update(lot)
                _append(out, row, which, lot)
            _report(row, which, found[row], time.monotonic() - began)
    if not dry_run:
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
    in_use = TILES[capability][row.kernel, row.precision][WIDTHS.index(row.head_dim)]
    beside = "the one in use" if best == in_use else f"{in_use} {ms.get(in_use)}"
    click.echo(f"{seconds:5.0f} s  {row}: {len(ms)} timed; {best} {ms[best]}; {beside}", err=True)


if __name__ == "__main__":
    main()
