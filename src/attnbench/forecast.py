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

MUCH_BYTES, SHARES, SHORT, WIDE = 32 << 20, 4, 512, 64
"""Where float16 halves take more, attnbench's own kernels make them for a share of the heads at a time, of four at most; of
sequences up to the third they make none, but where two halves each are wanted of heads wider than the fourth."""


@dataclass(frozen=True)
class MemoryModel:
    """What a family holds at the peak of each phase, beyond q, k, v and the output's gradient.

    `scores` are score matrices, of `score_bytes` an element (None: the case's own); `queries` are tensors of q's shape
    and `keys` of k's, of the case's dtype; `rows` are float32 vectors with an entry for each query, such as the
    log-sum-exp. A backward that sums dq up in a float32 copy has its head dimension rounded up to a multiple of
    `accumulator` (0: there is none); `accumulates_float32` tells that float32 cases have one too. `halves` tells that
    float32 is multiplied as float16 halves, two for `ieee` and one for `tf32`, which are stored where sequences are longer
    than `SHORT` or two of them are `WIDE`: those of k and v, then of q and dO as well.
    """

    scores: tuple[float, float] = (0, 0)
    queries: tuple[float, float] = (1, 2)
    keys: tuple[float, float] = (0, 2)
    rows: tuple[float, float] = (1, 2)
    score_bytes: int | None = None
    accumulator: int = 0
    accumulates_float32: bool = False
    halves: bool = False

    def peak_bytes(self, case: Case, phase: int) -> int:
        """Peak of the forward (phase 0) or the backward (1), inputs included."""
        scores = self.scores[phase] * case.scores * (self.score_bytes or case.element_bytes)
        tensors = (2 + self.queries[phase]) * case.query_elements + (2 + self.keys[phase]) * case.key_elements
        query_rows = case.batch * case.heads * case.seq_len
        rows = 4 * self.rows[phase] * query_rows
        accumulated = 0
        if phase == 1 and self.accumulator and (case.element_bytes == 2 or self.accumulates_float32):
            accumulated = 4 * query_rows * (-(-case.d_model // self.accumulator) * self.accumulator)
        halves = self._halves_bytes(case, phase) if self.halves and case.dtype == "float32" else 0
        return int(scores + tensors * case.element_bytes + rows + accumulated + halves)

    def _halves_bytes(self, case: Case, phase: int) -> float:
        parts = 2 if case.precision == "ieee" else 1
        if max(case.seq_len, case.kv_len) <= SHORT and not (parts == 2 and case.d_model > WIDE):
            return 0
        halves_bytes = 2 * parts * 2 * (case.key_elements + (case.query_elements if phase else 0))
        heads = case.batch if case.batch > 1 else case.kv_heads
        shares = min(SHARES, max(1, -(-halves_bytes // MUCH_BYTES)), heads)
        return -(-heads // shares) / heads * halves_bytes


MODELS: dict[str, MemoryModel] = {
    "naive": MemoryModel(scores=(3, 7)),
    "eager": MemoryModel(scores=(2, 4)),
    "compile": MemoryModel(scores=(1, 2)),
    "sdpa-math": MemoryModel(scores=(2.25, 4), score_bytes=4, queries=(3, 4), keys=(1, 2)),
    "sdpa-flash": MemoryModel(accumulator=32),
    "sdpa-efficient": MemoryModel(accumulator=64, accumulates_float32=True),
    "sdpa-cudnn": MemoryModel(accumulator=1),
    "flex": MemoryModel(rows=(2, 2)),
    "attnbench": MemoryModel(rows=(1, 3), halves=True),
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


@dataclass(frozen=True)
class Pace:
    """Rough rates of a device type: what one core of a CPU, or a GPU, does in a second, and what a cell costs besides.

    A step takes flops / `flop_rate` and `passes` / `score_rate` for each score; it is made `steps` times in all, unless
    it takes longer than `once_s`. Families that are not listed count as `eager`.
    """

    flop_rate: float
    score_rate: float
    passes: dict[str, float]
    steps: int
    once_s: float
    fixed_s: float
    compile_s: dict[str, float]


PACES = {
    "cpu": Pace(
        flop_rate=7.4e10,
        score_rate=4e8,
        passes={"naive": 15, "eager": 4.5, "compile": 6, "sdpa-math": 5, "sdpa": 1.3, "sdpa-flash": 1.3, "flex": 1.3},
        steps=5,
        once_s=2.0,
        fixed_s=0.3,
        compile_s={"compile": 3.0, "flex": 10.0},
    ),
    "cuda": Pace(
        flop_rate=1.5e14,
        score_rate=4e11,
        passes={"naive": 16, "eager": 6, "compile": 4, "sdpa-math": 8, "sdpa": 5, "sdpa-efficient": 8}
        | dict.fromkeys(("sdpa-flash", "sdpa-cudnn"), 0.7)
        | {"flex": 20, "attnbench": 2},
        steps=20,
        once_s=float("inf"),
        fixed_s=0.6,
        compile_s={"compile": 1.8, "flex": 3.0, "attnbench": 3.0},
    ),
}


def seconds(
    case: Case,
    family: str | None,
    device: str,
    cores: int,
    *,
    backward: bool = True,
    budget_s: float = 1.0,
    fits: bool = True,
) -> float:
    """Wall time of a cell, to a factor of two or so: enough to tell minutes from hours before the first cell is done."""
    pace, name = PACES[device], family or "eager"
    speed = cores if device == "cpu" else 1
    flops = cost.flops_forward(case) + (cost.flops_backward(case) if backward else 0)
    passes = pace.passes.get(name, pace.passes["eager"]) * (1 if backward else 0.4)
    step = flops / (pace.flop_rate * speed) + passes * case.scores / (pace.score_rate * speed)
    measured = step if step > pace.once_s else max(min(budget_s, step * 100), pace.steps * step)
    return pace.fixed_s + (measured + pace.compile_s.get(name, 0.0) if fits else 0.0)
