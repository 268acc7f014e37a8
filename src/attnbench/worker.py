"""The process in which cells are measured: one request in, one reply out, over pipes of its own.

Requests and replies are lines of JSON. A request has a `task`, the name of a method of `attnbench.bench.Bench`; while one
is at work, lines `{"phase": …}` tell how far it is, so that the runner knows where a process was that died or hung.
Standard output and error belong to the backends, and cannot disturb the replies.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from attnbench.bench import Bench, Settings, Sick
from attnbench.errors import words
from attnbench.measure.call import BrokenPromise

# --- replies ----------------------------------------------------------------------------------------------------------

OUT_OF_MEMORY = (
    *("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "alloc_failed"),
    "storage size calculation overflowed",
)


def failure(error: BaseException, phase: str) -> dict[str, Any]:
    """The fields of a record that an exception makes of its cell."""
    text = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(part in text for part in OUT_OF_MEMORY):
        return {"status": "oom", "phase": phase, "reason": words(error)}
    kind = "" if isinstance(error, BrokenPromise) else f"{type(error).__name__}: "
    return {"status": "error", "phase": phase, "reason": kind + words(error)}


def answer(bench: Bench, request: dict[str, Any]) -> dict[str, Any]:
    """Carries out one request. Raises `Sick` where the process is of no further use."""
    task = {"describe": bench.describe, "visit": bench.visit, "calibrate": bench.calibrate}[request.pop("task")]
    bench.accounts.spent_s.clear()
    try:
        reply = task(**request)
    except Exception as error:
        reply = {"fields": failure(error, bench.phase)}
        # Frames of the traceback hold tensors; after an out-of-memory they must go before anything else can run.
        error.__traceback__ = error.__context__ = error.__cause__ = None
        del error
        bench.clean()
    bench.give_back()
    return reply | {"spent_s": dict(bench.accounts.spent_s)}


# --- the process ------------------------------------------------------------------------------------------------------


def limit_memory(limit_bytes: int) -> None:
    """Makes allocations fail once the process holds `limit_bytes`.

    The limit is on private writable memory (RLIMIT_DATA). A fresh process has much of that reserved and never touched,
    such as thread stacks, which is allowed for.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    reserved = (int(status["VmData"].split()[0]) - int(status["RssAnon"].split()[0])) << 10
    held = int(status["RssAnon"].split()[0]) << 10
    if limit_bytes <= held:
        raise RuntimeError(
            f"it may hold {limit_bytes >> 20} MiB, and holds {held >> 20} MiB when idle; see --memory-limit"
        )
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (min(limit_bytes + max(0, reserved), 1 << 62), hard))


def _die_with_parent(parent: int) -> None:
    """Ends this process when the runner's ends, even by SIGKILL."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    settings = json.loads(sys.argv[1])
    _die_with_parent(settings["parent"])
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the runner's to handle
    with os.fdopen(settings["replies"], "w") as replies, os.fdopen(settings["requests"]) as requests:

        def tell(message: dict[str, Any]) -> None:
            replies.write(json.dumps(message) + "\n")
            replies.flush()

        try:
            bench = Bench(Settings(**settings["measuring"]), tell)
            if limit := settings["memory_limit_bytes"]:
                if bench.device.type == "cuda":
                    total = torch.cuda.get_device_properties(bench.device).total_memory
                    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), bench.device)
                elif sys.platform == "linux":
                    limit_memory(limit)
        except Exception as error:
            tell({"reply": {"broken": f"{type(error).__name__}: {words(error)}"}})
            return
        tell({"reply": {"ready": True}})
        for line in requests:
            try:
                tell({"reply": answer(bench, json.loads(line))})
            except Sick as error:
                lost = {"status": "crash", "phase": bench.phase, "reason": f"CUDA context lost: {error}"}
                tell({"reply": {"fields": lost, "sick": True}})
                return


if __name__ == "__main__":
    main()
