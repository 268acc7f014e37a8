from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench.errors import RequestError
from attnbench.grid import Grid, preset, presets, read_spec
from attnbench.request import Request

some = st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True)


@given(
    batch=some,
    seq_len=some,
    d_model=some,
    dtype=st.lists(st.sampled_from(["float32", "bfloat16"]), min_size=1, unique=True),
    precision=st.lists(st.sampled_from(["ieee", "tf32"]), min_size=1, unique=True),
    causal=st.lists(st.booleans(), min_size=1, unique=True),
)
def test_a_grid_is_its_product_without_repeats(
    batch: list[int], seq_len: list[int], d_model: list[int], dtype: list[str], precision: list[str], causal: list[bool]
) -> None:
    grid = Grid.from_dict(
        {
            "batch": batch,
            "seq_len": seq_len,
            "d_model": d_model,
            "dtype": dtype,
            "precision": precision,
            "causal": causal,
        }
    )
    found = grid.cases()
    kinds = len(precision) * ("float32" in dtype) + ("bfloat16" in dtype)  # precision is a matter of float32 alone
    assert len(found) == len(set(found)) == len(batch) * len(seq_len) * len(d_model) * len(causal) * kinds
    assert {case.precision for case in found if case.dtype == "bfloat16"} <= {"ieee"}
    assert Grid.from_dict(grid.to_dict()) == grid


@given(st.integers(1, 9), st.integers(1, 12))
def test_shards_cut_a_grid_into_parts_that_make_it_whole(count: int, cases: int) -> None:
    grid = Grid.from_dict({"seq_len": list(range(1, cases + 1))})

    def shard(index: int) -> list[str]:
        return [case.id for case in Request(grid, "g", ("eager",), {}, "cpu", shard=(index, count)).cases()]

    parts = [case for index in range(1, count + 1) for case in shard(index)]
    assert sorted(parts) == sorted(case.id for case in grid.cases())


def test_the_seed_is_the_table_it_began_with() -> None:
    cases = preset("seed").grid.cases()
    assert [(case.d_model, case.seq_len) for case in cases] == [
        (width, length) for width in (16, 32, 64, 128) for length in (256, 1024, 4096, 8192, 16384)
    ]
    assert {(case.batch, case.heads, case.dtype, case.precision, case.causal) for case in cases} == {
        (8, 1, "float32", "ieee", False)
    }


def test_every_preset_expands() -> None:
    assert {name: len(spec.grid.cases()) for name, spec in presets().items()} == {
        "cs336-flash": 80,
        "leaderboard": 1,
        "quick": 4,
        "seed": 20,
    }


def test_all_errors_of_a_file_are_told_at_once_each_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('about = 3\n[grid]\nseq_len = [256, -4]\ndtype = "flaot32"\nd_modle = 16\ncausal = "yes"\n')
    with pytest.raises(RequestError) as error:
        read_spec(path)
    text = str(error.value)
    assert "\n" not in text
    for part in (
        "mine.toml",
        "about: 3 is not text",
        "grid.seq_len[1]: -4 is not a whole number above zero",
        "grid.dtype[0]: dtype 'flaot32' is not known; did you mean 'float32'?",
        "grid: key 'd_modle' is not known; did you mean 'd_model'?",
        "grid.causal[0]: 'yes' is neither true nor false",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "does not exist"),
        (b"grid = [", "is not TOML"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"about = 'no grid'", "grid is missing"),
        (b"grid = 5", "5 is not a table"),
        (b"backends = ['nope', 'eager', 'sdpa-falsh']\n[grid]\nbatch = 8", "backends[0]: backend 'nope' is not known"),
        (b"backends = ['nope', 'eager', 'sdpa-falsh']\n[grid]\nbatch = 8", "backends[2]: backend 'sdpa-falsh'"),
        (b"[grid]\nbatch = true", "True is not a whole number"),
        (b"[grid]\nbatch = 1.5", "1.5 is not a whole number"),
        (b"[grid]\nseq_len = []", "seq_len is empty"),
        (b"[grid]\nheads = 4\nkv_heads = 3", "kv_heads = 3 does not divide heads = 4"),
    ],
)
def test_a_file_that_is_no_spec_is_refused_in_one_line(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RequestError) as error:
        read_spec(path)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_a_lone_value_is_a_list_of_one_and_a_file_names_its_runs(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('backends = "eager"\n[grid]\nseq_len = 128\nheads = 8\nkv_heads = [1, 2]\n')
    spec = read_spec(path)
    assert (spec.name, spec.backends, len(spec.grid.cases())) == ("mine", ("eager",), 2)
