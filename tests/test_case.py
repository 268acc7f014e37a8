from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench import cost
from attnbench.case import DTYPES, PRECISIONS, Case
from attnbench.errors import RequestError
from conftest import small

sizes = st.integers(1, 40)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return Case(
        batch=draw(sizes),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        seq_len=draw(sizes),
        kv_len=draw(sizes),
        d_model=draw(sizes),
        dtype=draw(st.sampled_from(list(DTYPES))),
        precision=draw(st.sampled_from(PRECISIONS)),
        causal=draw(st.booleans()),
    )


@given(cases(), cases())
def test_ids_are_equal_exactly_where_cases_are(one: Case, other: Case) -> None:
    assert (one.id == other.id) == (one == other)
    assert Case(**one.to_dict()).id == one.id


def test_id_is_stable() -> None:
    """Records of older runs are matched by it."""
    case = Case(8, 4, 2, 256, 512, 64, "bfloat16", "ieee", True)
    assert case.id == "b8.h4.g2.n256.m512.d64.bfloat16.ieee.causal"


@pytest.mark.parametrize("name", ["batch", "heads", "kv_heads", "seq_len", "kv_len", "d_model"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_below_one_are_refused(name: str, value: int) -> None:
    with pytest.raises(RequestError, match=f"{name} = {value}"):
        small(**{name: value})


def test_kv_heads_must_divide_heads() -> None:
    with pytest.raises(RequestError, match="kv_heads = 3 does not divide heads = 4"):
        small(heads=4, kv_heads=3)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(RequestError, match="did you mean 'float64'"):
        small(dtype="float61")
    with pytest.raises(RequestError, match="there are: ieee, tf32"):
        small(precision="exact")


@given(cases())
def test_flops_count_the_pairs_that_the_mask_leaves(case: Case) -> None:
    def seen(query: int) -> int:
        return sum(key <= query + case.kv_len - case.seq_len for key in range(case.kv_len))

    one_head = sum(seen(query) for query in range(case.seq_len)) if case.causal else case.seq_len * case.kv_len
    assert cost.pairs(case) == case.batch * case.heads * one_head
    assert cost.flops_forward(case) == 4 * cost.pairs(case) * case.d_model
    assert cost.flops_backward(case) * 2 == cost.flops_forward(case) * 5


@given(cases())
def test_masked_rows_are_those_that_see_no_key(case: Case) -> None:
    blind = [query for query in range(case.seq_len) if query + case.kv_len - case.seq_len < 0]
    assert case.masked_rows == (len(blind) if case.causal else 0)
