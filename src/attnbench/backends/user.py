"""A user's own function as a backend: `FILE.py:function`, `package.module:function`, or what an installed package offers."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import sys
from importlib.metadata import EntryPoint
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnbench.backends import Ask, Attention, Backend
from attnbench.backends.plugins import package_of
from attnbench.case import Case
from attnbench.errors import RequestError


def user_backend(name: str, where: str) -> Backend:
    """The function at `where` as a backend called `name`.

    It is called `f(q, k, v, causal=…, scale=…)`; one that takes no `causal` refuses causal cases, one that takes no
    `scale` is left to its own, which must be 1/√d_model.

    Raises:
        RequestError: the file, module or function is missing, raises at import, or cannot be called like that.
    """
    place, _, attribute = where.rpartition(":")
    module, code = _module(name, place)
    function: Any = module
    for part in attribute.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        known = sorted(key for key, value in vars(module).items() if inspect.isfunction(value))
        raise RequestError(
            f"backend {name!r}: {place} has no function {attribute!r}; it has: {', '.join(known) or 'none'}"
        )
    return _from_function(name, attribute, place, function, f"sha256 {code}")


def plugin_backend(plugin: EntryPoint) -> Backend:
    """What an installed package offers under a name: a function as a user's own, or a whole `Backend`.

    Raises:
        RequestError: it cannot be loaded, or is neither.
    """
    name, of = plugin.name, f"{plugin.value} of {package_of(plugin)}"
    place, _, attribute = plugin.value.partition(":")
    module, code = _module(name, place)
    try:
        offered: Any = attrgetter(attribute)(module)
    except AttributeError:
        raise RequestError(f"backend {name!r}: {of} is not there: {place} has no {attribute!r}") from None
    if isinstance(offered, Backend):
        if offered.name != name:
            raise RequestError(f"backend {name!r}: {of} calls itself {offered.name!r}; its two names must be the same")
        return offered
    if not callable(offered):
        raise RequestError(f"backend {name!r}: {of} is neither a function nor a Backend, but {type(offered).__name__}")
    return _from_function(name, plugin.value, package_of(plugin), offered, f"{package_of(plugin)}, sha256 {code}")


def _from_function(name: str, what: str, place: str, call: Any, version: str) -> Backend:
    """A function `f(q, k, v, *, causal, scale)` as a backend. Raises `RequestError` where it cannot be called so."""
    takes = _keywords(name, call)

    def build(case: Case) -> Attention:
        given = {"causal": case.causal, "scale": 1 / math.sqrt(case.d_model)}
        keywords = {key: value for key, value in given.items() if key in takes}

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return call(q, k, v, **keywords)  # whatever it returns: the caller checks it

        return attention

    def objects(ask: Ask) -> str | None:
        if ask.case.causal and "causal" not in takes:
            return f"{what} takes no keyword `causal`"
        return None

    return Backend(name, f"{what} of {place}", build, lambda: version, objects=objects)


def _module(name: str, place: str) -> tuple[ModuleType, str]:
    """The module at a path or a dotted name, and the first digits of its code's hash."""
    try:
        if place.endswith(".py"):
            path = Path(place).resolve()
            if not path.is_file():
                raise RequestError(f"backend {name!r}: there is no file {place}")
            spec = importlib.util.spec_from_file_location(f"attnbench_user_{path.stem}", path)
            assert spec is not None, "a .py file always has a spec"
            assert spec.loader is not None, "and a loader"
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            sys.path.insert(0, str(path.parent))  # so that it may import its neighbours, as when run as a script
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, os.getcwd())
            module = importlib.import_module(place)
    except RequestError:
        raise
    except BaseException as error:  # SystemExit too: whatever a user's module does at import is theirs to mend
        raise RequestError(
            f"backend {name!r}: importing {place} raised {type(error).__name__}: {_line(error)}"
        ) from None
    file = getattr(module, "__file__", None)
    code = Path(file).read_bytes() if file else b""
    return module, hashlib.sha256(code).hexdigest()[:12]


def _keywords(name: str, function: Any) -> set[str]:
    """Which of `causal` and `scale` a function takes, once it is sure that it takes q, k and v."""
    try:
        signature = inspect.signature(function.forward if isinstance(function, torch.nn.Module) else function)
    except (TypeError, ValueError):
        return {"causal", "scale"}  # built-in code that does not tell: it is called as documented
    parameters = signature.parameters
    any_keyword = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    takes = {key for key in ("causal", "scale") if key in parameters or any_keyword}
    try:
        signature.bind(None, None, None, **dict.fromkeys(takes))
    except TypeError as error:
        raise RequestError(
            f"backend {name!r} is called f(q, k, v, *, causal, scale), but its signature is {signature}: {error}"
        ) from None
    return takes


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or "(no message)"
