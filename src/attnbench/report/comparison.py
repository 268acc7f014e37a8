"""The comparison of two runs: whether anything got worse, what, by how much, and every cell."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from attnbench.analysis.compare import (
    CERTAIN,
    IMPROVEMENTS,
    LEAST_MEMORY,
    LEAST_MEMORY_MIB,
    PASSES,
    REGRESSIONS,
    Agreement,
    Comparison,
    Finding,
)
from attnbench.errors import printable, unknown
from attnbench.record import PASSES as TIMES
from attnbench.report.tables import WRITERS, Table, Writer

FORMATS = ("markdown", "json")

SHOWN = 5
"""Cells of one backend that are named one by one where a run has them alone; JSON has all."""


def render(comparison: Comparison, format: str = "markdown") -> str:  # noqa: A002
    """A comparison as a document. Raises `RequestError` for an unknown format."""
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if format == "json":
        return json.dumps(comparison.to_dict(), indent=1, allow_nan=False) + "\n"
    writer = WRITERS[format]
    return writer.page(document(comparison, writer))


def document(comparison: Comparison, writer: Writer) -> str:
    """What differs between the runs themselves, the verdicts, and then the evidence, the worst first."""
    parts = [writer.heading("Two runs compared", 1)]
    parts += [writer.text(f"WARNING: {notice}") for notice in comparison.notices]
    parts.append(writer.text(f"A is {comparison.before}, B is {comparison.after}; ratios are B / A, above 1 is worse."))
    parts += [writer.text(line) for line in (headline(comparison), *_summary(comparison))]
    for title, verdicts in (("Regressions", REGRESSIONS), ("Improvements", IMPROVEMENTS), ("Changed", ("changed",))):
        found = comparison.regressions if verdicts == REGRESSIONS else comparison.findings
        parts += _section(title, [finding for finding in found if finding.verdict in verdicts], writer)
    parts += _means(comparison, writer)
    parts += _alone(comparison, writer)
    parts += _section("Every time", [finding for finding in comparison.findings if finding.what in TIMES], writer)
    return "\n\n".join(parts) + "\n"


def headline(comparison: Comparison) -> str:
    """The outcome in a line: how many regressions, and how many of each verdict."""
    found = len(comparison.regressions)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in comparison.counts.items()) or "nothing to compare"
    return f"{found or 'No'} regression{'' if found == 1 else 's'}: {counts}."


def _summary(comparison: Comparison) -> list[str]:
    threshold, of_memory = comparison.threshold, max(comparison.threshold, LEAST_MEMORY)
    memory = " or ".join(f"{least:g} MiB on {device}" for device, least in LEAST_MEMORY_MIB.items())
    lines = [
        (
            f"Slower and faster: by more than {_percent(threshold)} and {CERTAIN:g} times the uncertainty. "
            "Unclear: noise, or a clock that differed, may hide as much."
        ),
        f"More and less memory: a peak that moved by more than {_percent(of_memory)} and {memory}.",
    ]
    if worst := comparison.worst:
        lines.append(f"The worst time: {_name(worst)}, {_change(worst)} ({worst.verdict}).")
    lines.append(_agreement(comparison.agreement))
    if clocks := {finding.cell_id: finding.clock for finding in comparison.findings if finding.clock}:
        lines.append(
            f"The SM clock differed in {len(clocks)} cells, by up to {_percent(max(clocks.values()))}; so much of a "
            "change is put down to it."
        )
    if failed := comparison.failed_alike:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in failed.items())
        lines.append(f"Failed alike in both: {counts}.")
    return lines


def _agreement(found: Agreement) -> str:
    if not found.worst:
        return f"No median is above {found.floor_ms:g} ms in both."
    # Rounded down: "100 %" is to mean every one of them.
    shares = ", ".join(
        f"{math.floor(100 * share)} % within {_percent(fraction)}" for fraction, share in found.within.items()
    )
    furthest = f"{_name(found.worst)}, {_percent(found.worst.excess)}"
    return f"Of {found.medians} medians above {found.floor_ms:g} ms agree {shares}; the furthest apart: {furthest}."


def _section(title: str, findings: Sequence[Finding], writer: Writer) -> list[str]:
    if not findings:
        return []
    rows = [
        [
            *(finding.cell_id, finding.what, finding.before, finding.after),
            f"{finding.ratio:.4g}" if finding.ratio else None,
            _percent(finding.uncertainty) if finding.uncertainty is not None else None,
            finding.verdict,
            printable(finding.note or ""),
        ]
        for finding in findings
    ]
    headers = ["cell", "what", "A", "B", "B / A", "±", "verdict", "note"]
    return [writer.heading(title, 2), writer.table(Table(headers, rows).without_empty_columns())]


def _means(comparison: Comparison, writer: Writer) -> list[str]:
    if not comparison.means:
        return []

    def count(backend: str, what: str, verdict: str) -> int | None:
        alike = [f for f in comparison.findings if (f.backend, f.what, f.verdict) == (backend, what, verdict)]
        return len(alike) if what in PASSES else None

    judged = ("slower", "faster", "unclear", "same")
    rows = [
        [
            *(mean.backend, mean.what, mean.cells, *(f"{x:.4g}" for x in (mean.ratio, mean.least, mean.greatest))),
            *(count(mean.backend, mean.what, verdict) for verdict in judged),
        ]
        for mean in comparison.means
    ]
    headers = ["backend", "pass", "cells", "geometric mean of B / A", "least", "greatest", *judged]
    return [writer.heading("By backend and pass", 2), writer.table(Table(headers, rows))]


def _alone(comparison: Comparison, writer: Writer) -> list[str]:
    """Cells that one run has alone: how many, and the first of each backend by name."""
    rows = [
        [run, backend, len(own), ", ".join(own[:SHOWN]) + (" and others" if len(own) > SHOWN else "")]
        for run, cells in (("A", comparison.only_before), ("B", comparison.only_after))
        for backend, own in cells.items()
    ]
    if not rows:
        return []
    return [writer.heading("In one run alone", 2), writer.table(Table(["run", "backend", "cells", "which"], rows))]


def _name(finding: Finding) -> str:
    return f"{finding.cell_id} {finding.what}"


def _change(finding: Finding) -> str:
    return f"{finding.before:.6g} → {finding.after:.6g} ms, {finding.ratio:.4g} ± {_percent(finding.uncertainty or 0)}"


def _percent(fraction: float) -> str:
    return f"{round(100 * fraction, 2):.12g} %"
