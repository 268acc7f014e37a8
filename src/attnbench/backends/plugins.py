"""Backends that installed packages offer, by the entry-point group `attnbench.backends`. Imports none of them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib import metadata

GROUP = "attnbench.backends"


def plugins() -> dict[str, metadata.EntryPoint]:
    """What can be had, by name. What an entry point leads to is loaded where it runs."""
    return _sorted_out()[0]


def refused_plugins() -> dict[str, str]:
    """Names that packages offer and that cannot be had, each with the reason."""
    return _sorted_out()[1]


def package_of(plugin: metadata.EntryPoint) -> str:
    """`name version` of the package that offers a backend."""
    return f"{plugin.dist.name} {plugin.dist.version}" if plugin.dist else "a package of no name"


@cache
def _sorted_out() -> tuple[dict[str, metadata.EntryPoint], dict[str, str]]:
    from importlib import metadata

    from attnbench.backends import BUILTIN

    offered: dict[str, list[metadata.EntryPoint]] = {}
    for plugin in metadata.entry_points(group=GROUP):
        if plugin not in offered.setdefault(plugin.name, []):  # a folder may be on the path twice
            offered[plugin.name].append(plugin)
    refused: dict[str, str] = {}
    for name, those in offered.items():
        whose = " and ".join(package_of(plugin) for plugin in those)
        instead = f"call it by its place: {', '.join(plugin.value for plugin in those)}"
        if name in BUILTIN:
            refused[name] = f"of {whose} is refused: attnbench has one of that name; {instead}"
        elif len(those) > 1:
            refused[name] = f"is offered by {whose}: uninstall one, or {instead}"
        elif not name or name == "all" or ":" in name:
            refused[name] = f"of {whose} is refused: a name is not empty, not `all`, and has no colon; {instead}"
    return {name: those[0] for name, those in offered.items() if name not in refused}, refused
