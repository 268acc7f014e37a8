"""The registry of backends, and what a backend is. Imports no framework: a backend's module is loaded where it runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from attnbench.backends.packages import PACKAGES, Package
from attnbench.backends.plugins import plugins, refused_plugins
from attnbench.backends.support import EVERYWHERE, Ask, Support
from attnbench.case import Case
from attnbench.errors import RequestError, unknown

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BUILTIN", "Ask", "Attention", "Backend", "Entry", "Support", "backend", "by_default", "check_name", "every",
    "keeps_memory", "load", "plugins", "refused_plugins", "source_of", "worker_of",
]  # fmt: skip

Attention = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""out(batch, heads, seq_len, d_model) = f(q, k, v), on tensors laid out (batch, heads, seq, head_dim), or as the backend's
`layout` says. A backend of another framework has its own arrays in their place."""


@dataclass(frozen=True)
class Entry:
    """Where a backend that ships is found, and when it runs.

    `module` is a module of this package, whose `BACKENDS` holds it. `package` is the entry of `PACKAGES` that it needs;
    such a backend is measured in a process that it shares with those of the same package alone. One that is `when_named`
    runs only where it is asked for by name: it compiles for minutes, or its speed is not known yet.
    """

    module: str
    package: str = ""
    when_named: bool = False


BUILTIN: dict[str, Entry] = {
    "naive": Entry("written_out"),
    "eager": Entry("written_out"),
    "compile": Entry("written_out"),
    "compile-max-autotune": Entry("written_out", when_named=True),
    "sdpa": Entry("sdpa"),
    "sdpa-math": Entry("sdpa"),
    "sdpa-flash": Entry("sdpa"),
    "sdpa-efficient": Entry("sdpa"),
    "sdpa-cudnn": Entry("sdpa"),
    "flex": Entry("flex"),
    "flex-causal-score": Entry("flex"),
    "attnbench": Entry("own"),
    "flash-attn-2": Entry("flash_attn", "flash_attn"),
    "flash-attn-2-deterministic": Entry("flash_attn", "flash_attn"),
    "flash-attn-3": Entry("flash_attn", "flash_attn_3"),
    "flash-attn-3-deterministic": Entry("flash_attn", "flash_attn_3"),
    "flash-attn-4": Entry("flash_attn", "flash_attn_4"),
    "flash-attn-4-deterministic": Entry("flash_attn", "flash_attn_4"),
    "xformers": Entry("packaged", "xformers"),
    "cudnn-frontend": Entry("cudnn_frontend", "cudnn"),
    "cudnn-frontend-deterministic": Entry("cudnn_frontend", "cudnn"),
    "transformer-engine": Entry("packaged", "transformer_engine"),
    "flashinfer": Entry("packaged", "flashinfer"),
    "jax-xla": Entry("jax", "jax"),
    "jax-cudnn": Entry("jax", "jax"),
    "jax-mosaic": Entry("jax", "jax"),
}
"""Every backend that ships with attnbench, in the order of tables."""


def _nothing(_: Any) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of attention.

    `build(case)` gives the callable to measure; compilation may happen there or in its first calls. `support` says, by type
    of device, which cases it takes; a device that is not there is not served. What data cannot tell, `lacks(device)` says of
    the machine and `objects(ask)` of a case, asked where the data has nothing against it; both give a reason or None.
    `package` is what it needs besides PyTorch.

    `layout` is that of the tensors it is called with and returns, one of `attnbench.measure.call.LAYOUTS`: inputs are laid
    out so before any time is taken. `framework` is `torch` or `jax`; of the latter, `build` gives an
    `attnbench.measure.jax_call.JaxAttention`. `memory_model` names the entry of `attnbench.forecast.MODELS` that
    forecasts its memory. `rehearsable` tells that every large allocation is a tensor of some ATen operation, so that
    `attnbench.measure.rehearsal` can find an out-of-memory without doing the arithmetic. `compiles` tells that the
    first call of each shape compiles. `own_kernels` are parts of names, in small letters, of which one at least stands in
    those of its forward's kernels, on CUDA or on CPU; where none does, something else ran. Empty: its kernels have no
    such name.
    """

    name: str
    about: str
    build: Callable[[Case], Attention]
    version: Callable[[], str]
    support: Mapping[str, Support] = field(default_factory=lambda: EVERYWHERE)
    package: Package | None = None
    lacks: Callable[[str], str | None] = _nothing
    objects: Callable[[Ask], str | None] = _nothing
    layout: str = "BHNd"
    framework: str = "torch"
    memory_model: str | None = None
    rehearsable: bool = False
    compiles: bool = False
    own_kernels: tuple[str, ...] = ()

    def unavailable(self, device: str) -> str | None:
        """Why it cannot run on this machine's device at all; None if it can. Imports its package to find out."""
        if device not in self.support:
            return "needs a CUDA GPU" if device == "cpu" else f"runs on {', '.join(self.support)} alone"
        absent = self.package and (self.package.absent() or self.package.broken())
        return absent or self.lacks(device)

    def refuses(self, ask: Ask) -> str | None:
        """Why it does not take a case on a device that it serves; None if it does."""
        return self.support[ask.device].reason_against(ask) or self.objects(ask)

    def padded_d_model(self, ask: Ask) -> int | None:
        """The head dimension that its kernels work on, where it is known to be another than the case's."""
        return self.support[ask.device].head_dims.padded(ask.case.d_model)


def every() -> tuple[str, ...]:
    """The backends that ship and those of installed packages, in the order of tables."""
    return (*BUILTIN, *plugins())


def by_default() -> list[str]:
    """The backends that `all` stands for: those that ship, except for `when_named`, and those of installed packages."""
    return [*(name for name, entry in BUILTIN.items() if not entry.when_named), *plugins()]


def check_name(name: str) -> None:
    """Raises `RequestError` for a name that can be no backend; says nothing of what only loading can tell."""
    if name in BUILTIN or name in _decorated or ":" in name or name in plugins():
        return
    if name in refused_plugins():
        raise RequestError(f"backend {name!r} {refused_plugins()[name]}")
    known = [*BUILTIN, *_decorated, *plugins(), "all", "FILE.py:function", "package.module:function"]
    raise unknown("backend", name, known)


def worker_of(name: str) -> str:
    """The process that a backend is measured in, by name; the empty one is for all that need PyTorch alone.

    A process is not what it was after code that one knows nothing of: each of a user's own backends has one to itself, and
    so has each package that is here.
    """
    if name not in BUILTIN:
        return name
    package = BUILTIN[name].package
    return f"package {package}" if package and not PACKAGES[package].absent() else ""


def keeps_memory(worker: str) -> bool:
    """Whether a process, as `worker_of` names it, may hold memory of a GPU that it has no use for; of unknown code it may."""
    package = PACKAGES.get(worker.removeprefix("package "))
    return package.keeps_memory if package else bool(worker)


def load(name: str, source: str | None = None) -> Backend:
    """The backend of that name, its module imported.

    `source` tells where a decorated function stands, as `FILE.py:function`. Without it a name with a colon is a user's
    function itself.

    Raises:
        RequestError: no such backend, or one of a user or an installed package that cannot be had; the message says why.
    """
    if not source and ":" not in name:
        check_name(name)
        if name in BUILTIN:
            return importlib.import_module(f"attnbench.backends.{BUILTIN[name].module}").BACKENDS[name]
    from attnbench.backends import user  # loads torch, as the modules above do

    return user.plugin_backend(plugins()[name]) if name in plugins() else user.user_backend(name, source or name)


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
        if not isinstance(name, str) or not name or _is_taken(name, where):
            raise RequestError(f"backend name {name!r} is taken or malformed; choose another, without a colon")
        if not file or not qualname or "<" in qualname:
            raise RequestError(
                f"backend {name!r} must be a function with a name at the top of a .py file: "
                "the process that measures it imports it from there"
            )
        _decorated[name] = where
        return function

    return register


def _is_taken(name: str, where: str) -> bool:
    reserved = name == "all" or ":" in name or name in BUILTIN or name in plugins()
    return reserved or _decorated.get(name, where) != where


def source_of(name: str) -> str | None:
    """Where a decorated function stands, as `FILE.py:function`; None for every other backend."""
    return _decorated.get(name)
