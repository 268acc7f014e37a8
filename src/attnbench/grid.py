"""A grid: the product of values that expands to cases, from a preset, a TOML file, the command line or Python."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, NewType

from attnbench.case import Case
from attnbench.errors import RequestError, unknown

Size = NewType("Size", int)
Dtype = NewType("Dtype", str)
Precision = NewType("Precision", str)
Flag = NewType("Flag", bool)
Name = NewType("Name", str)


@dataclass(frozen=True)
class Grid:
    """Values of each dimension; every combination is a case.

    Empty `kv_heads` means as many as `heads`, empty `kv_len` the same as `seq_len`. Sizes are counts; the meaning of
    each is `Case`'s.
    """

    batch: tuple[Size, ...] = (Size(8),)
    heads: tuple[Size, ...] = (Size(1),)
    kv_heads: tuple[Size, ...] = ()
    seq_len: tuple[Size, ...] = (Size(1024),)
    kv_len: tuple[Size, ...] = ()
    d_model: tuple[Size, ...] = (Size(64),)
    dtype: tuple[Dtype, ...] = (Dtype("float32"),)
    precision: tuple[Precision, ...] = (Precision("ieee"),)
    causal: tuple[Flag, ...] = (Flag(False),)

    def cases(self) -> list[Case]:
        """Every case once, seq_len varying fastest, then d_model.

        Raises:
            RequestError: some `kv_heads` do not divide some `heads`.
        """
        product = itertools.product(
            self.dtype, self.precision, self.causal, self.batch, self.heads, self.d_model, self.seq_len
        )
        found = [
            Case(
                batch,
                heads,
                kv_heads,
                seq_len,
                kv_len,
                d_model,
                dtype,
                precision if dtype == "float32" else "ieee",
                causal,
            )
            for dtype, precision, causal, batch, heads, d_model, seq_len in product
            for kv_heads in self.kv_heads or (heads,)
            for kv_len in self.kv_len or (seq_len,)
        ]
        return list(dict.fromkeys(found))  # tf32 folds into ieee where the dtype is not float32

    def to_dict(self) -> dict[str, Any]:
        return {name: list(values) for name, values in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "grid") -> Grid:
        """A grid from plain values; a lone value counts as a list of one.

        Raises:
            RequestError: every wrong value at once, each with its path below `where`.
        """
        from attnbench.structured import structure  # which takes a while to load

        grid = structure(cls, values, where)
        try:
            grid.cases()
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None
        return grid

    def but(
        self, changes: Mapping[str, Any], where: str = "grid", say_path: Callable[[str], str] = lambda path: path
    ) -> Grid:
        """This grid with some dimensions replaced. Raises `RequestError` as `from_dict` does."""
        from attnbench.structured import structure

        changed = structure(Grid, changes, where, say_path)
        grid = replace(self, **{name: getattr(changed, name) for name in changes})
        try:
            grid.cases()
        except RequestError as error:
            raise RequestError(f"{where}: {error}" if where else str(error)) from None
        return grid


@dataclass(frozen=True)
class Spec:
    """What a preset or a user's TOML file says: a grid, and the backends to run on it (none: all that can).

    `name` is what runs of it are called; a file's is the file's own if it gives none.
    """

    grid: Grid
    backends: tuple[Name, ...] = ()
    about: str = ""
    name: str = "grid"


def presets() -> dict[str, Spec]:
    """The presets that ship with attnbench, by name."""
    files = sorted(resources.files("attnbench.presets").iterdir(), key=lambda file: file.name)
    return {
        stem: _parse_spec(file.read_text("utf-8"), file.name, stem)
        for file in files
        if (stem := file.name.removesuffix(".toml")) != file.name
    }


def preset(name: str) -> Spec:
    """The preset of that name. Raises `RequestError` if there is none."""
    known = presets()
    if name not in known:
        raise unknown("preset", name, known)
    return known[name]


def read_spec(path: Path) -> Spec:
    """The spec in a TOML file.

    Raises:
        RequestError: the file is missing, not text or not TOML, or holds wrong values (all of them named).
    """
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise RequestError(f"spec file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"spec file {path} cannot be read: {error}") from None
    return _parse_spec(text, str(path), path.stem)


def _parse_spec(text: str, where: str, name: str) -> Spec:
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"{where} is not TOML: {error}") from None
    from attnbench.structured import structure

    spec = structure(Spec, {"name": name} | values, where)
    try:
        spec.grid.cases()
    except RequestError as error:
        raise RequestError(f"{where}: grid: {error}") from None
    return spec
