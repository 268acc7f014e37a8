"""Packages that bring implementations of attention: whether they are here, and whether they work. Imports none of them."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from attnbench.errors import printable


@dataclass(frozen=True)
class Package:
    """A package: what is imported of it, under which names it is installed, and how to get it.

    `brings` is what the module must have: some packages leave it out where their compiled part cannot be loaded.
    `takes_for_whole` is a module whose parent alone it looks for, and then fails on importing the module itself. `library`
    is a shared library that it is linked with and does not bring. One that `keeps_memory` gives back none of a GPU's that it
    has taken while its process lives; those that work on PyTorch's tensors have PyTorch's memory, and that is given back.
    """

    module: str
    distributions: tuple[str, ...]
    install: str
    least: str = "0"
    brings: str = ""
    takes_for_whole: str = ""
    library: str = ""
    keeps_memory: bool = False

    @property
    def name(self) -> str:
        return self.distributions[0]

    def absent(self) -> str | None:
        """Why the package cannot even be tried: it is not installed, or too old. Nothing is imported to find out."""
        return _absent(self)

    def load(self) -> ModuleType:
        """Imports it. Raises whatever that raises."""
        if self.library:
            _make_known(self.library)
        with _hidden(self.takes_for_whole):
            return importlib.import_module(self.module)

    def broken(self) -> str | None:
        """The first line of what importing it raises; None where that works. To be asked where it may do harm alone."""
        try:
            module = self.load()
        except BaseException as error:  # SystemExit too: whatever a package does at import
            said = printable(str(error).strip().partition("\n")[0])
            return f"importing {self.module} raised {type(error).__name__}" + (f": {said}" if said else "")
        if self.brings and not hasattr(module, self.brings):
            return f"{self.module} has no {self.brings}: what it is compiled in was not loaded"
        return None

    def version(self) -> str:
        """`flash-attn 2.8.3`, of a package that is installed."""
        installed = _installed(self.distributions)
        if installed is None:
            installed = getattr(
                importlib.import_module(self.module.partition(".")[0]), "__version__", "of no known version"
            )
        return f"{self.name} {installed}"


PACKAGES: dict[str, Package] = {
    "flash_attn": Package(
        "flash_attn.flash_attn_interface", ("flash-attn",), "pip install flash-attn --no-build-isolation", "2.4"
    ),
    "flash_attn_3": Package(
        "flash_attn_interface", ("flash-attn-3",), "build it from the folder hopper of the flash-attention sources"
    ),
    "flash_attn_4": Package("flash_attn.cute", ("flash-attn-4", "fa4"), "pip install flash-attn-4"),
    "xformers": Package(
        "xformers.ops", ("xformers",), "pip install xformers", brings="memory_efficient_attention",
        takes_for_whole="flash_attn.flash_attn_interface",  # version 4 brings a flash_attn without it
        library="libcudart.so.12",  # of CUDA 12, where PyTorch may bring that of a later one
    ),
    "cudnn": Package("cudnn", ("nvidia-cudnn-frontend",), "pip install nvidia-cudnn-frontend", "1.5"),
    "transformer_engine": Package(
        "transformer_engine.pytorch", ("transformer-engine",), "pip install 'transformer_engine[pytorch]'"
    ),
    "flashinfer": Package("flashinfer", ("flashinfer-python",), "pip install flashinfer-python", "0.2"),
    "jax": Package("jax", ("jax",), "pip install 'attnbench[jax]', for CUDA 'jax[cuda13]' besides", "0.7", keeps_memory=True),
}  # fmt: skip
"""Every package that a backend needs besides PyTorch, by the name of the process that it is used in."""


def _make_known(library: str) -> None:
    """Loads a library that no loader finds by its name from NVIDIA's Python packages, if one brings it."""
    if _loads(library):
        return
    for folder in sys.path:
        if any(map(_loads, sorted(map(str, Path(folder).glob(f"nvidia/*/lib/{library}"))))):
            return


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Within the block the module's parent is not there, if the parent can be found and the module cannot."""
    parent = module.partition(".")[0]
    if not _found(parent) or _found(module):
        yield
        return
    kept = sys.modules.get(parent)
    sys.modules[parent] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules[parent]
        if kept is not None:
            sys.modules[parent] = kept


@cache
def _absent(package: Package) -> str | None:
    installed = _installed(package.distributions)
    if installed is None and not _found(package.module):
        return f"package {package.name} is not installed; {package.install}"
    if installed is not None and _release(installed) < _release(package.least):
        return f"needs {package.name} {package.least} or newer, and {installed} is installed; {package.install}"
    return None


def _installed(distributions: tuple[str, ...]) -> str | None:
    from importlib import metadata

    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _found(module: str) -> bool:
    """Whether a module's file or folder is on the path; its parents are not imported for it, as `find_spec` would."""
    top, *parts = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # a module that is loaded and has no spec
        return False
    if spec is None or not parts:
        return spec is not None
    folders = [Path(folder, *parts) for folder in spec.submodule_search_locations or ()]
    return any(folder.is_dir() or folder.with_suffix(".py").is_file() for folder in folders)


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version up to the first that is none: 2.8.3.post1 is (2, 8, 3)."""
    return tuple(int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part)  # pyright: ignore[reportOptionalSubscript]
