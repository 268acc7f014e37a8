"""Forecasts of a cell's memory and time, before anything runs.

Memory follows from which tensors an implementation holds at once. A score matrix has batch · heads · seq_len · kv_len
elements; everything else is linear in length. Each family of backends is a row of counts; docs/method.md holds them
against measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnbench import cost
from attnbench.case import Case

MiB = 1 << 20


@dataclass(frozen=True)
class MemoryModel:
    """How many tensors a family holds at its peak, beyond q, k, v and the output's gradient.

    `scores_*` are score matrices at the peak of a phase, of `score_bytes` an element (None: the case's own); `query_*`
    are tensors of q's shape and `key_*` of k's, of the case's dtype; `rows` are float32 vectors with an entry for each
    query, such as the log-sum-exp; `accumulator` is a float32 copy of dq that 16-bit backwards add up in.
    """

    scores_forward: float = 0
    scores_backward: float = 0
    score_bytes: int | None = None
    query_forward: float = 1
    query_backward: float = 2
    key_forward: float = 0
    key_backward: float = 2
    rows_forward: float = 0
    rows_backward: float = 0
    accumulator: bool = False

    def forward_bytes(self, case: Case) -> int:
        return self._bytes(case, self.scores_forward, self.query_forward, self.key_forward, self.rows_forward)

    def backward_bytes(self, case: Case) -> int:
        linear = self._bytes(case, self.scores_backward, self.query_backward, self.key_backward, self.rows_backward)
        return linear + (4 * case.query_elements if self.accumulator and case.element_bytes == 2 else 0)

    def _bytes(self, case: Case, scores: float, query: float, key: float, rows: float) -> int:
        score_bytes = self.score_bytes or case.element_bytes
        tensors = (2 + query) * case.query_elements + (2 + key) * case.key_elements
        vectors = 4 * rows * case.batch * case.heads * case.seq_len
        return int(scores * case.scores * score_bytes + tensors * case.element_bytes + vectors)


MODELS: dict[str, MemoryModel] = {
    "naive": MemoryModel(scores_forward=3, scores_backward=6),
    "eager": MemoryModel(scores_forward=2, scores_backward=3),
    "compile": MemoryModel(scores_forward=2, scores_backward=2),
    "sdpa-math": MemoryModel(scores_forward=2, scores_backward=3, query_forward=2, key_forward=1),
    "sdpa": MemoryModel(rows_forward=1, rows_backward=2, accumulator=True),
    "sdpa-flash": MemoryModel(rows_forward=1, rows_backward=2, accumulator=True),
    "sdpa-efficient": MemoryModel(rows_forward=1, rows_backward=2, accumulator=True),
    "sdpa-cudnn": MemoryModel(rows_forward=1, rows_backward=2, accumulator=True),
    "flex": MemoryModel(rows_forward=1, rows_backward=2),
}


def memory_bytes(case: Case, model: str | None, *, backward: bool) -> tuple[int, int | None] | None:
    """Peak bytes of forward and of backward, inputs included; None for a backend whose family is not known."""
    if model is None:
        return None
    found = MODELS[model]
    return found.forward_bytes(case), found.backward_bytes(case) if backward else None


# --- time -------------------------------------------------------------------------------------------------------------

RATES = {"cpu": (4e10, 4e8), "cuda": (1.5e14, 4e11)}
"""Rough rates by device type: FLOP/s of the products, on a CPU per core, and scores/s of one pass over a score matrix."""

FIXED_S = {"cpu": 0.2, "cuda": 0.4}
COMPILE_S = {"cpu": 3.0, "cuda": 7.0}


def seconds(
    case: Case, model: str | None, device: str, cores: int, *, backward: bool, budget_s: float, compiles: bool
) -> float:
    """Wall time of a cell, to a factor of two or so: enough to tell minutes from hours before the first cell is done."""
    kind = device.split(":")[0]
    flop_rate, score_rate = RATES[kind]
    scale = cores if kind == "cpu" else 1
    passes = {"naive": 12, "eager": 5, "compile": 4, "sdpa-math": 5}.get(model or "eager", 0.5)
    step = (cost.flops_forward(case) * (3.5 if backward else 1)) / (flop_rate * scale)
    step += passes * case.scores * (1 if backward else 0.4) / (score_rate * scale)
    repeats = 1 if kind == "cpu" and step > 1 else 3
    return FIXED_S[kind] + repeats * step + (budget_s if repeats > 1 else 0) + (COMPILE_S[kind] if compiles else 0)
