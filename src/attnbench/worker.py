"""The process in which cells are measured: one request in, one reply out, over pipes of its own.

Requests and replies are lines of JSON. A request has a `task`, the name of a method of `Worker`; while one is at work,
lines `{"phase": …}` tell how far it is, so that the runner knows where a process was that died or hung. Standard output
and error belong to the backends, and cannot disturb the replies.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attnbench import backends
from attnbench.backends import Ask, Attention, Backend
from attnbench.case import Case
from attnbench.errors import RequestError, printable
from attnbench.inputs import make_inputs
from attnbench.machine import physical_cores, torch_software
from attnbench.measure import kernels
from attnbench.measure.call import BrokenPromise, Call, Grads
from attnbench.measure.memory import Ledger
from attnbench.measure.rehearsal import rehearse
from attnbench.measure.timing import Samples, time_as_seed, time_call
from attnbench.reference import Reference, compare, reference


def _unwatched(work: Callable[[], Any]) -> Any:
    return work()


class Sick(Exception):
    """The process can measure nothing more: its CUDA context is lost."""


@dataclass
class Step:
    """One forward and backward, and what was seen of it."""

    out: torch.Tensor
    grads: Grads | None
    memory: dict[str, float]
    samples: Samples
    compile_ms: float
    seen: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return (sum(self.samples.forward) + sum(self.samples.backward)) / 1e3


TOO_LONG_TO_REPEAT_S = 2.0
"""A step on CPU that takes longer is timed once, in the pass that checks it; what a first step costs beyond a later one,
pages and code read in, is little beside that."""


class Worker:
    """Measures cells on one device. Keeps, for the case in hand, the reference and every backend's callable."""

    def __init__(
        self, device: str, *, seed: int, backward: bool, protocol: str, tell: Callable[[dict[str, Any]], None]
    ) -> None:
        self.device = torch.device("cuda:0" if device == "cuda" else device)
        self.seed, self.backward, self.protocol, self.tell = seed, backward, protocol, tell
        self.backends: dict[str, Backend] = {}
        self.case: Case | None = None
        self.callables: dict[str, Attention] = {}
        self.reference: Reference | None = None
        self.phase = "setup"
        self.compile_s = 0.0
        torch.set_num_threads(physical_cores())
        if self.device.type == "cuda":
            if not torch.cuda.is_available() or self.device.index >= torch.cuda.device_count():
                raise RuntimeError(
                    f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA GPUs; try --device cpu"
                )
            torch.cuda.set_device(self.device)
            torch.zeros(1, device=self.device)
        else:
            torch.ones(512, 512) @ torch.ones(512, 512)  # starts the threads, which a memory limit might forbid later
        self._forget_compiled()
        gc.collect()
        gc.freeze()  # torch's hundred thousands of objects stay: later collections need not look at them

    # --- tasks ---

    def describe(self, names: Sequence[str], sources: dict[str, str], cases: list[dict[str, Any]]) -> dict[str, Any]:
        """What this device is, which backends are available and which of the cases each refuses.

        A backend that cannot be loaded has an `error`: the request for it was wrong.
        """
        wanted = [Case(**case) for case in cases]
        told = []
        for name in names:
            try:
                backend = self._backend(name, sources.get(name))
            except RequestError as error:
                told.append({"name": name, "error": str(error)})
                continue
            why_not = backend.unavailable(self.device.type)
            asks = [Ask(case, self.device.type, self.backward) for case in wanted]
            told.append({
                "name": name,
                "about": backend.about,
                "version": None if why_not else backend.version(),
                "unavailable": why_not,
                "memory_model": backend.memory_model,
                "compiles": backend.compiles,
                "refusals": [why_not or backend.refuses(ask) for ask in asks],
            })  # fmt: skip
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return {"software": torch_software(), "backends": told, "threads": torch.get_num_threads()}

    def visit(
        self, case: dict[str, Any], backend: str, source: str | None, first: bool, budget_s: float
    ) -> dict[str, Any]:
        """Measures a cell for about `budget_s`; on the `first` visit it is checked beforehand.

        Returns:
            `fields` of the record, `samples_ms` by pass, and `done` where no further visit would add anything.
        """
        self._enter("setup")
        self._start_clean()
        self._turn_to(Case(**case))
        assert self.case is not None
        chosen = self._backend(backend, source)
        fields: dict[str, Any] = {"backend_version": chosen.version()}
        if first:
            step = self._check(chosen, fields)
            if fields.get("status") == "incorrect":
                return {"fields": fields}
            if self.device.type == "cpu" and self.protocol == "default" and step.seconds > TOO_LONG_TO_REPEAT_S:
                return {"fields": fields, "samples_ms": step.samples.passes, "done": True}
            del step
        self._enter("forward")
        timer = time_as_seed if self.protocol == "seed" else time_call
        samples = timer(self._call(chosen), self.device, backward=self.backward, budget_s=budget_s, warm=first)
        fields |= samples.state
        done = samples.settled or self.protocol == "seed"
        return {"fields": fields, "samples_ms": samples.passes, "done": done}

    # --- the first visit: is it right, and what does it hold? ---

    def _check(self, backend: Backend, fields: dict[str, Any]) -> Step:
        """Fills `fields` with errors, memory and kernels; returns the step they were seen in.

        The first step compiles, pages code in and is compared with the reference. If that was quick, memory and kernels
        are taken from further steps on fresh inputs; a step that takes longer than its compilation and all else is its
        own best witness, and is not repeated.
        """
        assert self.case is not None
        call = self._call(backend)
        on_cpu = self.device.type == "cpu"
        if backend.rehearsable and on_cpu:
            rehearse(call, self._enter, backward=self.backward)
        self._enter("setup")
        if self.reference is None:
            self.reference = reference(self.case, call.inputs, backward=self.backward)
        del call
        step = self._step(backend, watched=on_cpu and not backend.compiles)
        errors = compare(self.case, self.reference, step.out, step.grads)
        fields |= {f"error_{name}": error for name, error in errors.by_name.items()}
        if errors.complaint:
            fields |= {"status": "incorrect", "reason": errors.complaint}
            return step
        if step.compile_ms:
            fields["compile_ms"] = step.compile_ms
        if not on_cpu or step.seconds < TOO_LONG_TO_REPEAT_S / 4:
            step.out, step.grads = step.out.new_empty(0), None
            seen = step.seen or self._step(backend, watched=True).seen
            step = self._step(backend)
            step.seen = seen
        fields |= step.memory | step.seen
        return step

    def _step(self, backend: Backend, *, watched: bool = False) -> Step:
        """A forward and backward on fresh inputs, under the eyes of the memory ledger and, if `watched`, the profiler."""
        assert self.case is not None
        ledger = Ledger(self.device)
        call = self._call(backend)
        ledger.after_inputs()
        seen: dict[str, Any] = {}
        samples = Samples()
        compiled_before = self.compile_s

        def timed(name: str, work: Callable[[], Any]) -> tuple[Any, float]:
            self._enter(name)
            compiled, start = self.compile_s, time.perf_counter()
            result = work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return result, (time.perf_counter() - start - (self.compile_s - compiled)) * 1e3

        grads = None
        with kernels.Watch(self.device) if watched else nullcontext(_unwatched) as watch:
            out, forward_ms = watch(lambda: timed("forward", call.forward))
            out = call.check_output(out)
            call.check_inputs()
            ledger.after_forward()
            samples.forward.append(forward_ms)
            if self.backward:
                grads, backward_ms = watch(lambda: timed("backward", lambda: call.backward(out)))
                ledger.after_backward()
                samples.backward.append(backward_ms)
                samples.forward_backward.append(forward_ms + backward_ms)
        if isinstance(watch, kernels.Watch):
            for name, piece in zip(("forward", "backward"), watch.seen(), strict=False):
                seen |= {f"kernels_{name}": piece.names, f"device_{name}_ms": piece.device_ms}
        self._enter("setup")
        return Step(out.detach(), grads, ledger.fields, samples, (self.compile_s - compiled_before) * 1e3, seen)

    # --- what is kept from visit to visit ---

    def _backend(self, name: str, source: str | None) -> Backend:
        if name not in self.backends:
            self.backends[name] = backends.load(name, source)
        return self.backends[name]

    def _start_clean(self) -> None:
        """Undoes what a backend may have set for the whole process."""
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        if torch.get_num_threads() != physical_cores():
            torch.set_num_threads(physical_cores())

    def _turn_to(self, case: Case) -> None:
        """Drops what belonged to another case, compiled code included, and sets the precision of this one."""
        if case != self.case:
            self.case, self.reference = case, None
            self.callables.clear()
            self._forget_compiled()
            self.clean()
        torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")

    def _forget_compiled(self) -> None:
        """Compiles anew for each shape, and below the number of shapes at which torch.compile gives up."""
        torch._dynamo.reset()
        handler = torch._dynamo.callback.callback_handler
        handler.start_callbacks[:] = [lambda _: setattr(self, "compile_s", self.compile_s - time.perf_counter())]
        handler.end_callbacks[:] = [lambda _: setattr(self, "compile_s", self.compile_s + time.perf_counter())]

    def _call(self, backend: Backend) -> Call:
        assert self.case is not None
        if backend.name not in self.callables:
            self.callables[backend.name] = backend.build(self.case)
        return Call(
            self.callables[backend.name], make_inputs(self.case, self.device, self.seed, requires_grad=self.backward)
        )

    def _enter(self, phase: str) -> None:
        if phase != self.phase:
            self.phase = phase
            self.tell({"phase": phase})

    def clean(self) -> None:
        """Gives memory back. Raises `Sick` where the device no longer answers."""
        gc.collect()
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
            except Exception as error:
                raise Sick(_words(error)) from None


# --- replies ----------------------------------------------------------------------------------------------------------

OUT_OF_MEMORY = (
    *("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "alloc_failed"),
    "storage size calculation overflowed",
)


def failure(error: BaseException, phase: str) -> dict[str, Any]:
    """The fields of a record that an exception makes of its cell."""
    text = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in text for words in OUT_OF_MEMORY):
        return {"status": "oom", "phase": phase, "reason": _words(error)}
    kind = "" if isinstance(error, BrokenPromise) else f"{type(error).__name__}: "
    return {"status": "error", "phase": phase, "reason": kind + _words(error)}


def _words(error: BaseException, most: int = 300) -> str:
    """The message up to its stack traces and hints, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    head = printable(" ".join(lines[:3])) or type(error).__name__
    return head if len(head) <= most else head[: most - 1] + "…"


def answer(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    """Carries out one request. Raises `Sick` where the process is of no further use."""
    task = {"describe": worker.describe, "visit": worker.visit}[request.pop("task")]
    try:
        reply = task(**request)
    except Exception as error:
        reply = {"fields": failure(error, worker.phase)}
        # Frames of the traceback hold tensors; after an out-of-memory they must go before anything else can run.
        error.__traceback__ = error.__context__ = error.__cause__ = None
        del error
        worker.clean()
    return reply


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
            worker = Worker(
                settings["device"],
                seed=settings["seed"],
                backward=settings["backward"],
                protocol=settings["protocol"],
                tell=tell,
            )
            if limit := settings["memory_limit_bytes"]:
                if worker.device.type == "cuda":
                    total = torch.cuda.get_device_properties(worker.device).total_memory
                    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), worker.device)
                elif sys.platform == "linux":
                    limit_memory(limit)
        except Exception as error:
            tell({"reply": {"broken": f"{type(error).__name__}: {_words(error)}"}})
            return
        tell({"reply": {"ready": True}})
        for line in requests:
            try:
                tell({"reply": answer(worker, json.loads(line))})
            except Sick as error:
                lost = {"status": "crash", "phase": worker.phase, "reason": f"CUDA context lost: {error}"}
                tell({"reply": {"fields": lost, "sick": True}})
                return


if __name__ == "__main__":
    main()
