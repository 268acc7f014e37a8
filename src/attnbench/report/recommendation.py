"""A recommendation for a reader: the answer and how sure it is, the other candidates, who is left out, and the code."""

from __future__ import annotations

from attnbench.analysis.recommend import Candidate, Recommendation
from attnbench.case import Case
from attnbench.errors import printable
from attnbench.report.tables import Table, markdown_table

PASSES = {"forward": "a forward", "backward": "a backward", "step": "a step (forward and backward)"}


def text(recommendation: Recommendation) -> str:
    """The recommendation as Markdown that also reads well on a terminal."""
    told = (_answer(recommendation), _determinism(recommendation), _basis(recommendation))
    parts = [" ".join(sentences) for sentences in told if sentences]
    parts.append(_candidates(recommendation))
    if recommendation.left_out:
        parts.append("\n".join(["Left out:", *(f"- {one.backend}: {one.reason}" for one in recommendation.left_out)]))
    parts.append(f"In Python, on {_tensors(recommendation.case)}:\n\n```python\n{recommendation.snippet}```")
    return "\n\n".join(parts)


def _answer(told: Recommendation) -> list[str]:
    """Who is the fastest, who comes next, and whether the two can be told apart."""
    first, second = told.winner, told.runner_up
    which = "the fastest whose gradients are the same each time" if told.deterministic else "the fastest"
    answer = f"For {PASSES[told.what]} at {_shape(told.case)} {which} is {first.backend}: {first.ms:.4g} ms."
    if second is None:
        return [answer, "No other backend is right and fits."]
    gap = f"{second.backend}, {_percent(told.margin(second))} slower"
    if not told.too_close(second):
        return [answer, f"Next is {gap}."]
    if first.at_least:
        why = "and the time of the first is one at the least"
    elif None in (first.noise, second.noise):
        why = "which is within an error that nothing here tells"
    else:
        why = "which is within the uncertainty of the two"
    return [answer, f"Too close to call: next is {gap}, {why}."]


def _determinism(told: Recommendation) -> list[str]:
    """How the gradients come to be the same each time, and what that does to the times."""
    first = told.winner.determinism
    if first is None:
        return []
    sentences = [f"{told.winner.backend}: {first.why}."]
    if slowed := [one.backend for one in told.candidates if one.at_least]:
        sentences.append(
            f"The times of {', '.join(slowed)} are those without torch.use_deterministic_algorithms, under which the "
            "backward takes longer; by how much, this run does not tell."
        )
    return sentences


def _basis(told: Recommendation) -> list[str]:
    """What the fastest one's time rests on, where its shape was not measured."""
    case, first = told.case, told.winner
    if first.kind == "measured":
        return []
    lengths, widths = (" and ".join(map(str, values)) for values in (first.seq_lens, first.d_models))
    shape = f"seq_len {case.seq_len} with d_model {case.d_model} was not measured"
    how = {
        "beside": f"its times are estimated from those beside it, at seq_len {lengths} and d_model {widths}",
        "between lengths": f"its times are interpolated between seq_len {lengths}",
        "beyond lengths": f"its times are extrapolated, which is less certain, from seq_len {lengths}",
        "between d_models": f"its times are interpolated between d_model {widths}; kernels that pad d_model take longer",
        "larger d_model": f"d_model {widths} stands in for it, as kernels pad up to it; one that does not may be faster",
        "far": f"its times are estimated, which is less certain, from seq_len {lengths} and d_model {widths}",
    }[first.kind]
    return [f"{shape}: {how}.", _error(first)]


def _error(first: Candidate) -> str:
    if first.error is None:
        return "How far that is off cannot be told: too few shapes were measured to leave one out."
    shapes = f"{first.error.shapes} measured shape{'s' if first.error.shapes > 1 else ''}"
    off = f"{_percent(first.error.median)} in the median and {_percent(first.error.maximum)} at most"
    return f"Left out and predicted like that from the others, {shapes} of {first.backend} came out wrong by {off}."


def _candidates(told: Recommendation) -> str:
    rows = [
        [
            printable(one.backend),
            ("≥ " if one.at_least else "") + f"{one.ms:.4g}",
            _margin(told, one),
            f"± {_percent(one.noise)}" if one.noise is not None else "not known",
            f"{one.peak_MiB:.5g}" if one.peak_MiB is not None else None,
            _percent(one.limit) if one.limit is not None else None,
            ", ".join(one.tags),
        ]
        for one in told.candidates
    ]
    headers = ["backend", "ms", "slower by", "uncertainty", "peak MiB", "of the limit", "tags"]
    return markdown_table(Table(headers, rows).without_empty_columns())


def _margin(told: Recommendation, one: Candidate) -> str | None:
    if one is told.winner:
        return None
    return _percent(told.margin(one)) + (", too close to call" if told.too_close(one) else "")


def _shape(case: Case) -> str:
    """A case in words."""
    parts = [
        f"seq_len {case.seq_len}",
        *([f"kv_len {case.kv_len}"] if case.kv_len != case.seq_len else []),
        f"d_model {case.d_model}, batch {case.batch}, {case.heads} head{'s' if case.heads > 1 else ''}",
        *([f"{case.kv_heads} of keys"] if case.kv_heads != case.heads else []),
        case.dtype + (f" ({case.precision})" if case.dtype == "float32" else ""),
    ]
    return f"{', '.join(parts)}, {'causal' if case.causal else 'no mask'},"


def _tensors(case: Case) -> str:
    """The tensors that the code takes, with their sizes as torch prints them."""
    q, k = ((case.batch, heads, n, case.d_model) for heads, n in
            ((case.heads, case.seq_len), (case.kv_heads, case.kv_len)))  # fmt: skip
    return f"q, k and v of {case.dtype} and {q}" if q == k else f"q of {q}, k and v of {k}, {case.dtype}"


def _percent(fraction: float) -> str:
    """Three digits, and no power of ten: some are a hundred times slower."""
    return f"{float(f'{100 * fraction:.3g}'):.12g} %"
