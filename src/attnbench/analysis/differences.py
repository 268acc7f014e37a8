"""In what two runs differ that could pass for a change of the backends, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attnbench import machine
from attnbench.store import Run

SETTINGS = (
    "device", "passes", "protocol", "clock", "warm_cache", "budget_s", "timeout_s", "memory_limit_bytes", "seed",
)  # fmt: skip
"""What of a request bears on its cells' outcomes."""

SOFTWARE = ("attnbench", "driver", "software", "threads", "environment")
"""What bears on them besides, and is no part of a machine's identity."""


def notices(a: Run, b: Run) -> Iterator[str]:
    """One line for each kind of difference, and for each run that is not finished."""
    before, now = (run.header.machine | {"attnbench": run.header.attnbench} for run in (a, b))
    differences = {
        "machines": machine.difference(a.header.machine, b.header.machine),
        "software": _difference(before, now, SOFTWARE),
        "settings": _difference(a.header.request, b.header.request, SETTINGS),
        "backends": _versions(a, b),
    }
    yield from (f"The {what} differ: {how}." for what, how in differences.items() if how)
    for run in (a, b):
        if not run.complete:
            yield f"{run.directory} is not finished: it has {len(run.records)} of {run.header.cells} cells."


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """In which of `names` two headers differ, in words; what one lacks is the same as what is empty in the other."""
    parts = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in names
        if (before.get(name) or None) != (now.get(name) or None)
    ]
    return "; ".join(parts) or None


def _versions(a: Run, b: Run) -> str | None:
    """Which backends have another version, those with the same two versions together."""
    before, now = ({one.backend: one.backend_version for one in run.records if one.backend_version} for run in (a, b))
    changed: dict[tuple[str, str], list[str]] = {}
    for backend in before:
        if now.get(backend, before[backend]) != before[backend]:
            changed.setdefault((before[backend], now[backend]), []).append(backend)
    return "; ".join(f"{', '.join(names)} was {was} and is {is_}" for (was, is_), names in changed.items()) or None
