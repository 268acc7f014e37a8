"""A kernel that does nothing but exponentials."""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import triton
import triton.language as tl

BLOCK, CHAINS = 1024, 4


@triton.jit
def exponentials(out_ptr, steps, BLOCK: tl.constexpr = BLOCK):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = at.to(tl.float32) * -1e-6
    b, c, d = a - 0.5, a - 1.0, a - 1.5
    for _ in range(steps):
        a, b, c, d = tl.exp2(a), tl.exp2(b), tl.exp2(c), tl.exp2(d)
    tl.store(out_ptr + at, a + b + c + d)
