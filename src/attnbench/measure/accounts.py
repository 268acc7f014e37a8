"""Where the time of a worker goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Accounts:
    """Seconds by what they were spent on; compilation, whenever it happens, has an account of its own.

    `compile_s` adds up what torch.compile reports, the lazily compiled backward included, and blocks that were said to
    be `compiling`.
    """

    def __init__(self) -> None:
        self.spent_s: dict[str, float] = {}
        self.compile_s = 0.0

    def listen_to_the_compiler(self) -> None:
        """To be called again after `torch._dynamo.reset`."""
        handler = torch._dynamo.callback.callback_handler
        handler.start_callbacks[:] = [lambda _: setattr(self, "compile_s", self.compile_s - time.perf_counter())]
        handler.end_callbacks[:] = [lambda _: setattr(self, "compile_s", self.compile_s + time.perf_counter())]

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Counts the time of a block as compilation, by a compiler that is not PyTorch's."""
        self.compile_s -= time.perf_counter()
        try:
            yield
        finally:
            self.compile_s += time.perf_counter()

    @contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Books the time of a block under `what`, less what was compiled meanwhile."""
        began, compiled = time.perf_counter(), self.compile_s
        try:
            yield
        finally:
            compiled = self.compile_s - compiled
            self.book("compile", compiled)
            self.book(what, time.perf_counter() - began - compiled)

    def book(self, what: str, seconds: float) -> None:
        self.spent_s[what] = self.spent_s.get(what, 0.0) + seconds
