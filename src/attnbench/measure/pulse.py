"""How fast a CPU is at a moment: a fixed piece of work, timed again and again while a run goes on.

A shared machine's speed wanders over tens of seconds, for reasons that nothing inside it tells. What a run measures in the
seconds of one cell cannot show that; the same work at every visit of a cell does.
"""

from __future__ import annotations

import statistics
import time

import torch

REPEATS = 5


class Pulse:
    """A small attention of all cores, some milliseconds in all: (8, 256, 64), in float32, into memory that it keeps."""

    def __init__(self) -> None:
        drawn = torch.Generator().manual_seed(0)
        self._q, self._k, self._v = torch.randn(3, 8, 256, 64, generator=drawn)
        self._scores = torch.empty(8, 256, 256)
        self._out = torch.empty(8, 256, 64)

    @torch.no_grad()
    def __call__(self) -> float:
        """Milliseconds of the work: the median of some, after one that does not count."""
        return statistics.median([self._once() for _ in range(1 + REPEATS)][1:])

    def _once(self) -> float:
        began = time.perf_counter()
        torch.matmul(self._q, self._k.mT, out=self._scores)
        self._scores.sub_(self._scores.amax(-1, keepdim=True)).exp_()
        torch.matmul(self._scores, self._v, out=self._out)
        return (time.perf_counter() - began) * 1e3
