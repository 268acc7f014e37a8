"""The search for tiles, as far as no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from click.testing import CliRunner

import test_kernels
from test_kernels import INTERPRET

with mock.patch.dict(os.environ, INTERPRET):
    from attnbench.kernels.portable import inspection, search, tiles, timing
    from attnbench.kernels.portable.tiles import TILES, WIDTHS, Tile
    from attnbench.kernels.portable.timing import Row

pytestmark = test_kernels.pytestmark

ROW, OTHER_ROW = Row("forward", "fp16x3", 16), Row("dq", "fp16x3", 16)
EVERY_ROW = search.rows(inspection.KERNELS, search.PRECISIONS, WIDTHS)


def test_every_row_of_the_tables_has_some_candidates_and_not_too_many() -> None:
    assert len(EVERY_ROW) == len(set(EVERY_ROW)) == 90
    assert {(row.kernel, row.precision) for row in EVERY_ROW} == set(TILES[90]) == set(TILES[80])
    for row in EVERY_ROW:
        found = search.candidates(row)
        assert len(set(found)) == len(found)
        assert 4 <= len(found) <= 40, row


def test_what_matters_most_is_searched_first() -> None:
    assert EVERY_ROW[0] == ROW
    assert {row.head_dim for row in EVERY_ROW[-18:]} == {256}


@pytest.mark.parametrize("capability", TILES)
def test_the_table_is_printed_as_it_is_kept(capability: int) -> None:
    text = search.table_text(TILES[capability])
    assert text in Path(str(tiles.__file__)).read_text("utf-8")
    assert eval(f"{{{text}}}", {"Tile": Tile}) == TILES[capability]


@pytest.mark.parametrize(
    ("capability", "table"), [((7, 5), 80), ((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 90), ((12, 0), 80)]
)
def test_each_gpu_has_a_table(capability: tuple[int, int], table: int) -> None:
    assert tiles.table_for(capability) == table


def test_the_fastest_over_all_lengths_is_chosen_and_other_rows_stay() -> None:
    balanced, long_only, short_only = Tile(64, 64, 4, 2), Tile(128, 64, 8, 2), Tile(32, 32, 4, 2)
    ms = {
        balanced: {16384: 1.1, 4096: 0.1, 1024: 0.011},
        long_only: {16384: 1.0, 4096: 0.1, 1024: 0.020},
        short_only: {16384: 2.0, 4096: 0.1, 1024: 0.010},
        Tile(16, 16, 4, 1): {16384: 9.0},  # given up after a sample
    }
    new = search.chosen(TILES[90], {ROW: ms})
    assert new["forward", "fp16x3"][0] == balanced
    assert new["forward", "fp16x3"][1:] == TILES[90]["forward", "fp16x3"][1:]
    assert {key: of_key for key, of_key in new.items() if key != ("forward", "fp16x3")} == {
        key: of_key for key, of_key in TILES[90].items() if key != ("forward", "fp16x3")
    }


def test_timings_are_read_back_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    file = tmp_path / "timings.jsonl"
    tile = Tile(64, 64, 4, 2)
    for ms in (2.0, 1.0):
        search._append(file, ROW, 90, {tile: {16384: ms, 1024: 0.01}})
    assert search.timings(file, 90) == {ROW: {tile: {16384: 1.0, 1024: 0.01}}}
    assert search.timings(file, 80) == {}
    assert search.timings(None, 90) == search.timings(tmp_path / "none", 90) == {}


def test_tiles_are_timed_in_turns_and_wrong_and_slow_ones_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the interpreter, with made-up times."""
    for name, value in INTERPRET.items():
        monkeypatch.setenv(name, value)
    # A wrong one does nothing: what another tile left behind must not pass for its result.
    right, slow, wrong = Tile(32, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)
    called: list[Tile] = []

    def sample_ms(work: object, other_data: object) -> float:
        (tile,) = work.args  # pyright: ignore[reportAttributeAccessIssue]
        called.append(tile)
        return {right: 1.0, slow: 2.0}[tile]

    launches = timing.Call.__call__
    monkeypatch.setattr(timing, "LENGTHS", (48, 40))
    monkeypatch.setattr(timing, "SHORT_LENGTHS", (40, 39))
    monkeypatch.setattr(timing, "BATCH", 1)
    monkeypatch.setattr(timing, "sample_ms", sample_ms)
    monkeypatch.setattr(timing, "_other_data", lambda: torch.empty(0))
    monkeypatch.setattr(timing.Call, "__call__", lambda self, tile: None if tile == wrong else launches(self, tile))
    timing.calls.cache_clear()
    for kernel in inspection.KERNELS:
        short = kernel.startswith("short")
        monkeypatch.setattr(timing.launch, "SHORT", 512 if short else 0)
        row = Row(kernel, "tf32" if kernel == "short_forward" else "fp16x3", 16)
        found = timing.time_tiles(row, [right, slow, wrong], lambda: False)
        length, shorter = (40, 39) if short else (48, 40)
        assert found == {right: {length: 1.0, shorter: 1.0}, slow: {length: 2.0}}
    assert called.count(slow) == len(inspection.KERNELS)
    assert called.count(right) == len(inspection.KERNELS) * (1 + 2 * timing.ROUNDS)
    timing.calls.cache_clear()


def test_a_search_goes_on_from_what_is_known_and_refines_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tile] = []

    def time_tiles(row: Row, some: list[Tile], over: object) -> dict[Tile, dict[int, float]]:
        asked.extend(some if row == ROW else ())
        ones = dict.fromkeys(timing.LENGTHS, 1.0)
        return {tile: ones | {16384: float(tile.queries + tile.keys + tile.stages)} for tile in some}

    monkeypatch.setattr(search, "resources", lambda *_, **__: inspection.Resources(100, 0, 1000))
    monkeypatch.setattr(search, "time_tiles", time_tiles)
    first_choices = {choice[0] for choice in search.candidates(ROW)}
    known = {search.candidates(ROW)[0][0]: dict.fromkeys(timing.LENGTHS, 1.0)}
    with ThreadPoolExecutor(1) as pool:
        lots = list(search.search([ROW, OTHER_ROW], {ROW: known}, 90, pool, lambda: False))
        assert not list(search.search([ROW], {ROW: known}, 90, pool, lambda: True)), "time is up"
    assert [row for row, _ in lots] == 2 * [ROW, OTHER_ROW], "each lot of all rows before the next of any"
    first, second = (lot for row, lot in lots if row == ROW)
    assert len(asked) == len(set(asked))
    assert not set(known) & set(asked)
    assert first_choices <= {*known, *first} <= {*first_choices, TILES[90]["forward", "fp16x3"][0]}
    assert TILES[90]["forward", "fp16x3"][0] in first
    assert {(tile.stages, tile.max_registers) for tile in second} == {
        (1, None),
        (2, None),
        (4, None),
        (3, 128),
        (3, 168),
    }
    assert len({(tile.queries, tile.keys, tile.warps) for tile in second}) == search.REFINED


def test_the_command_prints_the_table_and_keeps_every_timing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a GPU that is made up."""

    def ms(tile: Tile) -> float:
        return 2.0 - ((tile.queries, tile.keys, tile.warps) == (64, 128, 4)) - 0.1 * (tile.stages == 3)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(search, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(search, "resources", lambda *_, **__: inspection.Resources(100, 0, 1000))
    monkeypatch.setattr(
        search, "time_tiles", lambda row, some, over: {tile: dict.fromkeys(timing.LENGTHS, ms(tile)) for tile in some}
    )
    narrow = ["--kernel", "forward", "--precision", "fp16x3", "--head-dim", "16", "--head-dim", "32"]
    out = tmp_path / "timings.jsonl"
    done = CliRunner().invoke(search.main, [*narrow, "--out", str(out)], catch_exceptions=False)
    assert search.table_text(search.chosen(TILES[90], search.timings(out, 90))) in done.output
    assert '("forward", "fp16x3"): (\n        Tile(64, 128, 4, 3), Tile(64, 128, 4, 3), ' in done.output
    lines = len(out.read_text().splitlines())
    assert lines > 2 * len(search.candidates(ROW))
    again = CliRunner().invoke(search.main, [*narrow, "--out", str(out), "--limit-seconds", "0"])
    assert "cut short" in again.output
    assert len(out.read_text().splitlines()) == lines
    assert search.table_text(search.chosen(TILES[90], search.timings(out, 90))) in again.output


def test_spills_and_too_much_shared_memory_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    spills, masked, shared, wrong, fits = (Tile(16 * rows, 16, 4, 1) for rows in range(1, 6))

    def resources(*row: object, causal: bool, capability: int) -> inspection.Resources:
        (tile,) = (one for one in row if isinstance(one, Tile))
        if tile == wrong:
            raise ValueError("no such layout\nat line 3")
        spilled = {spills: 8, masked: 16 * causal}.get(tile, 0)
        return inspection.Resources(255, spilled, (100 if tile == shared else 99) << 10)

    monkeypatch.setattr(search, "resources", resources)
    with ThreadPoolExecutor(1) as pool:
        told = list(search.usable(ROW, [(tile,) for tile in (spills, masked, shared, wrong, fits)], 80, pool))
    assert [why for _, _, why in told] == [
        "spills 8 bytes",
        "spills 16 bytes under a causal mask",
        "needs more than 101376 bytes of shared memory",
        "ValueError: no such layout",
        "",
    ]


def test_a_shape_takes_the_most_stages_that_it_fits_with(monkeypatch: pytest.MonkeyPatch) -> None:
    spilled = {3: 8, 2: 0, 1: 0}

    def resources(*row: object, **_: object) -> inspection.Resources:
        (tile,) = (one for one in row if isinstance(one, Tile))
        return inspection.Resources(255, spilled[tile.stages], 0)

    monkeypatch.setattr(search, "resources", resources)
    deep, never = search.candidates(ROW)[:2]
    with ThreadPoolExecutor(1) as pool:
        assert [tile for tile, _, why in search.usable(ROW, [deep], 90, pool) if not why] == [deep[1]]
        spilled |= {2: 8, 1: 16}
        assert [(tile, why) for tile, _, why in search.usable(ROW, [never], 90, pool)] == [
            (never[-1], "spills 16 bytes")
        ]


LISTING = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDGSTS.E [R2], desc[UR4][R4.64] ;
        /*0020*/                   @P0 BRA `(.L_x_2) ;
        /*0030*/                   FMUL R6, R6, R7 ;
.L_x_2:
        /*0040*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], RZ, !UPT ;
        /*0050*/              @!P1 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
"""


def test_a_loop_is_what_lies_between_a_label_and_the_branch_back_to_it() -> None:
    (body,) = inspection.loops(LISTING)
    assert [one.split()[-1 if "BRA" in one else 0] for one in body] == [
        "LDGSTS.E", "`(.L_x_2)", "FMUL", "HGMMA.64x64x16.F32", "`(.L_x_1)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("instructions", "serialized"),
    [
        (("WARPGROUP.ARRIVE", "HGMMA.64x64x16.F32", "WARPGROUP.ARRIVE", "HGMMA.64x64x16.F32"), True),
        (("WARPGROUP.ARRIVE", "HGMMA.64x64x16.F32", "HGMMA.64x64x16.F32"), False),
        (("HMMA.16816.F32",), False),
    ],
)
def test_products_are_serialized_where_each_begins_by_itself(instructions: tuple[str, ...], serialized: bool) -> None:
    listing = "\n".join(
        f"        /*{16 * at:04x}*/                   {one} R24 ;" for at, one in enumerate(instructions)
    )
    assert inspection.is_serialized(listing) is serialized


def test_a_score_costs_a_handful_of_instructions() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    asked = (
        "from attnbench.kernels.portable.inspection import instructions_a_score; "
        "from attnbench.kernels.portable.tiles import Tile; "
        "print(instructions_a_score('forward', 'native', 16, Tile(128, 64, 8, 3)))"
    )
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True, env=environment)
    unmasked, masked = json.loads(done.stdout)
    assert 5 < unmasked < masked < 12, "an exponential, a scale, a maximum, a sum, half a conversion, and the rest"


def test_without_a_gpu_a_search_says_so() -> None:
    done = CliRunner().invoke(search.main, ["--precision", "ieee"])
    assert done.exit_code == 2
    assert "--dry-run" in done.output


def test_a_dry_run_lists_what_the_compiler_makes_of_the_candidates() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = ["--dry-run", "--kernel", "forward", "--precision", "ieee", "--head-dim", "16"]
    done = subprocess.run(
        [sys.executable, "-m", "attnbench.kernels.portable.search", *options],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == len(search.candidates(Row("forward", "ieee", 16)))
    assert all(0 < one["registers"] <= 255 for one in told)
    assert any(not one["dropped"] for one in told)
