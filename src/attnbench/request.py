"""All that was asked of a run: what run.json keeps and `--resume` compares."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from attnbench import backends
from attnbench.case import Case
from attnbench.errors import RequestError, unknown
from attnbench.grid import Grid

PROTOCOLS = ("default", "seed")
PASSES = ("forward", "backward")
CLOCKS = ("sustained", "burst")
DEFAULT_BUDGET_S = {"cpu": 1.0, "cuda": 0.3}
DEFAULT_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Request:
    """A sweep: which grid, on which backends and device, measured how.

    `backends` are names; `sources` says of decorated functions among them where they stand (`FILE.py:function`),
    and `named` whether the user chose them. `budget_s` is the time to spend on samples of one cell, `timeout_s` the time
    after which a cell is given up.
    `memory_limit_bytes` is what a worker may hold, on CPU in all and on CUDA on the device; None leaves a margin on CPU.
    `clock` is the regime of a GPU's clocks (`attnbench.measure.timing.Timer`), `warm_cache` leaves its L2 cache alone
    between calls, and `graph` measures each case inside a CUDA graph as well.
    `shard` (i, n) takes the i-th of n parts of the cases, from 1.
    """

    grid: Grid
    name: str
    backends: tuple[str, ...]
    sources: dict[str, str]
    device: str
    named: bool = True
    passes: str = "backward"
    protocol: str = "default"
    clock: str = "sustained"
    warm_cache: bool = False
    graph: bool = False
    budget_s: float = 1.0
    timeout_s: float = DEFAULT_TIMEOUT_S
    memory_limit_bytes: int | None = None
    seed: int = 0
    shard: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if self.passes not in PASSES:
            raise RequestError(f"pass {self.passes!r} is not known; there are: {', '.join(PASSES)}")
        if self.protocol not in PROTOCOLS:
            raise RequestError(f"protocol {self.protocol!r} is not known; there are: {', '.join(PROTOCOLS)}")
        if self.clock not in CLOCKS:
            raise RequestError(f"clock {self.clock!r} is not known; there are: {', '.join(CLOCKS)}")
        if self.device == "cpu" and (self.graph or self.warm_cache or self.clock != "sustained"):
            raise RequestError("--graph, --warm-cache and --clock burst are about a GPU, and the device is cpu")
        if self.protocol == "seed" and (self.graph or self.warm_cache or self.clock != "sustained"):
            raise RequestError("--graph, --warm-cache and --clock are no part of the seed's protocol")
        for what, seconds in (("budget", self.budget_s), ("timeout", self.timeout_s)):
            if not 0 < seconds < float("inf"):
                raise RequestError(f"{what} = {seconds} is not a number of seconds above zero")
        if self.memory_limit_bytes is not None and self.memory_limit_bytes < 1:
            raise RequestError(f"memory limit = {self.memory_limit_bytes} bytes is not above zero")
        if not self.backends:
            raise RequestError("no backend was asked for; name one, or leave it out for all that can run")
        for name in self.backends:
            if name not in self.sources:
                backends.check_name(name)
        index, count = self.shard
        if not 1 <= index <= count:
            raise RequestError(f"shard {index}/{count} does not exist; of 4 shards the first is 1/4 and the last 4/4")

    @property
    def backward(self) -> bool:
        return self.passes == "backward"

    def cases(self) -> list[Case]:
        """The cases of this shard, each once."""
        index, count = self.shard
        return self.grid.cases()[index - 1 :: count]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"grid": self.grid.to_dict(), "backends": list(self.backends), "shard": list(self.shard)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Request:
        """A request read back. Raises `RequestError` where it is none."""
        try:
            given = {field.name: values[field.name] for field in fields(cls)}
        except (KeyError, TypeError):
            raise RequestError("the run's request is incomplete: run.json is damaged or from another version") from None
        given |= {
            "grid": Grid.from_dict(given["grid"]),
            "backends": tuple(given["backends"]),
            "shard": tuple(given["shard"]),
        }
        return cls(**given)

    def difference(self, other: Request) -> str | None:
        """In what another request differs, in words; None if in nothing. The name a grid was called by does not count."""
        mine, theirs = self.to_dict(), other.to_dict()
        parts = [
            f"{key} was {mine[key]!r} and is {theirs[key]!r}"
            for key in mine
            if key != "name" and mine[key] != theirs[key]
        ]
        return "; ".join(parts) or None


def expand_backends(names: Sequence[str]) -> tuple[str, ...]:
    """`names` with `all` written out (`attnbench.backends.by_default`), each once; none at all stands for `all`.

    Raises:
        RequestError: a name that can be no backend.
    """
    found: list[str] = []
    for name in names or ("all",):
        if name != "all":
            backends.check_name(name)
        found += backends.by_default() if name == "all" else [name]
    return tuple(dict.fromkeys(found))


def parse_device(text: str) -> str:
    """`cpu`, `cuda` or `cuda:N`. Raises `RequestError` for anything else."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise RequestError(f"device {text!r} is not known; there are: cpu, cuda, cuda:N")
    return text


def parse_case(text: str) -> Case:
    """A case from `d_model=16,dtype=float32`; what is not given is as in `attnbench.grid.Grid`, one key head for each head.

    Raises:
        RequestError: something is no dimension of a case, or its value cannot be.
    """
    (usual,) = Grid().cases()
    known = usual.to_dict()
    given: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise RequestError(f"case {text!r}: {part.strip()!r} is not of the form NAME=VALUE, such as d_model=64")
        if name not in known:
            raise RequestError(f"case {text!r}: {unknown('dimension', name, known)}")
        if name in given:
            raise RequestError(f"case {text!r} gives {name} twice")
        given[name] = _value_like(known[name], name, value, text)
    own = {"kv_heads": given.get("heads", usual.heads), "kv_len": given.get("seq_len", usual.seq_len)}
    if given.get("dtype", usual.dtype) != "float32":
        given["precision"] = "ieee"
    try:
        return Case(**known | own | given)
    except RequestError as error:
        raise RequestError(f"case {text!r}: {error}") from None


def _value_like(example: Any, name: str, value: str, text: str) -> Any:
    """`value` as what `example` is: a flag, a whole number or a name."""
    if isinstance(example, bool):
        if value.lower() not in ("true", "false"):
            raise RequestError(f"case {text!r}: {name} = {value} is neither true nor false")
        return value.lower() == "true"
    if isinstance(example, int):
        if not re.fullmatch(r"\d{1,9}", value):
            raise RequestError(f"case {text!r}: {name} = {value} is not a whole number above zero")
        return int(value)
    return value


_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "kB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(text: str) -> int:
    """A size such as `8GiB` or `500MB`, in bytes. Raises `RequestError` for anything else."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([kKMG]?i?B?)\s*", text)
    unit = match and {"kib": "KiB", "kb": "kB"}.get(match[2].lower(), match[2])
    if not match or unit not in _UNITS or float(match[1]) <= 0:
        raise RequestError(f"memory limit {text!r} is not a size; write it like 8GiB or 500MB")
    return int(float(match[1]) * _UNITS[unit])


def parse_shard(text: str) -> tuple[int, int]:
    """`I/N`. Raises `RequestError` for anything else."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not match:
        raise RequestError(f"shard {text!r} is not of the form I/N, such as 1/4")
    return int(match[1]), int(match[2])
