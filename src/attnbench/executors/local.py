"""A worker process on this machine: started when needed, ended when it hangs, replaced when it dies."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import psutil

from attnbench import backends
from attnbench.errors import printable
from attnbench.machine import default_memory_limit_bytes
from attnbench.request import Request

POLL_S = 0.1
OVERRIDES_OF_PRECISION = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
START_TIMEOUT_S = 300.0

MOST_WORKERS = 8
"""Workers beside the one that PyTorch's own backends share that are kept at a time."""

SLACK = 0.05
"""How far beyond its limit a worker is left to find out by itself, by an allocation that fails, before it is ended."""


class WorkerLost(Exception):
    """The worker gave no reply. `fields` are those of the record that this makes of its cell."""

    def __init__(self, status: str, phase: str, reason: str) -> None:
        super().__init__(reason)
        self.fields = {"status": status, "phase": phase, "reason": reason}


@dataclass
class _Process:
    popen: subprocess.Popen[bytes]
    requests: int
    replies: int
    log: Any
    limit_bytes: int | None
    buffer: bytes = b""
    ready: bool = False

    def send(self, message: dict[str, Any]) -> None:
        os.write(self.requests, (json.dumps(message) + "\n").encode())

    def lines(self, wait_s: float) -> list[dict[str, Any]] | None:
        """Messages that came within `wait_s`; None where the worker closed its pipe."""
        ready, _, _ = select.select([self.replies], [], [], wait_s)
        if not ready:
            return []
        chunk = os.read(self.replies, 1 << 20)
        if not chunk:
            return None
        *lines, self.buffer = (self.buffer + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def held_bytes(self) -> int:
        """Memory of its own that is resident; pages of files, such as libraries, can be dropped and do not count."""
        try:
            memory = psutil.Process(self.popen.pid).memory_info()
        except psutil.Error:
            return 0
        return memory.rss - getattr(memory, "shared", 0)

    def last_words(self, lines: int = 5) -> str:
        """The end of what it wrote to standard error and output, and where in Python a fatal signal hit it."""
        self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, self.log.tell() - 16384))
        text, _, fatal = self.log.read().decode(errors="replace").partition("Fatal Python error:")
        said = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("USDT:")][-lines:]
        stack = fatal.partition("Current thread")[2].splitlines()
        where = [line.strip() for line in stack if line.startswith("  File ")][:1]
        return printable(" | ".join(said + where))

    def end(self) -> int:
        """Kills it with all that it started; returns its exit code."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        code = self.popen.wait()
        for pipe in (self.requests, self.replies):
            os.close(pipe)
        self.log.close()
        return code


class LocalExecutor:
    """Carries requests to worker processes; of those that are timed, one at a time. A context manager: leaving it ends the
    workers.

    Which backends share one, `attnbench.backends.worker_of` says; beside the one for PyTorch's own,
    `MOST_WORKERS` are kept.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._processes: dict[str, _Process] = {}
        self._cache = tempfile.TemporaryDirectory(prefix="attnbench-")
        self.starts = 0
        self.starting_s = 0.0
        self.spent_s: Counter[str] = Counter()
        self.pulses_ms: list[float] = []

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._cache.cleanup()

    def stop(self) -> None:
        for key in list(self._processes):
            self._end(key)

    def end_others(self, backend: str) -> bool:
        """Ends the workers that do not serve `backend` and may hold what it needs of a GPU; False where there was none.

        The next request to one of them starts another.
        """
        own = backends.worker_of(backend)
        others = [key for key in self._processes if key != own and backends.keeps_memory(key)]
        for key in others:
            self._end(key)
        return bool(others)

    def ask(self, message: dict[str, Any], timeout_s: float, backend: str = "") -> dict[str, Any]:
        """The reply of the worker that serves `backend`.

        The time that a new worker takes to start does not count towards `timeout_s`; `starting_s` adds it up, and
        `spent_s` what workers say they spent their time on. `pulses_ms` are what they tell of the machine's speed.

        Raises:
            WorkerLost: it died, hung for longer than `timeout_s`, or held more memory than it may. It is gone then, and
                the next request starts another.
        """
        (reply,) = self.ask_each([(message, timeout_s, backend)])
        if isinstance(reply, WorkerLost):
            raise reply
        return reply

    def ask_each(self, requests: Sequence[tuple[dict[str, Any], float, str]]) -> list[dict[str, Any] | WorkerLost]:
        """What `ask` would return or raise for each of some requests, to as many workers, which start and work at once.

        For what is not timed. Each is a message, a time and a backend.
        """
        replies: list[dict[str, Any] | WorkerLost] = []
        for some in (requests[i : i + MOST_WORKERS] for i in range(0, len(requests), MOST_WORKERS)):
            keys = [backends.worker_of(backend) if backend else "" for *_, backend in some]
            for key in keys:
                self._launch(key)
            sent = [self._send(key, message) for key, (message, _, _) in zip(keys, some, strict=True)]
            for key, lost, (_, timeout_s, _) in zip(keys, sent, some, strict=True):
                replies.append(lost or self._reply(key, timeout_s))
        return replies

    def _send(self, key: str, message: dict[str, Any]) -> WorkerLost | None:
        """Sends a request once the worker is there to read it."""
        began = time.monotonic()
        try:
            self._await_start(key)
        except WorkerLost as lost:
            return lost
        finally:
            self.starting_s += time.monotonic() - began
        with suppress(BrokenPipeError):  # it died between two requests; waiting tells how
            self._processes[key].send(message)
        return None

    def _reply(self, key: str, timeout_s: float) -> dict[str, Any] | WorkerLost:
        try:
            reply = self._wait(key, timeout_s)
        except WorkerLost as lost:
            return lost
        self.spent_s.update(reply.get("spent_s", {}))
        self.pulses_ms += [reply["pulse_ms"]] if "pulse_ms" in reply else []
        if reply.get("sick"):
            self._end(key)
        return reply

    def _end(self, key: str) -> int:
        return self._processes.pop(key).end()

    def _launch(self, key: str) -> None:
        """Starts the process, unless it runs; the one used last is the last."""
        if (process := self._processes.pop(key, None)) is not None:
            self._processes[key] = process
            return
        own = [other for other in self._processes if other]
        if key and len(own) >= MOST_WORKERS:
            self._end(own[0])
        request = self._request
        limit = request.memory_limit_bytes
        if limit is None and request.device == "cpu":
            limit = default_memory_limit_bytes()
        request_read, request_write = os.pipe()
        reply_read, reply_write = os.pipe()
        settings = {
            "parent": os.getpid(),
            "requests": request_read,
            "replies": reply_write,
            "memory_limit_bytes": limit,
            "measuring": {
                "device": request.device,
                "seed": request.seed,
                "backward": request.backward,
                "protocol": request.protocol,
                "clock": request.clock,
                "warm_cache": request.warm_cache,
                "graph": request.graph,
            },
        }
        log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        popen = subprocess.Popen(
            # -P: the folder the user stands in must not shadow installed packages
            [sys.executable, "-P", "-m", "attnbench.worker", json.dumps(settings)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(request_read, reply_write),
            start_new_session=True,  # Ctrl-C reaches the runner alone, and a kill reaches compilers it started
            env=worker_environment(self._cache.name, request.device),
        )
        os.close(request_read)
        os.close(reply_write)
        self.starts += 1
        self._processes[key] = _Process(
            popen, request_write, reply_read, log, limit if request.device == "cpu" else None
        )

    def _await_start(self, key: str) -> None:
        """Raises `WorkerLost` where the process could not start."""
        if self._processes[key].ready:
            return
        reply = self._wait(key, START_TIMEOUT_S)
        if broken := reply.get("broken"):
            self._end(key)
            raise WorkerLost("crash", "setup", f"the worker process could not start: {broken}")
        self._processes[key].ready = True

    def _wait(self, key: str, timeout_s: float) -> dict[str, Any]:
        process = self._processes[key]
        deadline = time.monotonic() + timeout_s
        phase = "setup"
        while True:
            dead = process.popen.poll() is not None  # asked before reading: what it said last must not be missed
            lines = process.lines(POLL_S)
            for line in lines or ():
                phase = line.get("phase", phase)
                if "reply" in line:
                    return line["reply"]
            if lines is None or (dead and not lines):  # a child that it left may keep the pipe open
                raise self._lost(key, phase)
            if process.limit_bytes and process.held_bytes() > process.limit_bytes * (1 + SLACK):
                self._end(key)
                raise WorkerLost("oom", phase, f"held more than the limit of {process.limit_bytes >> 20} MiB")
            if time.monotonic() > deadline:
                self._end(key)
                raise WorkerLost("timeout", phase, "gave no result in time; see --timeout")

    def _lost(self, key: str, phase: str) -> WorkerLost:
        process = self._processes[key]
        with suppress(subprocess.TimeoutExpired):
            process.popen.wait(1)  # its pipe is closed; let it die its own death, whose signal is the reason
        words = process.last_words()
        code = self._end(key)
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        hint = " (perhaps the kernel's out-of-memory killer)" if how == "SIGKILL" else ""
        return WorkerLost(
            "crash", phase, f"the worker process ended with {how}{hint}" + (f": {words}" if words else "")
        )


def worker_environment(cache: str, device: str = "cpu") -> dict[str, str]:
    """The user's environment, less what would change precision behind a case's back, with what a worker measures in.

    Compilers keep their caches in a folder of the run, so that `compile_ms` is a compilation. Large CPU tensors lie in
    huge pages: with small ones, page faults take half the time of every backend that materialises its scores, and vary.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in OVERRIDES_OF_PRECISION}
    return inherited | {
        "ATTNBENCH_WORKER": "1",
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(cache, "inductor"),
        "TRITON_CACHE_DIR": os.path.join(cache, "triton"),
        "THP_MEM_ALLOC_ENABLE": "1",
        "JAX_PLATFORMS": "cpu" if device == "cpu" else "cuda,cpu",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # it would take three quarters of the GPU from the other workers
        "PYTHONUNBUFFERED": "1",
    }
