"""Options that several commands share, and the request that they make."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from attnbench import api
from attnbench.analysis.select import Selection, parse_columns, parse_pivot
from attnbench.case import DTYPES, PRECISIONS
from attnbench.errors import RequestError
from attnbench.grid import Spec, preset, read_spec
from attnbench.request import (
    CLOCKS,
    DEFAULT_TIMEOUT_S,
    PASSES,
    PROTOCOLS,
    Request,
    parse_bytes,
    parse_shard,
)

_LISTS = {
    "d_model": "Head dimensions, such as 16,32.",
    "seq_len": "Numbers of queries.",
    "batch": "Batch sizes.",
    "heads": "Query heads.",
    "kv_heads": "Key heads; fewer than --heads is grouped-query attention. Default: as many as heads.",
    "kv_len": "Numbers of keys. Default: the same as seq_len.",
    "dtype": f"Element types: {', '.join(DTYPES)}.",
    "precision": f"Products of float32: {', '.join(PRECISIONS)}.",
}


Command = TypeVar("Command", bound=Callable[..., Any])


def grid_options(command: Command) -> Command:
    """What to measure: a preset or a file, with any dimension replaced."""
    options = [
        click.option(
            "--preset", "preset_name", metavar="NAME", help="A grid that ships with attnbench; default: seed."
        ),
        click.option("--spec", type=click.Path(path_type=Path), metavar="FILE.toml", help="A grid of your own."),
        *(
            click.option(f"--{name.replace('_', '-')}", name, metavar="LIST", help=text)
            for name, text in _LISTS.items()
        ),
        click.option("--causal/--no-causal", "causal", default=None, help="With or without the causal mask."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def measuring_options(command: Command) -> Command:
    """How to measure it."""
    options = [
        click.option("--backend", "backend", multiple=True, metavar="NAME", help="A backend's name, all, FILE.py:function or package.module:function; repeatable. Default: all that can run."),
        click.option("--pass", "passes", metavar="|".join(PASSES), help="Forward alone, or backward too (default)."),
        click.option("--device", metavar="cpu|cuda|cuda:N", help="Default: the best one here."),
        click.option("--budget", type=float, metavar="SECONDS", help="Time to spend on samples of one cell; on a CPU, in rounds of 0.1 s."),
        click.option("--timeout", type=float, metavar="SECONDS", help=f"Time after which a cell is given up; default: {DEFAULT_TIMEOUT_S:.0f}."),
        click.option("--memory-limit", metavar="SIZE", help="What a worker may hold, such as 8GiB. Default on CPU: what is available, less a margin."),
        click.option("--protocol", metavar="|".join(PROTOCOLS), help="How to time; seed repeats the first table's procedure."),
        click.option("--clock", metavar="|".join(CLOCKS), help="Regime of a GPU's clocks: settled under the load (default), or a few calls after a rest."),
        click.option("--warm-cache", is_flag=True, default=None, help="Leave a GPU's L2 cache as the call before left it."),
        click.option("--graph", is_flag=True, default=None, help="Measure inside a CUDA graph as well."),
        click.option("--seed", type=int, metavar="N", help="Seed of the random inputs; default: 0."),
        click.option("--shard", metavar="I/N", help="Only the I-th of N parts of the cases."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def selecting_options(command: Command) -> Command:
    """Which part of a run, and as which table."""
    options = [
        click.option("--where", multiple=True, metavar="CONDITION", help="Only records for which this SQL condition holds, such as 'd_model = 64'; repeatable."),
        click.option("--columns", metavar="LIST", help="One table of these columns, such as backend,seq_len,forward_ms."),
        click.option("--pivot", metavar="ROWSxCOLSxVALUE", help="One table of a value by two others, such as seq_lenxd_modelxforward_ms."),
        click.option("--baseline", metavar="BACKEND", help="Add the speed-up of every record over this backend's."),
        click.option("--sort", metavar="COLUMN", help="Sort by a column; -COLUMN for the greatest first."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def selection_from(options: Mapping[str, Any]) -> Selection:
    """What the options above ask for. Raises `RequestError` where they cannot be read."""
    return Selection(
        options["where"],
        parse_columns(options["columns"]),
        parse_pivot(options["pivot"]),
        options["baseline"],
        options["sort"],
    )


def spec_from(options: Mapping[str, Any]) -> Spec:
    """The spec that the grid options ask for."""
    if options["preset_name"] is not None and options["spec"]:
        raise RequestError("--preset and --spec were both given; one grid at a time")
    spec = (
        read_spec(options["spec"])
        if options["spec"]
        else preset("seed" if options["preset_name"] is None else options["preset_name"])
    )
    changes: dict[str, Any] = {key: _values(options[key]) for key in _LISTS if options[key] is not None}
    if options["causal"] is not None:
        changes["causal"] = [options["causal"]]
    return replace(spec, grid=spec.grid.but(changes, "", _as_option)) if changes else spec


def _as_option(path: str) -> str:
    """`seq_len[1]` as the user knows it: `--seq-len`."""
    return "--" + path.partition("[")[0].replace("_", "-")


def _values(text: str) -> list[int | str]:
    parts = (part.strip() for part in text.split(","))
    return [int(part) if re.fullmatch(r"-?\d{1,18}", part) else part for part in parts]


def request_from(options: Mapping[str, Any]) -> Request:
    given = {
        "passes": options["passes"],
        "protocol": options["protocol"],
        "clock": options["clock"],
        "warm_cache": options["warm_cache"],
        "graph": options["graph"],
        "timeout_s": options["timeout"],
        "seed": options["seed"],
        "memory_limit_bytes": parse_bytes(options["memory_limit"]) if options["memory_limit"] is not None else None,
        "shard": parse_shard(options["shard"]) if options["shard"] is not None else None,
    }
    return api.make_request(
        spec_from(options), options["backend"], device=options["device"], budget_s=options["budget"],
        **{key: value for key, value in given.items() if value is not None},
    )  # fmt: skip
