"""The ceilings of this machine, measured once and kept: by device, driver and the versions of what measures them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attnbench import machine
from attnbench.errors import RequestError
from attnbench.executors.local import LocalExecutor, WorkerLost
from attnbench.grid import Grid
from attnbench.request import Request

REVISION = 1
"""Of the way in which ceilings are measured; those of another revision are measured anew."""

PATIENCE_S = 300.0


def ceilings(device: str, *, anew: bool = False) -> dict[str, Any]:
    """The ceilings of a device, from the cache or, if `anew` or there are none, measured in a process of its own.

    Returns:
        The fields of `attnbench.limits.Ceilings`, with `measured_at` and, where they were measured just now, `seconds`.

    Raises:
        RequestError: they cannot be measured.
    """
    path = cache_directory() / f"ceilings-{_key(device)}.json"
    if not anew:
        with suppress(OSError, ValueError):
            return json.loads(path.read_text("utf-8"))
    began = time.monotonic()
    found = _measured(device) | {"measured_at": datetime.now(UTC).isoformat(timespec="seconds")}
    with suppress(OSError):  # a home that cannot be written costs only another measurement next time
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(found, indent=1), "utf-8")
        aside.replace(path)
    return found | {"seconds": round(time.monotonic() - began, 1)}


def _measured(device: str) -> dict[str, Any]:
    request = Request(Grid(), "calibrate", ("eager",), {}, device)
    try:
        with LocalExecutor(request) as executor:
            reply = executor.ask({"task": "calibrate"}, PATIENCE_S, "eager")
    except WorkerLost as lost:
        raise RequestError(f"the ceilings of {device} cannot be measured: {lost}") from None
    if failed := reply.get("fields"):
        raise RequestError(f"the ceilings of {device} cannot be measured: {failed['reason']}")
    return reply["ceilings"]


def cache_directory() -> Path:
    """`$ATTNBENCH_CACHE`, or `attnbench` in the user's folder for caches."""
    if own := os.environ.get("ATTNBENCH_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnbench"


def _key(device: str) -> str:
    """A name for what the ceilings belong to: change any of it, and they are measured anew."""
    facts = machine.fingerprint()
    gpu = facts["gpus"][int(device.partition(":")[2] or 0)] if device != "cpu" and facts["gpus"] else None
    own = (
        [gpu and gpu["uuid"], gpu and gpu["power_limit_W"], facts["driver"], os.environ.get("CUDA_VISIBLE_DEVICES")]
        if device != "cpu"
        else [facts["hostname"], facts["cpu"], facts["physical_cores"]]
    )
    return hashlib.sha256(json.dumps([REVISION, device, *own, facts["packages"].get("torch")]).encode()).hexdigest()[
        :16
    ]
