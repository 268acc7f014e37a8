"""From plain values to typed ones, with the path of every error: grids and specs out of files, options and Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, get_type_hints

import cattrs

from attnbench import backends
from attnbench.case import DTYPES, PRECISIONS
from attnbench.errors import RequestError, unknown
from attnbench.grid import Dtype, Flag, Grid, Name, Precision, Size, Spec


def structure(cls: type[Any], values: Any, where: str, say_path: Callable[[str], str] = lambda path: path) -> Any:
    """`values` as a `cls`.

    Raises:
        RequestError: one for all wrong values, each with its path below `where`, as `say_path` puts it.
    """
    try:
        return _converter.structure(values, cls)
    except (cattrs.BaseValidationError, cattrs.StructureHandlerNotFoundError) as error:
        found = (problem.rsplit(" @ ", 1) for problem in cattrs.transform_error(error, path="", format_exception=_say))
        problems = "; ".join(f"{say_path(path.lstrip('.') or 'file')}: {text}" for text, path in found)
        raise RequestError(f"{where}: {problems}" if where else problems) from None


def _say(error: BaseException, _type: Any) -> str:
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        known = [field.name for field in fields(error.cl)]
        return "; ".join(str(unknown("key", key, known)) for key in sorted(error.extra_fields))
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return str(error)


def _size(value: Any, _type: Any) -> Size:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is not a whole number above zero")
    return Size(value)


def _flag(value: Any, _type: Any) -> Flag:
    if type(value) is not bool:
        raise ValueError(f"{value!r} is neither true nor false")
    return Flag(value)


def _text(value: Any, _type: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


def _name(value: Any, _type: Any) -> Name:
    backends.check_name(_text(value, _type))
    return Name(value)


def _one_of(kind: str, known: tuple[str, ...]) -> Any:
    def hook(value: Any, _type: Any) -> str:
        if value not in known:
            raise unknown(kind, value, known) if isinstance(value, str) else ValueError(f"{value!r} is not text")
        return value

    return hook


MAY_BE_EMPTY = ("kv_heads", "kv_len", "backends")


def _tables(cls: type[Any]) -> Any:
    """Structures `cls` from a table, with a lone value taken for a list of one."""
    inner = cattrs.gen.make_dict_structure_fn(cls, _converter, _cattrs_forbid_extra_keys=True)
    lists = [name for name, hint in get_type_hints(cls).items() if getattr(hint, "__origin__", None) is tuple]

    def hook(values: Any, _type: Any) -> Any:
        if not isinstance(values, Mapping):
            raise ValueError(f"{values!r} is not a table")
        if empty := [key for key, value in values.items() if value in ([], ()) and key not in MAY_BE_EMPTY]:
            raise ValueError(f"{', '.join(empty)} is empty; leave it out for its default")
        listed = {
            key: [value] if key in lists and not isinstance(value, list | tuple) else value
            for key, value in values.items()
        }
        return inner(listed, cls)

    return hook


_converter = cattrs.Converter(detailed_validation=True)
_converter.register_structure_hook(Size, _size)
_converter.register_structure_hook(Flag, _flag)
_converter.register_structure_hook(str, _text)
_converter.register_structure_hook(Name, _name)
_converter.register_structure_hook(Dtype, _one_of("dtype", tuple(DTYPES)))
_converter.register_structure_hook(Precision, _one_of("precision", PRECISIONS))
for _cls in (Grid, Spec):
    _converter.register_structure_hook(_cls, _tables(_cls))
