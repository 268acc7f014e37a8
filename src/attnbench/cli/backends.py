"""`attnbench backends`: what there is, and which cases it takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from attnbench import backends as registry
from attnbench import machine
from attnbench.case import Case
from attnbench.cli.console import say, show
from attnbench.executors.local import LocalExecutor
from attnbench.grid import Grid
from attnbench.plan import describe
from attnbench.record import cell_id
from attnbench.report.tables import Table, markdown_table
from attnbench.request import PASSES, Request, expand_backends, parse_case, parse_device


@click.command("backends")
@click.option("--backend", "names", multiple=True, metavar="NAME", help="Only these. Default: all.")
@click.option(
    "--case",
    "cases",
    multiple=True,
    metavar="NAME=VALUE,…",
    help="A case to ask each about, such as d_model=16,dtype=float32; repeatable.",
)
@click.option(
    "--pass",
    "passes",
    metavar="|".join(PASSES),
    default="backward",
    help="Ask about the forward alone, or about both (default).",
)
@click.option("--device", metavar="cpu|cuda|cuda:N", help="Default: the best one here.")
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
def command(names: tuple[str, ...], cases: tuple[str, ...], passes: str, device: str | None, as_json: bool) -> None:
    """Every backend: what it is, whether it is available here or why not, and which cases it takes."""
    device = parse_device(device) if device is not None else machine.best_device()
    asked = {text: parse_case(text) for text in cases}
    wanted = expand_backends(names or registry.every())
    request = Request(Grid(), "backends", wanted, {}, device, passes=passes)
    with LocalExecutor(request) as executor:
        told = describe(executor, wanted, {}, list(asked.values()), request.timeout_s)["backends"]
    shown = [{"device": device} | backend_facts(backend, asked) for backend in told]
    show(json.dumps(shown, indent=1) if as_json else backends_text(shown, device))
    for name, reason in registry.refused_plugins().items():
        say(f"backend {name!r} {reason}")


def backend_facts(told: Mapping[str, Any], asked: Mapping[str, Case]) -> dict[str, Any]:
    """What a worker told of a backend, for a reader: with each case that was asked about, why it is refused or None."""
    entry = registry.BUILTIN.get(told["name"])
    answers = zip(asked, told["refusals"], told["padded_d_models"], strict=True)
    return {key: told[key] for key in ("name", "about", "version", "unavailable")} | {
        "by_default": entry is None or not entry.when_named,
        "cases": [
            {"case": text, "cell_id": cell_id(asked[text], told["name"]), "refused": reason, "padded_d_model": padded}
            for text, reason, padded in answers
        ],
    }


def backends_text(shown: list[dict[str, Any]], device: str) -> str:
    """A row for each backend; with a column for each case that was asked about, and then without what the backend is."""

    def answer(case: Mapping[str, Any]) -> str:
        padded = f", on {case['padded_d_model']} dimensions a head" if case["padded_d_model"] else ""
        return case["refused"] or f"yes{padded}"

    cases = [case["case"] for case in shown[0]["cases"]] if shown else []
    rows = [
        [backend["name"], *map(answer, backend["cases"])]
        if cases
        else [
            backend["name"],
            backend["unavailable"] or ("available" if backend["by_default"] else "available, runs only when named"),
            backend["version"],
            backend["about"],
        ]
        for backend in shown
    ]
    header = ["backend", *cases] if cases else ["backend", f"on {device}", "version", "what it is"]
    return markdown_table(Table(header, rows).without_empty_columns())
