"""`attnbench recommend`: which backend to use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from attnbench.analysis.recommend import recommend
from attnbench.analysis.wish import PASSES, Wish
from attnbench.case import PRECISIONS
from attnbench.cli.console import show
from attnbench.report import recommendation
from attnbench.request import parse_bytes
from attnbench.result import load


@click.command("recommend")
@click.argument("directory", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--seq-len", type=int, metavar="N", help="Number of queries.")
@click.option("--d-model", type=int, metavar="N", help="Head dimension.")
@click.option("--kv-len", type=int, metavar="N", help="Number of keys. Default: the same as seq_len.")
@click.option("--batch", type=int, metavar="N", help="Batch size.")
@click.option("--heads", type=int, metavar="N", help="Query heads.")
@click.option("--kv-heads", type=int, metavar="N", help="Key heads.")
@click.option("--dtype", metavar="NAME", help="Element type, such as bfloat16.")
@click.option("--precision", metavar="|".join(PRECISIONS), help="Products of float32.")
@click.option("--causal/--no-causal", "causal", default=None, help="With or without the causal mask.")
@click.option("--pass", "what", metavar="|".join(PASSES), help="What has to be fast. Default: step, both passes.")
@click.option("--memory", metavar="SIZE", help="What the backend may hold, such as 16GiB.")
@click.option("--deterministic", is_flag=True, help="Only backends whose gradients are the same each time.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(directory: Path, memory: str | None, as_json: bool, **wished: Any) -> None:
    """From a run: the fastest right backend for a shape, and the code that calls it.

    What is not given is the run's own, where it has one value only. Shapes between those measured are estimated.
    """
    wish = Wish(**wished, memory_bytes=parse_bytes(memory) if memory is not None else None)
    found = recommend(load(directory), wish)
    show(json.dumps(found.to_dict(), indent=1, allow_nan=False) if as_json else recommendation.text(found))
