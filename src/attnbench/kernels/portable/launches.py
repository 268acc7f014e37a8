"""Compiled kernels found again by what makes calls alike."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, ClassVar

from torch import Tensor

Grid = tuple[int, int, int]
Rest = tuple[Grid, tuple[int, ...], dict[str, Any]]
"""Of a launch, what follows from the likeness of calls: the grid, numbers, and constants."""


def programs(rows: int, block: int) -> int:
    """How many it takes, each of which has so many rows."""
    return -(-rows // block)


class Launches:
    """The launches of calls that are alike: each kernel is compiled, and found again, once.

    Triton looks at every argument of every launch to find the compiled kernel, which takes longer than to launch it. All
    that it looks at follows from what makes calls alike: shapes, strides, dtypes and alignments of what they are given. So
    do all arguments but the tensors and the scale.
    """

    ALIGNMENT, MOST = 16, 4096
    _known: ClassVar[dict[Hashable, Launches]] = {}

    def __init__(self) -> None:
        self._compiled: dict[Hashable, tuple[Any, Any, Grid, tuple[Any, ...]]] = {}

    @classmethod
    def of(cls, share: int, inputs: tuple[Tensor, ...], causal: bool, scale: float, precision: str) -> Launches:
        """Those of calls on inputs like these, which are the `share`-th part of what the caller gave."""
        tensors = tuple((x.shape, x.stride(), x.data_ptr() % cls.ALIGNMENT) for x in inputs)
        alike = share, tensors, inputs[0].dtype, inputs[0].device, causal, scale < 0, precision
        if (found := cls._known.get(alike)) is None:
            if len(cls._known) >= cls.MOST:
                cls._known.clear()
            found = cls._known[alike] = cls()
        return found

    def __call__(self, step: Hashable, kernel: Any, arguments: tuple[Any, ...], rest: Callable[[], Rest]) -> None:
        """Launches a kernel; `step` tells this launch from the others of the call.

        `rest` is the grid and what follows from the inputs' likeness: numbers, which come after `arguments`, and constants:
        options of the compiler and, in any order, the last arguments of the kernel. What is compiled wants all three
        dimensions of the grid, where the kernel itself fills them up.
        """
        known = self._compiled.get(step)
        if known and known[0] is kernel:
            _, compiled, grid, others = known
            compiled[grid](*arguments, *others)
            return
        grid, numbers, constants = rest()
        if compiled := kernel[grid](*arguments, *numbers, **constants):  # the interpreter compiles nothing
            last = kernel.arg_names[len(arguments) + len(numbers) :]
            self._compiled[step] = kernel, compiled, grid, (*numbers, *(constants[name] for name in last))
