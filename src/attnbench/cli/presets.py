"""`attnbench presets`: the grids that ship."""

from __future__ import annotations

import click

from attnbench.cli.console import show
from attnbench.grid import presets


@click.command("presets")
def command() -> None:
    """The grids that ship with attnbench."""
    for name, spec in presets().items():
        show(f"{name:14} {spec.about} ({len(spec.grid.cases())} cases)")
