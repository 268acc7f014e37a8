"""What a call of attnbench's own attention launches and allocates, with no kernel run: shapes may be as large as on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import test_kernels
from attnbench import forecast
from attnbench.case import Case
from conftest import small
from test_kernels import INTERPRET, errors, operands

with mock.patch.dict(os.environ, INTERPRET):
    from attnbench.backends.own import PRECISION
    from attnbench.kernels.attention import _products
    from attnbench.kernels.portable import launch, splitting

pytestmark = test_kernels.pytestmark

KERNELS = dict.fromkeys(("magnitudes", "halves"), splitting) | dict.fromkeys(
    ("forward", "dq", "dkdv", "backward"), launch
)
"""By the module that launches them."""


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels launched so far, none of which does anything."""
    names: list[str] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **constants: names.append(self.name)

    for name, module in KERNELS.items():
        monkeypatch.setattr(module, f"attnbench_{name}", Kernel(name))
    return names


class Allocations(TorchDispatchMode):
    """Bytes of the storages that were made here and are alive, at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[StorageWeakRef, int] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if "empty" in func.name() and isinstance(result, Tensor):
            storage = result.untyped_storage()
            self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
            self.alive[StorageWeakRef(storage)] = storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, sum(self.alive.values()))
        return result


def step(case: Case) -> tuple[int, int]:
    """Peak bytes of a forward and of it with its backward, of inputs that nothing is ever written to."""
    dtype = getattr(torch, case.dtype)
    q, d_out = (torch.empty(case.batch, case.heads, case.seq_len, case.d_model, dtype=dtype) for _ in range(2))
    k, v = (torch.empty(case.batch, case.kv_heads, case.kv_len, case.d_model, dtype=dtype) for _ in range(2))
    precision = _products(PRECISION[case.precision], q, k)
    inputs_bytes = sum(x.nbytes for x in (q, k, v, d_out))
    with torch.no_grad(), Allocations() as made:
        kept = launch.forward(q, k, v, case.causal, 0.125, precision)
        forward_bytes = inputs_bytes + made.peak_bytes
        out, logsumexp, magnitudes = kept
        launch.backward(q, k, v, out, d_out, logsumexp, magnitudes, case.causal, 0.125, precision)
    return forward_bytes, inputs_bytes + made.peak_bytes


def test_a_step_in_halves_is_two_launches_and_four(launched: list[str]) -> None:
    for precision in ("ieee", "tf32"):
        launched.clear()
        step(small(seq_len=launch.SHORT + 1, precision=precision))
        assert launched == ["halves", "forward", "halves", "halves", "dq", "dkdv"]


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_what_is_too_much_to_be_looked_at_by_each_program_is_looked_at_beforehand(
    precision: str, launched: list[str]
) -> None:
    much, few = splitting.FEW // 16 + 1, launch.SHORT + 1
    step(small(seq_len=few, kv_len=much, d_model=16, precision=precision))
    assert launched == ["magnitudes", "halves", "forward", "halves", "halves", "dq", "dkdv"]
    launched.clear()
    step(small(seq_len=much, kv_len=few, d_model=16, precision=precision))
    assert launched == ["halves", "forward", "halves", "magnitudes", "halves", "dq", "dkdv"]
    launched.clear()
    grouped = {"heads": 4, "kv_heads": 1, "seq_len": few}
    step(small(**grouped, kv_len=few, d_model=16, precision=precision))
    assert launched == ["halves", "forward", "halves", "magnitudes", "halves", "dq", "dkdv"]


def test_one_of_wide_heads_sums_dv_and_dk_one_after_the_other(launched: list[str]) -> None:
    step(small(seq_len=launch.SHORT + 1, d_model=128))
    assert launched[-3:] == ["dq", "dkdv", "dkdv"]


def test_a_step_in_16_bits_is_one_launch_and_two(launched: list[str]) -> None:
    step(small(dtype="bfloat16", kv_len=launch.SHORT + 1))
    assert launched == ["forward", "dq", "dkdv"]


def test_a_short_step_is_two_launches(launched: list[str]) -> None:
    for other in ({"dtype": "bfloat16"}, {"precision": "ieee"}, {"precision": "tf32"}):
        launched.clear()
        step(small(**other, kv_len=launch.SHORT))
        assert launched == ["forward", "backward"]


def test_a_short_step_of_wide_heads_is_given_halves(launched: list[str]) -> None:
    step(small(d_model=128, precision="ieee"))
    assert launched == ["halves", "forward", "halves", "halves", "backward"]
    launched.clear()
    step(small(d_model=128, precision="tf32"))
    assert launched == ["forward", "backward"]


# --- launches are found again -----------------------------------------------------------------------------------------


class Compiled:
    """A kernel that has been compiled, and its launches. As Triton's own it takes no grid of fewer than three dimensions."""

    def __init__(self, of: Jitted) -> None:
        self.of = of

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        x, y, z = grid
        return lambda *args: self.of.again.append(((x, y, z), args))


class Jitted:
    """What stands in for a kernel of Triton's: each launch by itself compiles it anew."""

    def __init__(self, kernel: Any) -> None:
        self.arg_names = kernel.arg_names
        self.anew: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []
        self.again: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def launched(*args: Any, **constants: Any) -> Compiled:
            rest = tuple(constants[name] for name in self.arg_names[len(args) :])
            self.anew.append((grid, args + rest))
            return Compiled(self)

        return launched


@pytest.fixture
def jitted(monkeypatch: pytest.MonkeyPatch) -> list[Jitted]:
    monkeypatch.setattr(launch.Launches, "_known", {})
    kernels = [Jitted(getattr(module, f"attnbench_{name}")) for name, module in KERNELS.items()]
    for (name, module), kernel in zip(KERNELS.items(), kernels, strict=True):
        monkeypatch.setattr(module, f"attnbench_{name}", kernel)
    return kernels


def anew(jitted: list[Jitted]) -> int:
    return sum(len(kernel.anew) for kernel in jitted)


def plain(launches: list[tuple[tuple[int, ...], tuple[Any, ...]]]) -> list[tuple[Any, ...]]:
    return [(grid, *(arg for arg in args if not isinstance(arg, Tensor))) for grid, args in launches]


@pytest.mark.parametrize(
    ("dtype", "seq_len", "launches"),
    [("float32", 64, 2), ("float32", 1024, 6), ("bfloat16", 64, 2), ("bfloat16", 1024, 3)],
)
def test_a_call_like_an_earlier_one_launches_what_that_compiled(
    jitted: list[Jitted], dtype: str, seq_len: int, launches: int
) -> None:
    case = small(dtype=dtype, seq_len=seq_len)
    step(case)
    compiled = anew(jitted)
    assert compiled == launches
    assert not any(kernel.again for kernel in jitted)
    step(case)
    assert anew(jitted) == compiled
    for kernel in jitted:
        assert plain(kernel.again) == plain(kernel.anew)


@pytest.mark.parametrize(("dtype", "precision", "parts"), [("bfloat16", "ieee", 1), ("float32", "ieee", 2)])
def test_the_longest_tiles_of_all_heads_come_first_where_the_cache_holds_what_they_stream_over(
    dtype: str, precision: str, parts: int, jitted: list[Jitted], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = small(batch=2, heads=3, kv_heads=3, seq_len=1024, kv_len=1024, dtype=dtype, precision=precision, causal=True)
    streamed_bytes = 2 * parts * 2 * 3 * 1024 * case.d_model * 2

    def grids(case: Case) -> list[tuple[int, ...]]:
        launch.Launches._known.clear()
        for kernel in jitted:
            kernel.anew.clear()
        step(case)
        return [kernel.anew[0][0] for kernel in jitted[2:5]]

    monkeypatch.setattr(launch, "_cache_bytes", lambda device: streamed_bytes)
    together = grids(case)
    monkeypatch.setattr(launch, "_cache_bytes", lambda device: streamed_bytes - 1)
    apart = grids(case)
    assert [(heads, batch) for heads, batch, _ in together] == 3 * [(3, 2)]
    assert [(tiles, heads, batch) for heads, batch, tiles in together] == apart
    monkeypatch.setattr(launch, "_cache_bytes", lambda device: streamed_bytes)
    assert grids(replace(case, causal=False)) == apart, "without a mask all tiles are alike"


def test_more_tiles_than_a_grid_has_room_for_last_come_first() -> None:
    k = torch.zeros(2, 3, 16, 16)
    for tiles, grid in ((65535, (3, 2, 65535)), (65536, (65536, 3, 2))):
        assert launch._in_order(tiles, 3, 2, k, "native", causal=True)[0] == grid


UNLIKE: dict[str, Callable[[Tensor], Tensor]] = {
    "longer": lambda x: x.new_zeros(*x.shape[:2], x.shape[2] + 1, x.shape[3]),
    "other strides": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "not aligned": lambda x: x.new_zeros(x.numel() + 1)[1:].view(x.shape),
    "other dtype": lambda x: x.half(),
}


@pytest.mark.parametrize("unlike", UNLIKE)
def test_a_call_on_other_tensors_compiles_its_own(jitted: list[Jitted], unlike: str) -> None:
    q, k, v = (torch.zeros(2, 2, launch.SHORT + 1, 16) for _ in range(3))
    for seen in (1, 2):
        launch.forward(q, k, v, False, 0.25, "fp16x3")
        assert anew(jitted) == 2 * seen
        q, k, v = (UNLIKE[unlike](x) for x in (q, k, v))


def test_calls_that_differ_in_a_constant_compile_their_own(jitted: list[Jitted]) -> None:
    q, k, v = (torch.zeros(2, 2, launch.SHORT + 1, 16) for _ in range(3))
    for seen, (causal, scale, precision) in enumerate(
        [(False, 0.25, "fp16x3"), (True, 0.25, "fp16x3"), (False, -0.25, "fp16x3"), (False, 0.25, "fp16x1")], 1
    ):
        launch.forward(q, k, v, causal, scale, precision)
        assert anew(jitted) == 2 * seen
    launch.forward(q, k, v, False, 0.5, "fp16x3")
    assert anew(jitted) == 8, "the size of the scale is no constant"


def test_each_share_of_the_heads_compiles_its_own(jitted: list[Jitted], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MUCH_BYTES", 1)
    q, k, v = (torch.zeros(2, 2, launch.SHORT + 1, 16) for _ in range(3))
    launch.forward(q, k, v, False, 0.25, "fp16x3")
    assert anew(jitted) == 4


def test_no_more_is_kept_than_is_of_use(jitted: list[Jitted], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.Launches, "MOST", 3)
    for length in range(1, 9):
        q, k, v = (torch.zeros(1, 1, length, 16, dtype=torch.bfloat16) for _ in range(3))
        launch.forward(q, k, v, False, 0.25, "native")
        assert len(launch.Launches._known) <= 3
    assert anew(jitted) == 8


# --- memory -----------------------------------------------------------------------------------------------------------

LARGE: dict[str, Any] = {"batch": 8, "heads": 1, "kv_heads": 1, "seq_len": 16384, "kv_len": 16384}


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("d_model", [16, 32, 64, 128])
@pytest.mark.parametrize(
    ("dtype", "precision", "peer"),
    [("bfloat16", "ieee", "sdpa-flash"), ("float32", "ieee", "sdpa-efficient"), ("float32", "tf32", "sdpa-efficient")],
)
def test_a_large_step_holds_no_more_than_the_peer_and_a_twentieth(
    dtype: str, precision: str, peer: str, d_model: int
) -> None:
    case = Case(**LARGE, d_model=d_model, dtype=dtype, precision=precision)
    theirs = forecast.memory_bytes(case, peer)
    assert theirs
    assert max(step(case)) <= 1.05 * max(theirs[0], theirs[1] or 0)


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize(
    "sizes",
    [
        LARGE,
        LARGE | {"batch": 3},
        LARGE | {"batch": 1, "heads": 8, "kv_heads": 4},
        LARGE | {"batch": 1},
        {"kv_len": 512, "seq_len": 256},
        {"kv_len": 512, "seq_len": 256, "d_model": 128},
    ],
    ids=["large", "three", "grouped", "one head", "small", "small and wide"],
)
def test_the_forecast_of_memory_is_what_is_allocated(sizes: dict[str, Any], precision: str) -> None:
    case = small(**{"d_model": 64, "precision": precision} | sizes)
    assert step(case) == pytest.approx(forecast.memory_bytes(case, "attnbench"), rel=0.005)


@pytest.mark.parametrize(
    "sizes", [{"batch": 3}, {"heads": 6, "kv_heads": 3}, {"batch": 2, "heads": 2}], ids=["batch", "heads", "both"]
)
def test_heads_worked_on_in_turns_come_out_right(sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in INTERPRET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "MUCH_BYTES", 1)
    monkeypatch.setattr(launch, "SHORT", 0)
    assert max(errors(operands(**sizes), causal=True, precision="fp16x3")) < 2e-6
