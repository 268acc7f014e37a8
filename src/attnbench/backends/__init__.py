"""The registry of backends, and what a backend is. Imports no framework: a backend's module is loaded where it runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from attnbench.case import Case
from attnbench.errors import RequestError, unknown

if TYPE_CHECKING:
    from torch import Tensor

Attention = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""out(batch, heads, seq_len, d_model) = f(q, k, v), on tensors laid out (batch, heads, seq, head_dim)."""

BUILTIN: dict[str, str] = {
    "naive": "attnbench.backends.written_out",
    "eager": "attnbench.backends.written_out",
    "compile": "attnbench.backends.written_out",
    "sdpa": "attnbench.backends.sdpa",
    "sdpa-math": "attnbench.backends.sdpa",
    "sdpa-flash": "attnbench.backends.sdpa",
    "sdpa-efficient": "attnbench.backends.sdpa",
    "sdpa-cudnn": "attnbench.backends.sdpa",
    "flex": "attnbench.backends.flex",
}
"""Every backend that ships with attnbench, in the order of tables, and the module whose `BACKENDS` holds it."""


@dataclass(frozen=True)
class Ask:
    """What a backend is asked to take: a case, on a device type (`cpu`, `cuda`), with or without its backward."""

    case: Case
    device: str
    backward: bool = True


def _never(_: object) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of attention.

    `build(case)` gives the callable to measure; compilation may happen there or in its first calls. `unavailable(device)`
    says why the backend cannot run on this machine's device at all, `refuses(ask)` why it does not take a case; both
    are None where nothing stands in the way. `memory_model` names the entry of `attnbench.forecast.MODELS` that
    forecasts its memory. `rehearsable` tells that every large allocation is a tensor of some ATen operation, so that
    `attnbench.measure.rehearsal` can find an out-of-memory without doing the arithmetic. `compiles` tells that the
    first call of each shape compiles. `own_kernels` are parts of names, in small letters, of which one at least stands in those of its
    forward's kernels, on CUDA or on CPU; where none does, something else ran. Empty: its kernels have no such name.
    """

    name: str
    about: str
    build: Callable[[Case], Attention]
    version: Callable[[], str]
    unavailable: Callable[[str], str | None] = _never
    refuses: Callable[[Ask], str | None] = _never
    memory_model: str | None = None
    rehearsable: bool = False
    compiles: bool = False
    own_kernels: tuple[str, ...] = ()


def check_name(name: str) -> None:
    """Raises `RequestError` for a name that can be no backend; says nothing of what only loading can tell."""
    if name not in BUILTIN and name not in _decorated and ":" not in name:
        raise unknown("backend", name, [*BUILTIN, *_decorated, "all", "FILE.py:function", "package.module:function"])


def load(name: str, source: str | None = None) -> Backend:
    """The backend of that name, its module imported.

    `source` tells where a decorated function stands, as `FILE.py:function`. Without it a name with a colon is a user's
    function itself.

    Raises:
        RequestError: no such backend, or a user's function that cannot be had; the message says why.
    """
    if source or ":" in name:
        from attnbench.backends.user import user_backend

        return user_backend(name, source or name)
    check_name(name)
    return importlib.import_module(BUILTIN[name]).BACKENDS[name]


# --- functions that users decorate ------------------------------------------------------------------------------------

_Function = TypeVar("_Function", bound=Callable[..., object])
_decorated: dict[str, str] = {}


def backend(name: str) -> Callable[[_Function], _Function]:
    """Makes a plain function `f(q, k, v, *, causal, scale)` a backend known to `attnbench.run` by `name`.

    Tensors are (batch, heads, seq, head_dim); autograd must reach q, k and v. The function is imported anew, by its
    file, in the process that measures it, so it must stand at the top of a file.

    Raises:
        RequestError: the name is taken or has a colon, or the function stands in no file or inside another function.
    """

    def register(function: _Function) -> _Function:
        module = sys.modules.get(getattr(function, "__module__", None) or "")
        file, qualname = getattr(module, "__file__", None), getattr(function, "__qualname__", None)
        where = f"{file}:{qualname}"
        taken = name in BUILTIN or _decorated.get(name, where) != where if isinstance(name, str) else True
        if taken or not name or name == "all" or ":" in name:
            raise RequestError(f"backend name {name!r} is taken or malformed; choose another, without a colon")
        if not file or not qualname or "<" in qualname:
            raise RequestError(
                f"backend {name!r} must be a function with a name at the top of a .py file: "
                "the process that measures it imports it from there"
            )
        _decorated[name] = where
        return function

    return register


def source_of(name: str) -> str | None:
    """Where a decorated function stands, as `FILE.py:function`; None for every other backend."""
    return _decorated.get(name)
