"""An out-of-memory found without doing the arithmetic.

On a CPU an attention that does not fit can compute for half a minute before the allocation that fails. A rehearsal runs
forward and backward with every operation reduced to the allocation of its result, in the real process under its real
limit: pages that nobody touches cost no time, yet count against the limit. If an allocation is refused here, it is
refused, at the same place, in earnest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from attnbench.measure.call import TorchCall


def rehearse(call: TorchCall, enter: Callable[[str], None], *, backward: bool) -> None:
    """Makes the allocations of a step, and none of its computations.

    `enter` is told the phase that begins. Raises what the allocator raises.
    """
    with _AllocateOnly():
        enter("forward")
        out = call.forward()
        if backward:
            enter("backward")
            call.backward(out)


class _AllocateOnly(TorchDispatchMode):
    """Gives each operation's result its storage and leaves it unwritten; views and in-place operations pass as they are."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(result.alias_info is not None for result in func._schema.returns):
            # A view costs nothing. An operation in place writes memory that exists; its value does not matter here.
            writes = any(result.alias_info.is_write for result in func._schema.returns if result.alias_info)
            return args[0] if writes else func(*args, **kwargs)
        shapes = func(*tree_map(_to_meta, list(args)), **{key: _to_meta(value) for key, value in kwargs.items()})
        device = next(
            (arg.device for arg in args if isinstance(arg, Tensor)), kwargs.get("device") or torch.device("cpu")
        )
        return tree_map(lambda result: _allocate(result, device), shapes)


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("meta")
    return value.to("meta") if isinstance(value, Tensor) else value


def _allocate(result: Any, device: torch.device) -> Any:
    if not isinstance(result, Tensor):
        return result
    return torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device=device)
