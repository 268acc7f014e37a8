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
    """What a family holds at the peak of each phase, beyond q, k, v and the output's gradient.

    `scores` are score matrices, of `score_bytes` an element (None: the case's own); `queries` are tensors of q's shape
    and `keys` of k's, of the case's dtype; `rows` are float32 vectors with an entry for each query, such as the
    log-sum-exp. A backward that sums dq up in a float32 copy has its head dimension rounded up to a multiple of
    `accumulator` (0: there is none); `accumulates_float32` tells that float32 cases have one too.
    """

    scores: tuple[float, float] = (0, 0)
    queries: tuple[float, float] = (1, 2)
    keys: tuple[float, float] = (0, 2)
    rows: tuple[float, float] = (1, 2)
    score_bytes: int | None = None
    accumulator: int = 0
    accumulates_float32: bool = False

    def peak_bytes(self, case: Case, phase: int) -> int:
        """Peak of the forward (phase 0) or the backward (1), inputs included."""
        scores = self.scores[phase] * case.scores * (self.score_bytes or case.element_bytes)
        tensors = (2 + self.queries[phase]) * case.query_elements + (2 + self.keys[phase]) * case.key_elements
        query_rows = case.batch * case.heads * case.seq_len
        rows = 4 * self.rows[phase] * query_rows
        accumulated = 0
        if phase == 1 and self.accumulator and (case.element_bytes == 2 or self.accumulates_float32):
            accumulated = 4 * query_rows * (-(-case.d_model // self.accumulator) * self.accumulator)
        return int(scores + tensors * case.element_bytes + rows + accumulated)


MODELS: dict[str, MemoryModel] = {
    "naive": MemoryModel(scores=(3, 7)),
    "eager": MemoryModel(scores=(2, 4)),
    "compile": MemoryModel(scores=(1, 2)),
    "sdpa-math": MemoryModel(scores=(2.25, 4), score_bytes=4, queries=(3, 4), keys=(1, 2)),
    "sdpa-flash": MemoryModel(accumulator=32),
    "sdpa-efficient": MemoryModel(accumulator=64, accumulates_float32=True),
    "sdpa-cudnn": MemoryModel(accumulator=1),
    "flex": MemoryModel(rows=(2, 2)),
}
"""By family, as PyTorch's CUDA kernels allocate."""

ON_CPU = {
    "eager": MemoryModel(scores=(2, 3)),
    "compile": MemoryModel(scores=(2, 2)),
    "sdpa-math": MemoryModel(scores=(2.25, 3), queries=(3, 4), keys=(1, 2)),
    "sdpa-flash": MemoryModel(),
}
"""Families that hold something else on a CPU."""


def model_of(case: Case, family: str | None, device: str) -> MemoryModel | None:
    """The model for a case; None for a family that is not known, such as a user's function."""
    if family == "sdpa":  # the dispatcher's usual choice
        flash = "sdpa-cudnn" if case.element_bytes == 2 else "sdpa-efficient"
        family = "sdpa-flash" if device == "cpu" else flash
    models = MODELS | ON_CPU if device == "cpu" else MODELS
    return models.get(family) if family else None


def memory_bytes(
    case: Case, family: str | None, device: str = "cuda", *, backward: bool = True
) -> tuple[int, int | None] | None:
    """Peak bytes of forward and of backward on a device type, inputs included; None for a family that is not known."""
    model = model_of(case, family, device)
    if model is None:
        return None
    return model.peak_bytes(case, 0), model.peak_bytes(case, 1) if backward else None


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
