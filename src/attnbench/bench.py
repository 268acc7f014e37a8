"""Cells measured in this process: is it right, what does it hold, how long does it take, what ran.

Loads torch; lives in a worker process (`attnbench.worker`), where a cell can do no harm to the sweep.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from attnbench import backends
from attnbench.backends import Ask, Attention, Backend
from attnbench.backends.support import Capability
from attnbench.case import Case
from attnbench.errors import RequestError, words
from attnbench.inputs import Inputs, make_inputs
from attnbench.machine import physical_cores, torch_software
from attnbench.measure import ceilings, graphs, kernels
from attnbench.measure.accounts import Accounts
from attnbench.measure.call import Call, TorchCall, make_call, make_probe
from attnbench.measure.pulse import Pulse
from attnbench.measure.rehearsal import rehearse
from attnbench.measure.sampling import Sampling
from attnbench.measure.step import Step, take_step
from attnbench.measure.stopwatch import time_calls
from attnbench.measure.timing import WARMTH_MATTERS_S, Timer, time_as_seed
from attnbench.reference import Reference, compare, reference

TOO_LONG_TO_REPEAT_S = 2.0
"""A step on CPU that takes longer is timed once, in the pass that checks it; what a first step costs beyond a later one,
pages and code read in, is little beside that."""

HOST_MAY_MATTER_MS = 10.0
"""A step on CUDA that takes longer hides the host's part, which is not looked for."""


class Sick(Exception):
    """The process can measure nothing more: its CUDA context is lost."""


@dataclass(frozen=True)
class Settings:
    """How cells are measured, the same for all of a run."""

    device: str
    seed: int
    backward: bool
    protocol: str
    clock: str
    warm_cache: bool
    graph: bool


class Bench:
    """Measures cells on one device. Keeps, for the case in hand, the reference and every backend's callable.

    `tell` is told of each phase as it begins. `accounts` add up where the time goes: `start`, `compile`, `correctness`,
    `memory` and `timing`.
    """

    def __init__(self, settings: Settings, tell: Callable[[dict[str, Any]], None]) -> None:
        self.settings, self.tell = settings, tell
        self.device = torch.device("cuda:0" if settings.device == "cuda" else settings.device)
        self.backward = settings.backward
        self.backends: dict[str, Backend] = {}
        self.case: Case | None = None
        self.callables: dict[str, Attention] = {}
        self.reference: Reference | None = None
        self.near_cap: dict[str, bool | None] = {}
        self.step_s: dict[str, float] = {}
        self.phase = "setup"
        self.accounts = Accounts()
        torch.set_num_threads(physical_cores())
        if self.device.type == "cuda":
            if not torch.cuda.is_available() or self.device.index >= torch.cuda.device_count():
                raise RuntimeError(
                    f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA GPUs; try --device cpu"
                )
            torch.cuda.set_device(self.device)
            torch.zeros(1, device=self.device)
        else:
            square = torch.ones(512, 512)
            torch.mm(square, square)  # starts the threads, which a memory limit might forbid later
        self._forget_compiled()

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
            asks = [] if why_not else [Ask(case, self.device.type, self.backward, self.capability) for case in wanted]
            told.append({
                "name": name,
                "about": backend.about,
                "version": None if why_not else backend.version(),
                "unavailable": why_not,
                "memory_model": backend.memory_model,
                "compiles": backend.compiles,
                "refusals": [self._refusal(backend, ask) for ask in asks] or [why_not] * len(wanted),
                "padded_d_models": [backend.padded_d_model(ask) for ask in asks] or [None] * len(wanted),
            })  # fmt: skip
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return {"software": torch_software(), "backends": told, "threads": torch.get_num_threads()}

    def _refusal(self, backend: Backend, ask: Ask) -> str | None:
        if self.seeds_own and backend.framework != "torch":
            return "the first table's procedure is PyTorch's: sums over tensors, gradients that accumulate"
        return backend.refuses(ask)

    def calibrate(self) -> dict[str, Any]:
        """The device's ceilings, as `attnbench.limits.Ceilings` has them."""
        return {"ceilings": ceilings.measure(self.device)}

    def visit(
        self, case: dict[str, Any], backend: str, source: str | None, first: bool, last: bool, budget_s: float
    ) -> dict[str, Any]:
        """Measures a cell for about `budget_s`; on the `first` visit it is checked beforehand.

        Returns:
            `fields` of the record, `samples_ms` by pass, the `windows` they came from, and `done` where no further visit
            would add anything. On a CPU also its `pulse_ms` at the beginning.
        """
        self._enter("setup")
        self._start_clean()
        self._turn_to(Case(**case))
        assert self.case is not None
        pulse = {"pulse_ms": self.pulse()} if self.device.type == "cpu" else {}
        return pulse | self._visit(backend, source, first, last, budget_s)

    def _visit(self, backend: str, source: str | None, first: bool, last: bool, budget_s: float) -> dict[str, Any]:
        chosen = self._backend(backend, source)
        fields: dict[str, Any] = {"backend_version": chosen.version()}
        if self.device.type == "cuda" and not self.seeds_own:
            fields["clock_regime"] = self.settings.clock
            if chosen.framework == "torch":
                fields["event_overhead_ms"] = self.timer.overhead_ms
        if first:
            step = self._check(chosen, fields)
            if fields.get("status") == "incorrect":
                return {"fields": fields}
            if self.device.type == "cpu" and not self.seeds_own and step.seconds > TOO_LONG_TO_REPEAT_S:
                self.accounts.book("correctness", -step.seconds)
                self.accounts.book("timing", step.seconds)
                return _reply(fields, Sampling([step.window]), done=True)
            self.step_s[backend] = step.seconds
            del step
        self._enter("forward")
        with self.accounts.spending("timing"):
            call = self._call(chosen)
            sampling = self._sample(
                call, backend, budget_s, warm=first or self.step_s.get(backend, 0.0) > WARMTH_MATTERS_S
            )
            seen_ms: dict[str, float] = {}
            if self.device.type == "cuda":
                if first or sampling.near_cap:
                    seen_ms = self._seen_on_device(call, chosen, fields)
                if first and not self.seeds_own:
                    fields |= self._with_the_host(call, sampling)
                if last and self.settings.graph:
                    fields |= self._in_a_graph(call, budget_s)
        return _reply(fields, sampling, done=self.seeds_own) | {"seen_ms": seen_ms}

    def _sample(self, call: Call, backend: str, budget_s: float, *, warm: bool) -> Sampling:
        if self.seeds_own:
            assert isinstance(call, TorchCall), "others refuse"
            return time_as_seed(call, self.device, backward=self.backward, budget_s=budget_s)
        sampling = self.timer.time(call, budget_s, warm=warm, near_cap=self.near_cap.get(backend))
        self.near_cap[backend] = sampling.near_cap
        return sampling

    @cached_property
    def timer(self) -> Timer:
        how, overhead_ms = self.settings, 0.0
        if self.device.type == "cuda":
            with self.accounts.spending("start"):
                _, overhead_ms = kernels.empty_kernel(self.device)
        return Timer(self.device, self.backward, how.clock, how.warm_cache, overhead_ms)

    @cached_property
    def pulse(self) -> Pulse:
        return Pulse()

    @cached_property
    def capability(self) -> Capability | None:
        return torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else None

    @property
    def seeds_own(self) -> bool:
        return self.settings.protocol == "seed"

    # --- the first visit: is it right, and what does it hold? ---

    def _check(self, backend: Backend, fields: dict[str, Any]) -> Step:
        """Fills `fields` with errors, memory and kernels; returns the step they were seen in.

        The first step compiles, pages code in and is compared with the reference. If that was quick, memory is taken
        from a further step on fresh inputs; a step that takes longer than its compilation and all else is its own best
        witness, and is not repeated. On CPU the kernels are seen here, too.
        """
        assert self.case is not None
        on_cpu = self.device.type == "cpu"
        with self.accounts.spending("correctness"):
            _set_aside()
            if backend.rehearsable and on_cpu:
                call = self._call(backend)
                assert isinstance(call, TorchCall)
                rehearse(call, self._enter, backward=self.backward)
                del call
            self._enter("setup")
            if self.reference is None:
                self.reference = reference(self.case, self._inputs(), backward=self.backward)
            step = self._step(backend, watched=on_cpu and not backend.compiles)
            errors = compare(self.case, self.reference, step.out, step.grads)
            if step.compile_ms:
                _set_aside()
        fields |= {f"error_{name}": error for name, error in errors.by_name.items()}
        if errors.complaint:
            fields |= {"status": "incorrect", "reason": errors.complaint}
            return step
        if not on_cpu or step.seconds < TOO_LONG_TO_REPEAT_S / 4:
            with self.accounts.spending("memory"):
                first, step.out, step.grads = step, step.out.new_empty(0), None
                seen = step.seen or (self._step(backend, watched=True).seen if on_cpu else {})
                step = self._step(backend)
                step.seen, step.compile_ms = seen, first.compile_ms
                if backend.compiles:  # what a first call takes beyond a later one: generated code is loaded, and tuned
                    loading_s = max(0.0, first.seconds - step.seconds)
                    step.compile_ms += loading_s * 1e3
                    self.accounts.book("compile", loading_s)
                    self.accounts.book("correctness", -loading_s)
        fields |= step.memory | step.seen
        if step.compile_ms:
            fields["compile_ms"] = step.compile_ms
        if on_cpu:
            fields |= _fallback(backend, step.seen.get("kernels_forward", ()))
        return step

    def _step(self, backend: Backend, *, watched: bool = False) -> Step:
        return take_step(
            lambda: self._call(backend),
            self.device,
            make_probe(backend, self._attention(backend), self.device),
            self.accounts,
            self._enter,
            backward=self.backward,
            watched=watched,
        )

    # --- further looks at a call that has just been timed ---

    def _seen_on_device(self, call: Call, backend: Backend, fields: dict[str, Any]) -> dict[str, float]:
        """Each pass's time by the profiler and, of the same calls, by events; the kernels into `fields`.

        The clock is still where the samples left it. Near the power cap it is never quite at rest, and a look at every
        visit sees what the samples see.
        """
        near_cap = bool(self.near_cap.get(backend.name))
        seen = kernels.device_times(self.timer.stopwatch(call), near_cap=near_cap)
        fields |= {f"kernels_{name}": piece.names for name, piece in seen.items()}
        fields |= _fallback(backend, fields.get("kernels_forward", ()))
        times = {f"device_{name}_ms": piece.device_ms for name, piece in seen.items()}
        times |= {f"watched_{name}_ms": piece.events_ms for name, piece in seen.items()}
        return {name: ms for name, ms in times.items() if ms is not None}

    def _with_the_host(self, call: Call, sampling: Sampling) -> dict[str, Any]:
        """The time of a call among others back to back, where the host could matter to it."""
        if sum(statistics.median(taken) for taken in sampling.samples_ms.values()) > HOST_MAY_MATTER_MS:
            return {}
        fields = {"call_forward_ms": time_calls(call.forward, call.wait)}
        if self.backward:
            out = call.forward()
            fields["call_backward_ms"] = time_calls(lambda: call.backward(out), call.wait)
        return fields

    def _in_a_graph(self, call: Call, budget_s: float) -> dict[str, Any]:
        """The medians of the call's passes in CUDA graphs, or why there are none."""
        if not isinstance(call, TorchCall):
            return {"graph_reason": "its framework queues work on streams of its own, which PyTorch cannot capture"}
        try:
            graphed = graphs.capture(call, self.device, backward=self.backward)
            samples = self.timer.time(graphed, budget_s).samples_ms
        except (graphs.NotCapturable, torch.OutOfMemoryError) as reason:
            torch.cuda.synchronize(self.device)
            return {"graph_reason": words(reason)}
        return {
            f"graph_{name}_ms": statistics.median(samples[name]) for name in ("forward", "backward") if name in samples
        }

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
            self.near_cap.clear()
            self.step_s.clear()
            self._forget_compiled()
            self.clean()
        torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")

    def _forget_compiled(self) -> None:
        """Compiles anew for each shape, and below the number of shapes at which torch.compile gives up."""
        torch._dynamo.reset()
        gc.unfreeze()
        _set_aside()
        self.accounts.listen_to_the_compiler()

    def _call(self, backend: Backend) -> Call:
        return make_call(backend, self._attention(backend), self._inputs(), self.accounts.compiling)

    def _attention(self, backend: Backend) -> Attention:
        assert self.case is not None
        if backend.name not in self.callables:
            self.callables[backend.name] = backend.build(self.case)
        return self.callables[backend.name]

    def _inputs(self) -> Inputs:
        assert self.case is not None
        return make_inputs(self.case, self.device, self.settings.seed, requires_grad=self.backward)

    def _enter(self, phase: str) -> None:
        if phase != self.phase:
            self.phase = phase
            self.tell({"phase": phase})

    def give_back(self) -> None:
        """Leaves what PyTorch's allocator holds in reserve to the other workers on the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def clean(self) -> None:
        """Gives memory back. Raises `Sick` where the device no longer answers."""
        gc.collect()
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
            except Exception as error:
                raise Sick(words(error)) from None


def _set_aside() -> None:
    """Collects garbage, and keeps later collections from looking at what is left.

    torch has hundreds of thousands of objects, and backends and compilers bring as many; to look through them before each
    reading of the memory would take longer than most cells.
    """
    gc.collect()
    gc.freeze()


def _reply(fields: dict[str, Any], sampling: Sampling, *, done: bool = False) -> dict[str, Any]:
    return {
        "fields": fields,
        "samples_ms": sampling.samples_ms,
        "windows": [window.to_dict() for window in sampling.windows],
        "done": done,
    }


def _fallback(backend: Backend, kernels_forward: Sequence[str]) -> dict[str, Any]:
    """The tag of a backend none of whose own kernels was seen, though kernels were."""
    own = any(part in kernel.lower() for part in backend.own_kernels for kernel in kernels_forward)
    return {"tags": ["fallback"]} if kernels_forward and backend.own_kernels and not own else {}
