"""Times of shapes that were not measured, from those that were: straight lines through logarithms of length and time.

A shape is (seq_len, d_model). An estimate is a product of measured times, each to a power, its weight; the weights of
one shape sum to one. How far such estimates may be off is found by making them for shapes that were measured.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from attnbench.noise import DEVIATION

Shape = tuple[int, int]

Kind = Literal["measured", "beside", "between lengths", "beyond lengths", "between d_models", "larger d_model", "far"]
"""How a shape is estimated: `beside` it others of its length and others of its d_model were measured; of its d_model
only, and its length lies between two or beyond all; of its length only, and its d_model lies between two or below all;
`far`, neither."""

FARTHEST = 2
"""By what factor a seq_len may lie outside those that were measured."""


@dataclass(frozen=True)
class Estimate:
    """The weights of measured shapes, and in which way they were found."""

    kind: Kind
    weights: Mapping[Shape, float]

    def of(self, values: Mapping[Shape, float]) -> float:
        return math.prod(values[shape] ** weight for shape, weight in self.weights.items())


@dataclass(frozen=True)
class Error:
    """How far estimates of one kind missed the times of `shapes` measured ones, each left out and predicted from others."""

    median: float
    maximum: float
    shapes: int

    @property
    def deviation(self) -> float:
        """The standard deviation that so large a median error tells; half of the errors are larger than the median."""
        return DEVIATION * self.median


def estimate(measured: Collection[Shape], shape: Shape) -> Estimate | str:
    """How to estimate a shape from `measured` ones, or why that cannot be done.

    Where both its length and its d_model were measured with others, lines along both are drawn, and what they both count,
    the plane through the corners, is taken off once: Gordon's and Coons' blend, which is exact wherever d_model changes
    times by the same factor at every length. Elsewhere a line along one of them is all there is.
    """
    if shape in measured:
        return Estimate("measured", {shape: 1.0})
    seq_len, d_model = shape
    lengths = sorted(n for n, d in measured if d == d_model)
    widths = sorted(d for n, d in measured if n == seq_len)
    if lengths and widths and (blended := _blend(measured, shape, lengths, widths)):
        return Estimate("beside", blended)
    if lengths:
        along = _along_lengths(seq_len, lengths)
        if isinstance(along, str):
            return along
        kind: Kind = "between lengths" if lengths[0] < seq_len < lengths[-1] else "beyond lengths"
        return Estimate(kind, {(n, d_model): weight for n, weight in along.items()})
    across = _across_widths(d_model, widths or sorted({d for _, d in measured}))
    if isinstance(across, str):
        return across
    if widths:
        kind = "between d_models" if len(across) > 1 else "larger d_model"
        return Estimate(kind, {(seq_len, d): weight for d, weight in across.items()})
    weights: dict[Shape, float] = {}
    for d, of_width in across.items():
        along = _along_lengths(seq_len, sorted(n for n, width in measured if width == d))
        if isinstance(along, str):
            return along
        weights |= {(n, d): of_width * weight for n, weight in along.items()}
    return Estimate("far", weights)


def error_like(kind: Kind, times: Mapping[Shape, float]) -> Error | None:
    """The error of estimates of a kind, by those of `times` that can be made in the same way without the shape's own.

    For one that is estimated along lengths all others of its length are left out with it, and so on: what would not be
    there must not help.
    """
    errors = []
    for shape in times:
        rest = {one: ms for one, ms in times.items() if not _left_out(kind, one, shape)}
        if not rest:
            continue
        made = estimate(rest, shape)
        if isinstance(made, Estimate) and made.kind == kind:
            errors.append(abs(made.of(rest) / times[shape] - 1))
    return Error(statistics.median(errors), max(errors), len(errors)) if errors else None


def _left_out(kind: Kind, one: Shape, shape: Shape) -> bool:
    same_length, same_width = one[0] == shape[0], one[1] == shape[1]
    if kind in ("between lengths", "beyond lengths"):
        return same_length
    if kind in ("between d_models", "larger d_model"):
        return same_width
    return same_length or same_width if kind == "far" else one == shape


def _blend(
    measured: Collection[Shape], shape: Shape, lengths: list[int], widths: list[int]
) -> dict[Shape, float] | None:  # fmt: skip
    """The weights of the shapes beside and of the corners; None where a corner was not measured."""
    for near in (_about, _nearest):
        along, across = (near(at, values) for at, values in zip(shape, (lengths, widths), strict=True))
        weights = {(n, shape[1]): weight for n, weight in along.items()}
        weights |= {(shape[0], d): weight for d, weight in across.items()}
        weights |= {(n, d): -of_n * of_d for n, of_n in along.items() for d, of_d in across.items()}
        if all(one in measured for one in weights):
            return weights
    return None


def _about(at: int, measured: list[int]) -> dict[int, float]:
    """The weights of the two values about `at`; outside all, of the two next to it, by the inverse squares of their distances.

    That is Shepard's weighting: what is odd about the nearest one does not count in full.
    """
    if measured[0] < at < measured[-1]:
        return _nearest(at, measured)
    closeness = {value: math.log(at / value) ** -2 for value in (measured[:2] if at < measured[0] else measured[-2:])}
    return {value: close / sum(closeness.values()) for value, close in closeness.items()}


def _nearest(at: int, measured: list[int]) -> dict[int, float]:
    """The weights of the two values about `at`, or of the one next to it where it lies outside."""
    above = bisect(measured, at)
    if not 0 < above < len(measured):
        return {measured[min(above, len(measured) - 1)]: 1.0}
    return _line(at, measured[above - 1], measured[above])


def _line(at: int, one: int, other: int) -> dict[int, float]:
    """How much the logarithm of each end's time counts at `at`."""
    share = math.log(at / one) / math.log(other / one)
    return {one: 1 - share, other: share}


def _along_lengths(seq_len: int, measured: list[int]) -> dict[int, float] | str:
    """The measured length itself, or the two to draw a line through, or why there are none; `measured` ascends.

    Outside, the two must lie at least as far apart as the line is drawn on, or it would go where noise points.
    """
    shortest, longest = measured[0], measured[-1]
    if seq_len in measured:
        return {seq_len: 1.0}
    if shortest < seq_len < longest:
        return _nearest(seq_len, measured)
    if seq_len > FARTHEST * longest:
        return f"seq_len {seq_len} is more than {FARTHEST} times the longest measured, {longest}"
    if FARTHEST * seq_len < shortest:
        return f"seq_len {seq_len} is less than 1/{FARTHEST} of the shortest measured, {shortest}"
    if seq_len > longest:
        ends = [(length, longest) for length in reversed(measured) if length * seq_len <= longest**2]
    else:
        ends = [(shortest, length) for length in measured if length * seq_len >= shortest**2]
    if not ends:
        return f"no two lengths are measured that lie far enough apart to extrapolate to {seq_len}"
    return _line(seq_len, *ends[0])


def _across_widths(d_model: int, measured: Iterable[int]) -> dict[int, float] | str:
    """The weights of the two about `d_model`; below all, the smallest stands in, since kernels pad up to it."""
    widths = list(measured)
    if d_model > widths[-1]:
        return f"d_model {d_model} is above the largest measured, {widths[-1]}"
    return {d_model: 1.0} if d_model in widths else _nearest(d_model, widths)
