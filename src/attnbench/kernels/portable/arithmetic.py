"""Products of tiles in each precision, as Triton inlines them into the kernels.

float16 and bfloat16 have one way to be multiplied, `native`. For float32 there are these, by name:

- `ieee`: every product and sum in float32, on the FMA units.
- `fp16x3`: three products on tensor cores, of two float16 halves, which together hold 22 bits of an operand; `fp16x1`:
  one product of the first halves, 11 bits like TensorFloat-32 at twice its rate.
- `tf32`: one product of operands rounded to TensorFloat-32, as `fp16x1` rounds them. In place of that in the forward of short
  sequences, where to find the largest magnitudes takes longer than products at half the rate.

Each operand that becomes float16 is scaled by a power of two, so that its largest magnitude lies in [2¹³, 2¹⁴): the largest of
its head, or of the tile where it is split in the kernel that multiplies it. Second halves are kept 2¹¹ times as large. Then
anything down to 2⁻²⁷ of that largest keeps all its bits, and below that the error stays under 2⁻⁴⁹ of the largest (one half:
under 2⁻³⁸).
"""

from __future__ import annotations

import triton
import triton.language as tl

HALVES = {"fp16x3": 2, "fp16x1": 1}
"""Precisions that multiply float16 halves, and how many of each operand."""

SHORT_FORWARD = {"fp16x1": "tf32"}
"""What multiplies in the forward of short sequences in place of a precision."""

FLOAT32_PRECISIONS = ("ieee", *HALVES)
SERVED_BY = {"tf32": "fp16x1", "tf32x3": "fp16x3", "bf16x3": "fp16x3"}
"""Schemes known by these names elsewhere, and the one here that is of their class of accuracy."""
NATIVE = "native"
"""The precision of 16-bit types."""

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

TOP = tl.constexpr(13)
"""Binary exponent of the largest magnitude of a scaled operand, and in the backward of the weights' 1."""

LEVEL_OF_HALVES = tl.constexpr(4)
"""Binary exponent of the weights' 1 in the forward, where others may be larger: up to 2¹² times until float16 ends. Below it
they keep all their bits down to 2⁻¹⁸, and have an error of at most 2⁻²⁹ from there, with two halves of 2⁻⁴⁰."""

LIFT = tl.constexpr(2.0**11)
"""By which second halves are larger than they count: as large as the first, so that they keep their bits as far down."""


@triton.jit
def _power_of_two(exponent):
    """2ᵉ as float32 for -127 < e < 128."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scaled(x, exponent):
    """x·2ᵉ, in two steps: 2ᵉ itself need not be a float32. Beyond ±252 there is nothing but zero and infinity."""
    exponent = tl.minimum(tl.maximum(exponent, -252), 252)
    half = exponent >> 1
    return x * _power_of_two(half) * _power_of_two(exponent - half)


@triton.jit
def largest_magnitude(tile):
    """Of a tile, as the bits of a float32: those of positive ones are in the order of the floats."""
    return tl.max(tl.max(tl.abs(tile), 1), 0).to(tl.int32, bitcast=True)


@triton.jit
def exponent_for(magnitude):
    """The exponent by which an operand of this largest magnitude, as bits, is scaled."""
    return TOP + 127 - (magnitude >> 23 & 0xFF)


@triton.jit
def exponent_at(magnitudes, index, PARTS: tl.constexpr):
    """The exponent by which an operand is scaled whose largest magnitude has been stored; 0 where nothing is scaled."""
    exponent = 0
    if PARTS > 0:
        exponent = exponent_for(tl.load(magnitudes + index))
    return exponent


@triton.jit
def exponent_of(tile, PARTS: tl.constexpr):
    """The exponent by which a tile is scaled that is nothing but itself; 0 where nothing is scaled."""
    exponent = 0
    if PARTS > 0:
        exponent = exponent_for(largest_magnitude(tile))
    return exponent


@triton.jit
def halves(x):
    """x = high + low/LIFT, both float16."""
    high = x.to(tl.float16)
    return high, ((x - high.to(tl.float32)) * LIFT).to(tl.float16)


@triton.jit
def whole(parts, PARTS: tl.constexpr):
    """What an operand in parts is, scaled as they are, in float32."""
    if PARTS == 2:
        return parts[0].to(tl.float32) + parts[1].to(tl.float32) * (1 / LIFT)
    else:  # noqa: RET505  Triton wants a return in each branch
        return parts[0].to(tl.float32)


@triton.jit
def negated(x):
    """−x by way of float32: the interpreter would negate the bits of bfloat16."""
    return (-x.to(tl.float32)).to(x.dtype)


@triton.jit
def split(x, exponent, PARTS: tl.constexpr):
    """A tile just loaded as an operand of `product`, which wants two parts; of what has one, both are that."""
    if PARTS > 0:
        return halves(scaled(x, exponent))
    else:  # noqa: RET505
        return x, x


@triton.jit
def narrowed(x, dtype: tl.constexpr, PARTS: tl.constexpr):
    """float32 that the kernel computed as an operand of `product`; for halves it is in their range already."""
    if PARTS > 0:
        return halves(x)
    else:  # noqa: RET505
        return x.to(dtype), x.to(dtype)


@triton.jit
def _nearest_tf32(x):
    """float32 rounded to eleven bits; tensor cores would leave the others out, and make everything smaller."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _dot(a, b, sums):
    """sums + a @ b, of 16-bit tiles."""
    if INTERPRETED:  # the interpreter would multiply the bits of bfloat16
        return sums + tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:  # noqa: RET505
        return tl.dot(a, b, sums)


@triton.jit
def _onto(sums, a, b, PRECISION: tl.constexpr):
    """sums + a @ b in one product, added up as the units do it."""
    if PRECISION == "ieee":
        return tl.dot(a[0], b[0], sums, input_precision="ieee")
    elif PRECISION == "tf32":  # noqa: RET505
        return tl.dot(_nearest_tf32(a[0]), _nearest_tf32(b[0]), sums, input_precision="tf32")
    else:
        return _dot(a[0], b[0], sums)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b, of operands in parts, (high, low); the small terms first."""
    if PRECISION == "fp16x3":
        small = tl.dot(a[0], b[1], tl.dot(a[1], b[0]))
        return tl.dot(a[0], b[0], small * (1 / LIFT))
    else:  # noqa: RET505
        return _onto(tl.zeros((a[0].shape[0], b[0].shape[1]), tl.float32), a, b, PRECISION)


@triton.jit
def row_products(a, b, PRECISION: tl.constexpr):
    """a @ bᵀ, of operands in parts: each row of one with each row of the other."""
    return product(a, (tl.trans(b[0]), tl.trans(b[1])), PRECISION)


@triton.jit
def add_product(sums, a, b, PRECISION: tl.constexpr):
    """sums + a @ b, for sums that run over many tiles.

    Tensor cores round every sum of theirs toward zero, one for each 16 terms: by some 2⁻²⁵ of it and always the same way,
    so that n of them on running sums make a bias of n·2⁻²⁵, beyond 22 bits after a few tiles. A product from zeros has at
    most BLOCK/16 of them at its full size, and adding it afterwards rounds to nearest. FMA units round to nearest, and
    the other precisions are too coarse to tell.
    """
    if PRECISION == "fp16x3":
        return sums + product(a, b, PRECISION)
    else:  # noqa: RET505
        return _onto(sums, a, b, PRECISION)


@triton.jit
def add_scaled_product(sums, a, b, exponent, PRECISION: tl.constexpr, PARTS: tl.constexpr, ALONE: tl.constexpr):
    """As `add_product`, with the product scaled by 2^exponent where operands in parts have their own scale in each tile."""
    if ALONE and PARTS > 0:
        return sums + scaled(product(a, b, PRECISION), exponent)
    else:  # noqa: RET505
        return add_product(sums, a, b, PRECISION)
