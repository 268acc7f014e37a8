"""The comparison of two runs, fit for a pull request: the outcome, what got worse, and the evidence folded below."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence

from attnbench.analysis.compare import PASSES, Agreement, Comparison, Finding, Mean
from attnbench.analysis.verdict import FALSE_DISCOVERIES, IMPROVEMENTS, LEAST_MEMORY, LEAST_MEMORY_MIB, LIKELY, TOLD
from attnbench.errors import printable, unknown
from attnbench.record import PASSES as TIMES
from attnbench.report.tables import Table, markdown_table

FORMATS = ("markdown", "json")

SHOWN = 5
"""Cells of one backend that are named one by one where a run has them alone; JSON has all."""


def render(comparison: Comparison, format: str = "markdown") -> str:  # noqa: A002
    """A comparison as a document. Raises `RequestError` for an unknown format."""
    check_format(format)
    if format == "json":
        return json.dumps(comparison.to_dict(), indent=1, allow_nan=False) + "\n"
    return document(comparison)


def check_format(format: str) -> None:  # noqa: A002
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)


def document(comparison: Comparison) -> str:
    """What differs between the runs themselves, the outcome, regressions; then, folded, the evidence."""
    findings = comparison.findings
    title = "# Two backends compared" if comparison.in_rounds else "# Two runs compared"
    parts = [title, *warnings(comparison.notices), f"**{headline(comparison)}**"]
    parts.append(f"A is {comparison.before}, B is {comparison.after}; ratios are B / A, above 1 is worse.")
    parts += _summary(comparison)
    if regressions := comparison.regressions:
        parts += ["## Regressions", _table(regressions)]
    for title, verdicts in (("Improvements", IMPROVEMENTS), ("Changed otherwise", TOLD), ("Unclear", ("unclear",))):
        if found := [finding for finding in findings if finding.verdict in verdicts]:
            parts.append(folded(f"{title} ({len(found)})", _table(found)))
    if comparison.means:
        parts.append(folded("By backend and pass", _means(comparison)))
    if alone := _alone(comparison):
        parts.append(folded("In one run alone", alone))
    if times := [finding for finding in findings if finding.what in TIMES]:
        parts.append(folded(f"Every time ({len(times)})", _table(times)))
    parts.append(folded("How it was judged", "\n".join(f"- {line}" for line in _rules(comparison))))
    return "\n\n".join(parts) + "\n"


def warnings(notices: Sequence[str]) -> list[str]:
    """As GitHub shows a warning, and as plain text does: none, or one for all."""
    return ["\n".join(["> [!WARNING]", *(f"> WARNING: {notice}" for notice in notices)])] if notices else []


def folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def headline(comparison: Comparison) -> str:
    """The outcome in a line: how many regressions, and how many of each verdict."""
    found = len(comparison.regressions)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in comparison.counts.items()) or "nothing to compare"
    return f"{found or 'No'} regression{'' if found == 1 else 's'}: {counts}."


def _summary(comparison: Comparison) -> list[str]:
    lines = []
    overall = [mean for mean in comparison.means if mean.backend is None] or comparison.means
    if overall:
        told = "; ".join(f"{mean.what} {_mean(mean)}" for mean in overall if mean.what in PASSES)
        lines.append(f"Geometric mean of B / A over the cells that both timed: {told}.")
    if known := [
        finding.uncertainty for finding in comparison.findings if finding.what in PASSES and finding.uncertainty
    ]:
        lines.append(
            f"Half of these times are known to ± {percent(LIKELY * statistics.median(known))}"
            + ("." if comparison.in_rounds else ", drift included.")
        )
    if worst := comparison.worst:
        lines.append(f"The worst time: {_name(worst)}, {_change(worst)} ({worst.verdict}).")
    if failed := comparison.failed_alike:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in failed.items())
        lines.append(f"Failed alike in both: {counts}.")
    return lines


def _rules(comparison: Comparison) -> list[str]:
    """By what a verdict was given, and what stood in the way."""
    threshold, of_memory = comparison.threshold, max(comparison.threshold, LEAST_MEMORY)
    memory = " or ".join(f"{least:g} MiB on {device}" for device, least in LEAST_MEMORY_MIB.items())
    lines = [
        (
            f"Slower and faster: by more than {percent(threshold)}, and beyond chance: p, adjusted for the number of "
            f"cells, is {FALSE_DISCOVERIES:g} at the most. Same: within {percent(threshold)}, noise included. Unclear: "
            "neither; noise, or a clock that differed, may hide as much."
        ),
        *_units(comparison),
        f"More and less memory: a peak that moved by more than {percent(of_memory)} and {memory}.",
        _agreement(comparison.agreement),
    ]
    if clocks := {finding.cell_id: finding.clock for finding in comparison.findings if finding.clock}:
        lines.append(
            f"The SM clock differed in {len(clocks)} cells, by up to {percent(max(clocks.values()))}; so much of a "
            "change is put down to it."
        )
    return lines


def _units(comparison: Comparison) -> list[str]:
    """What a time was held against, and how steady the machine was meanwhile."""
    if comparison.in_rounds:
        told = "The two were measured in turns: a round of one is held against the same round of the other. B / A is the mean "
        return [told + "over rounds, and ± its standard error."]
    drift = (
        f"Between these two runs times are taken to drift by {percent(comparison.drift)} by themselves; ± is the "
        "standard error with that drift."
    )
    a, b = comparison.wander
    if a is None or b is None:
        return [drift]
    return [drift, f"The machine's own speed stayed within ± {percent(a)} during A, ± {percent(b)} during B."]


def _agreement(found: Agreement) -> str:
    if not found.worst:
        return f"No median is above {found.floor_ms:g} ms in both."
    # Rounded down: "100 %" is to mean every one of them.
    shares = ", ".join(
        f"{math.floor(100 * share)} % within {percent(fraction)}" for fraction, share in found.within.items()
    )
    furthest = f"{_name(found.worst)}, {percent(found.worst.excess)}"
    return f"Of {found.medians} medians above {found.floor_ms:g} ms agree {shares}; the furthest apart: {furthest}."


def _table(findings: Sequence[Finding]) -> str:
    rows = [
        [
            *(finding.cell_id, finding.what, number(finding.before), number(finding.after)),
            f"{finding.ratio:.4g}" if finding.ratio else None,
            percent(finding.uncertainty) if finding.uncertainty is not None else None,
            f"{finding.p:.2g}" if finding.p is not None else None,
            finding.verdict,
            printable(finding.note or ""),
        ]
        for finding in findings
    ]
    headers = ["cell", "what", "A", "B", "B / A", "±", "p", "verdict", "note"]
    return markdown_table(Table(headers, rows).without_empty_columns())


def _means(comparison: Comparison) -> str:
    def count(mean: Mean, verdict: str) -> int | None:
        alike = [one for one in comparison.findings if (one.what, one.verdict) == (mean.what, verdict)]
        return sum(mean.backend in (None, one.backend) for one in alike) if mean.what in PASSES else None

    judged = ("slower", "faster", "unclear", "same")
    rows = [
        [
            *(mean.backend or "all", mean.what, mean.cells, f"{mean.ratio:.4g}", interval(mean.interval)),
            *(f"{mean.least:.4g}", f"{mean.greatest:.4g}", *(count(mean, verdict) for verdict in judged)),
        ]
        for mean in comparison.means
    ]
    headers = ["backend", "pass", "cells", "geometric mean of B / A", "95 %", "least", "greatest", *judged]
    return markdown_table(Table(headers, rows))


def _alone(comparison: Comparison) -> str | None:
    """Cells that one run has alone: how many, and the first of each backend by name."""
    rows = [
        [run, backend, len(own), ", ".join(own[:SHOWN]) + (" and others" if len(own) > SHOWN else "")]
        for run, cells in (("A", comparison.only_before), ("B", comparison.only_after))
        for backend, own in cells.items()
    ]
    return markdown_table(Table(["run", "backend", "cells", "which"], rows)) if rows else None


def _mean(mean: Mean) -> str:
    between = f" (95 %: {interval(mean.interval)})" if mean.interval else ""
    return f"{mean.ratio:.4g}{between} over {mean.cells} cell{'' if mean.cells == 1 else 's'}"


def interval(bounds: tuple[float, float] | None) -> str | None:
    return f"{bounds[0]:.4g} – {bounds[1]:.4g}" if bounds else None


def _name(finding: Finding) -> str:
    return f"{finding.cell_id} {finding.what}"


def _change(finding: Finding) -> str:
    return f"{finding.before:.6g} → {finding.after:.6g} ms, {finding.ratio:.4g} ± {percent(finding.uncertainty or 0)}"


def number(value: float | str | None) -> str | None:
    """Six digits of a number, also in a column that has a status beside it; a status as it is."""
    return f"{value:.6g}" if isinstance(value, float | int) else value


def percent(fraction: float) -> str:
    return f"{round(100 * fraction, 2):.12g} %"
