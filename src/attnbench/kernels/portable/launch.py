"""From tensors to kernels: results, halves, strides, tiles and grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from attnbench.kernels.portable import backward as backwards
from attnbench.kernels.portable import forward as forwards
from attnbench.kernels.portable.arithmetic import HALVES, SHORT_FORWARD
from attnbench.kernels.portable.launches import Grid, Launches, Rest, programs
from attnbench.kernels.portable.splitting import block_for, in_parts
from attnbench.kernels.portable.tiles import Tile, is_wide, passes, tile

attnbench_forward: Any = forwards.attnbench_forward
attnbench_dq: Any = backwards.attnbench_dq
attnbench_dkdv: Any = backwards.attnbench_dkdv
attnbench_backward: Any = backwards.attnbench_backward

LOG2_E = math.log2(math.e)

SHORT = 512
"""Up to so many queries and keys a launch costs more than what it does: there are as few as can be."""

MUCH_BYTES, SHARES = 32 << 20, 4
"""Halves that take more are made for a share of the heads at a time, of four at most, which still fills a GPU: there are many
rows then."""

LAST_OF_GRID = 65535
"""How many programs the third dimension of a grid holds at the most."""

Index = tuple[slice, slice]
"""Some of the batch, and of the heads; None stands for all, of which no view need be made."""

NOTHING = nullcontext()


def forward_results(q: Tensor, k: Tensor, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for the output (as q), the logsumexp (B, H, N) and, if they are wanted, magnitudes of k and v (B, G, 2)."""
    batch, heads, seq_len, _ = q.shape
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty((batch, heads, seq_len), dtype=torch.float32),
        q.new_empty((batch, k.shape[1], 2 if _parts(q, k, precision) else 0), dtype=torch.int32),
    )


def backward_results(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for dq, dk and dv."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, H, N, D), its logsumexp to base 2 (B, H, N), and the largest magnitudes of k and v, as bits."""
    results = forward_results(q, k, precision)
    with _on_device_of(q):
        for share, (of_q, of_k) in enumerate(_shares(q, k, 2 * k.numel(), precision)):
            inputs = _of(q, of_q), _of(k, of_k), _of(v, of_k)
            out, logsumexp, magnitudes = (_of(x, some) for x, some in zip(results, (of_q, of_q, of_k), strict=True))
            launch = Launches.of(share, inputs, causal, scale, precision)
            _forward(launch, *inputs, out, logsumexp, magnitudes, causal, scale, precision)
    return results


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor, logsumexp: Tensor, magnitudes: Tensor,
    causal: bool, scale: float, precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv, each of its tensor's shape, contiguous."""
    results = backward_results(q, k, v)
    with _on_device_of(q):
        for share, (of_q, of_k) in enumerate(_shares(q, k, 2 * (q.numel() + k.numel()), precision)):
            inputs = (
                _of(q, of_q), _of(k, of_k), _of(v, of_k), _of(out, of_q), _of(d_out, of_q), _of(logsumexp, of_q),
                _of(magnitudes, of_k),
            )  # fmt: skip
            dq, dk, dv = (_of(x, some) for x, some in zip(results, (of_q, of_k, of_k), strict=True))
            launch = Launches.of(share, inputs, causal, scale, precision)
            _backward(launch, *inputs, dq, dk, dv, causal, scale, precision)
    return results


def is_short(q: Tensor, k: Tensor, precision: str) -> bool:
    """Whether what multiplies is one launch of a pass, which in `ieee` it never is."""
    return max(q.shape[2], k.shape[2]) <= SHORT and precision != "ieee"


def _is_alone(q: Tensor, k: Tensor, precision: str) -> bool:
    """Whether that is the pass's only launch, which splits what it multiplies; of wide heads it is given halves."""
    return is_short(q, k, precision) and not is_wide(precision, q.shape[3])


def _parts(q: Tensor, k: Tensor, precision: str) -> int:
    """How many of each operand are made beforehand."""
    return 0 if _is_alone(q, k, precision) else HALVES.get(precision, 0)


def _of(x: Tensor, some: Index | None) -> Tensor:
    return x if some is None else x[some]


def _on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return NOTHING
    return torch.cuda.device(x.device)


def _shares(q: Tensor, k: Tensor, halved_elements: int, precision: str) -> Sequence[tuple[Index | None, Index | None]]:
    """The heads that are worked on at a time, of queries and of keys: all, unless their halves take much memory."""
    halves_bytes = 2 * _parts(q, k, precision) * halved_elements
    batch, kv_heads = k.shape[:2]
    count = min(SHARES, max(1, -(-halves_bytes // MUCH_BYTES)), batch if batch > 1 else kv_heads)
    if count == 1:
        return ((None, None),)
    everything = slice(None)
    if batch > 1:
        return [((some, everything), (some, everything)) for some in _divided(batch, count)]
    shared = q.shape[1] // kv_heads
    return [
        ((everything, slice(some.start * shared, some.stop * shared)), (everything, some))
        for some in _divided(kv_heads, count)
    ]


def _divided(length: int, count: int) -> list[slice]:
    return [slice(i * length // count, (i + 1) * length // count) for i in range(count)]


def _forward(
    launch: Launches, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, magnitudes: Tensor,
    causal: bool, scale: float, precision: str,
) -> None:  # fmt: skip
    alone, kernel, to_low = _is_alone(q, k, precision), "short_forward" if is_short(q, k, precision) else "forward", 0
    if alone:
        precision = SHORT_FORWARD.get(precision, precision)
    else:
        k, v, to_low = in_parts(launch, "k v", k, v, None, magnitudes, precision)

    def rest() -> Rest:
        batch, heads, seq_len, head_dim = q.shape
        chosen = tile(kernel, head_dim, precision, q.device)
        grid, order = _in_order(programs(seq_len, chosen.queries), heads, batch, k, precision, causal)
        constants = _constants(head_dim, precision, causal, chosen) | _grouped(q, k) | order
        return (
            grid,
            (to_low, *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3], heads, k.shape[1], seq_len, k.shape[2]),
            constants | {"NEGATED": scale < 0, "ALONE": alone},
        )

    launch(kernel, attnbench_forward, (q, k, v, out, logsumexp, magnitudes, abs(scale) * LOG2_E), rest)


def _backward(
    launch: Launches, q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor, logsumexp: Tensor,
    kv_magnitudes: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, causal: bool, scale: float, precision: str,
) -> None:  # fmt: skip
    alone, q_to_low, k_to_low, q_do_magnitudes = _is_alone(q, k, precision), 0, 0, kv_magnitudes
    if not alone:
        known, q_do_magnitudes = kv_magnitudes[:, :, None], torch.empty_like(kv_magnitudes)
        k, v, k_to_low = in_parts(launch, "k v again", k, v, known, torch.empty_like(kv_magnitudes), precision)
        q, d_out, q_to_low = in_parts(launch, "q do", q, d_out, None, q_do_magnitudes, precision)
    work = _backward_at_once if is_short(q, k, precision) else _backward_in_turn
    work(
        launch, (q, k, v, d_out, out, logsumexp), (dq, dk, dv),
        (kv_magnitudes, q_do_magnitudes, scale * LOG2_E, scale), (q_to_low, k_to_low), causal, precision, alone,
    )  # fmt: skip


def _backward_at_once(
    launch: Launches, inputs: tuple[Tensor, ...], results: tuple[Tensor, Tensor, Tensor], scales: tuple[Any, ...],
    to_low: tuple[int, int], causal: bool, precision: str, alone: bool,
) -> None:  # fmt: skip
    q, k, v, d_out, out, _ = inputs

    def rest() -> Rest:
        batch, heads, seq_len, head_dim = q.shape
        kv_heads, kv_len = k.shape[1], k.shape[2]
        chosen = tile("short_backward", head_dim, precision, q.device)
        apart = is_wide(precision, head_dim)
        tiles = (1 + apart) * programs(kv_len, chosen.queries) + programs(seq_len, chosen.queries)
        strides = *q.stride(), *k.stride(), *v.stride(), *d_out.stride(), *out.stride()[:3], *results[1].stride()[:3]
        constants = _constants(head_dim, precision, causal, chosen) | _log2_d(head_dim) | _packed(q, d_out)
        return (
            (tiles, heads, batch),
            (*to_low, *strides, heads, kv_heads, seq_len, kv_len),
            constants | _grouped(q, k) | {"ALONE": alone, "APART": apart},
        )

    launch("backward", attnbench_backward, (*inputs, *results, *scales), rest)


def _backward_in_turn(
    launch: Launches, inputs: tuple[Tensor, ...], results: tuple[Tensor, Tensor, Tensor], scales: tuple[Any, ...],
    to_low: tuple[int, int], causal: bool, precision: str, alone: bool,
) -> None:  # fmt: skip
    (q, k, v, d_out, out, logsumexp), (dq, dk, dv) = inputs, results
    batch, heads, seq_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    dq_tile, dkdv_tile = (tile(kernel, head_dim, precision, q.device) for kernel in ("dq", "dkdv"))
    larger = max(dq_tile.queries, dkdv_tile.queries)  # both are powers of two
    rows = programs(seq_len, larger) * larger
    of_rows = logsumexp.new_empty((batch, heads, rows, 2))
    more = _log2_d(head_dim) | _grouped(q, k) | {"ALONE": alone, "TOGETHER": False, "AHEAD": 0}

    def numbers(*stored: Tensor) -> tuple[int, ...]:
        strides = *q.stride(), *k.stride(), *v.stride(), *d_out.stride()
        others = (stride for x in stored for stride in x.stride()[:3])
        return *to_low, *strides, *others, heads, kv_heads, seq_len, kv_len, rows

    def rest_of_dq() -> Rest:
        grid, order = _in_order(programs(rows, dq_tile.queries), heads, batch, k, precision, causal)
        return grid, numbers(out), _constants(head_dim, precision, causal, dq_tile) | more | order

    def rest_of_dkdv(which: dict[str, bool]) -> Rest:
        grid, order = _in_order(programs(kv_len, dkdv_tile.keys), kv_heads, batch, q, precision, causal)
        constants = _constants(head_dim, precision, causal, dkdv_tile) | more | order | which | _packed(q, d_out)
        return grid, numbers(out, dk), constants

    launch("dq", attnbench_dq, (*inputs, of_rows, dq, *scales), rest_of_dq)
    for which in passes(precision, head_dim):
        launch(
            ("dkdv", *which.values()), attnbench_dkdv, (*inputs, of_rows, dk, dv, *scales), partial(rest_of_dkdv, which)
        )


def _in_order(
    tiles: int, heads: int, batch: int, streamed: Tensor, precision: str, causal: bool
) -> tuple[Grid, dict[str, bool]]:
    """The grid of a kernel, and how programs find their place in it.

    Under a causal mask tiles differ in length, and those of one head would start side by side: the longest of all heads come
    first instead, if both operands that programs go through, here the one that is `streamed`, fit in the cache together.
    """
    streamed_bytes = 2 * HALVES.get(precision, 1) * streamed.numel() * streamed.element_size()
    if causal and streamed_bytes <= _cache_bytes(streamed.device) and tiles <= LAST_OF_GRID:
        return (heads, batch, tiles), {"SORTED": True}
    return (tiles, heads, batch), {"SORTED": False}


@cache
def _cache_bytes(device: torch.device) -> int:
    """Of the cache that all multiprocessors share."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 20


def _log2_d(head_dim: int) -> dict[str, int]:
    return {"LOG2_D": (head_dim - 1).bit_length()}


def _packed(*streamed: Tensor) -> dict[str, bool]:
    """Whether rows of what a kernel goes through touch each other."""
    return {"PACKED": all(x.stride(2) == x.shape[3] for x in streamed)}


def _grouped(q: Tensor, k: Tensor) -> dict[str, bool]:
    """Whether several query heads share a key head."""
    return {"GROUPED": q.shape[1] != k.shape[1]}


def _constants(head_dim: int, precision: str, causal: bool, chosen: Tile) -> dict[str, Any]:
    return {
        "PRECISION": precision,
        "PARTS": HALVES.get(precision, 0),
        "CAUSAL": causal,
        "D": head_dim,
        "BLOCK_M": chosen.queries,
        "BLOCK_N": chosen.keys,
        "BLOCK_D": block_for(head_dim),
    } | chosen.options()
