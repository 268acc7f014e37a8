"""What the fields of a dataclass may hold, by their annotations: for whatever comes back from a file, and for SQL."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from attnbench.errors import printable


@dataclass(frozen=True)
class Kind:
    """One of `text`, `integer`, `number`, `flag` and `object`; `many` for a list of them, `optional` where None is one."""

    name: str
    many: bool = False
    optional: bool = False


_KINDS: dict[Any, str] = {str: "text", Literal: "text", int: "integer", float: "number", bool: "flag"}

_HOLDS = {
    "text": lambda value: isinstance(value, str),
    "integer": lambda value: type(value) is int and abs(value) < 1 << 63,
    "number": lambda value: math.isfinite(value) if type(value) is float else _HOLDS["integer"](value),
    "flag": lambda value: type(value) is bool,
    "object": lambda value: isinstance(value, Mapping),
}


@cache
def kinds(cls: type) -> dict[str, Kind]:
    """The kind of each field."""
    return {name: _kind(hint) for name, hint in get_type_hints(cls).items()}


def _kind(hint: Any) -> Kind:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        (inner,) = (arg for arg in args if arg is not NoneType)
        return Kind(_kind(inner).name, _kind(inner).many, optional=True)
    if origin is tuple:
        return Kind(_kind(args[0]).name, many=True)
    return Kind(_KINDS.get(origin or hint, "object"))


def misfit(instance: Any) -> str | None:
    """What a field of a dataclass holds that is not of its kind, in words; None if nothing."""
    for name, kind in kinds(type(instance)).items():
        value, holds = getattr(instance, name), _HOLDS[kind.name]
        if value is None:
            fits = kind.optional
        elif kind.many:
            fits = isinstance(value, tuple) and all(map(holds, value))
        else:
            fits = holds(value)
        if not fits:
            wanted = f"a list of {kind.name}s" if kind.many else f"{'an' if kind.name[0] in 'io' else 'a'} {kind.name}"
            return f"{name} is {printable(repr(value))[:40]}, which is not {wanted}"
    return None


def read_json(text: str | bytes) -> Any:
    """JSON as the standard has it: no NaN, nothing infinite. Raises `ValueError` for anything else."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except UnicodeDecodeError:
        raise ValueError("not JSON: it is not text in UTF-8") from None
    except RecursionError:
        raise ValueError("not JSON of a run: it is nested too deeply") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number; what was not measured is null")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text) or value
