"""One forward and backward on fresh inputs, and all that can be seen of it: memory, time, kernels, compilation."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from attnbench.measure.accounts import Accounts
from attnbench.measure.call import Call, Grads
from attnbench.measure.kernels import Watch
from attnbench.measure.memory import Ledger, Probe
from attnbench.measure.sampling import Window


@dataclass
class Step:
    """One forward and backward, and what was seen of it."""

    out: torch.Tensor
    grads: Grads | None
    memory: dict[str, float]
    window: Window
    compile_ms: float
    seen: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(sum(self.window.samples_ms.get(name, ())) for name in ("forward", "backward")) / 1e3


def _unwatched(work: Callable[[], Any]) -> Any:
    return work()


def take_step(
    make_call: Callable[[], Call],
    device: torch.device,
    probe: Probe | None,
    accounts: Accounts,
    enter: Callable[[str], None],
    *,
    backward: bool,
    watched: bool = False,
) -> Step:
    """A step of the call that `make_call` gives, under the eyes of a ledger of what `probe` reads and, if `watched`, the profiler.

    `enter` is told the phase that begins. Times are without what was compiled meanwhile.

    Raises:
        BrokenPromise: what the call returned is no attention output, or it wrote to its inputs.
    """
    ledger = Ledger(probe)
    call = make_call()
    ledger.after_inputs()
    compiled_before = accounts.compile_s

    def timed(name: str, work: Callable[[], Any]) -> tuple[Any, float]:
        enter(name)
        compiled, start = accounts.compile_s, time.perf_counter()
        result = work()
        call.wait(result)
        return result, (time.perf_counter() - start - (accounts.compile_s - compiled)) * 1e3

    grads = None
    with Watch(device) if watched else nullcontext(_unwatched) as watch:
        result, forward_ms = watch(lambda: timed("forward", call.forward))
        out = call.output(result)
        call.check_inputs()
        ledger.after_forward()
        window = Window({"forward": [forward_ms]})
        if backward:
            found, backward_ms = watch(lambda: timed("backward", lambda: call.backward(result)))
            ledger.after_backward()
            grads = call.gradients(found)
            window.samples_ms |= {"backward": [backward_ms], "forward_backward": [forward_ms + backward_ms]}
    seen: dict[str, Any] = {}
    if isinstance(watch, Watch):
        pieces = zip(("forward", "backward"), watch.seen(), strict=False)
        seen = {f"kernels_{name}": piece.names for name, piece in pieces}
    enter("setup")
    return Step(out.detach(), grads, ledger.fields, window, (accounts.compile_s - compiled_before) * 1e3, seen)
