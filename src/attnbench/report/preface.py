"""What a report begins with: the machine, how it was measured, what came of it and which warnings there are."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from attnbench.limits import Ceilings
from attnbench.record import FAILURES, Record
from attnbench.report.tables import Table, Writer
from attnbench.store import Header, Run
from attnbench.tags import TAGS


def machine(run: Run, writer: Writer) -> list[str]:
    return [writer.heading("Machine", 2), writer.table(Table(["what", "value"], facts_of(run)))]


def facts_of(run: Run) -> list[tuple[str, Any]]:
    """What the numbers were taken on and how, each by its name; what is not known is left out."""
    header, facts = run.header, run.header.machine
    software = facts.get("software") or {}
    rows: list[tuple[str, Any]] = [
        ("run", f"{header.run_id}, started {header.started_at}"),
        ("device", header.request["device"]),
        *(("GPU", f"{gpu['name']}, {gpu['memory_MiB']} MiB, {gpu['power_limit_W']} W") for gpu in facts["gpus"]),
        ("driver", facts.get("driver")),
        ("CPU", f"{facts['cpu']}, {facts['physical_cores']} cores, {facts['memory_MiB']} MiB"),
        ("system", f"{facts['system']}, {facts['kernel']}, Python {facts['python']}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in facts["packages"].items())),
        ("CUDA, cuDNN", ", ".join(str(software[key]) for key in ("cuda", "cudnn") if software.get(key)) or None),
        ("ceilings", _ceilings(header)),
        ("protocol", _protocol(header)),
        ("wall time, s", _seconds(header)),
        ("steadiness", header.wander and f"the machine's own speed stayed within ± {100 * header.wander:.1f} %"),
        ("attnbench", header.attnbench),
    ]
    return [row for row in rows if row[1]]


def _ceilings(header: Header) -> str | None:
    if not header.ceilings:
        return None
    if reason := header.ceilings.get("reason"):
        return f"not known: {reason}"
    known = Ceilings.from_dict(header.ceilings)
    rates = [
        ("memory", known.memory_bytes_per_s, 1e9, "GB/s"),
        *((name, rate, 1e12, "TFLOP/s") for name, rate in known.matmul_flop_per_s.items()),
        ("exp", known.exp_per_s, 1e9, "G/s"),
        ("launch", known.launch_ms, 1e-3, "µs"),
    ]
    return ", ".join(f"{name} {rate / unit:.4g} {unit_name}" for name, rate, unit, unit_name in rates if rate)


def _protocol(header: Header) -> str:
    request = header.request
    parts = [request["protocol"], f"{request['budget_s']} s a cell", f"seed {request['seed']}"]
    if request["device"] != "cpu" and request["protocol"] == "default":
        parts += [f"{request.get('clock', 'sustained')} clock", "warm" if request.get("warm_cache") else "flushed L2"]
    return ", ".join(parts)


def _seconds(header: Header) -> str | None:
    """Where the time went; parts of no account are left out."""
    spent = header.seconds or {}
    return ", ".join(f"{name} {seconds:g}" for name, seconds in spent.items() if seconds) or None


def summary(run: Run, writer: Writer) -> list[str]:
    counts = ", ".join(f"{count} {status}" for status, count in sorted(run.counts.items())) or "none"
    parts = [writer.text(f"{len(run.records)} of {run.header.cells} cells: {counts}.")]
    if told := troubles_of(run):
        parts.append(writer.table(Table(["backend", "status", "reason, such as", "cells"], told)))
    seen = Counter(tag for record in run.records for tag in record.tags)
    if seen:
        rows = [[name, TAGS[name].about if name in TAGS else None, count] for name, count in seen.most_common()]
        parts.append(writer.table(Table(["tag", "what it means", "cells"], rows)))
    return parts


def troubles_of(run: Run) -> list[tuple[str, str, str | None, int]]:
    """Backend, status, reason and number of the cells that are broken or were refused, a line for each complaint."""
    told: dict[tuple[str, str, str], list[Record]] = {}
    for record in run.records:
        if record.status in (*FAILURES, "unsupported"):
            alike = re.sub(r"[0-9][0-9.e+-]*", "#", record.reason or "")  # the same complaint with other numbers
            told.setdefault((record.backend, record.outcome, alike), []).append(record)
    return [(backend, outcome, found[-1].reason, len(found)) for (backend, outcome, _), found in told.items()]
