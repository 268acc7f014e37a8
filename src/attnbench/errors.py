"""What a caller of attnbench may have to catch."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable
from pathlib import Path


class RequestError(ValueError):
    """A request that cannot be carried out as asked.

    The message is one line for the reader: what was asked, what is wrong, what would work. The command line prints it
    and exits with code 2; the Python API raises it.
    """


class MissingLibrary(RequestError):
    """A library of an optional extra is not installed; the message has the command that installs it."""

    def __init__(self, what: str, library: str | None, extra: str) -> None:
        super().__init__(f"{what} needs {library}; install it by: pip install 'attnbench[{extra}]'")


class DiskFull(Exception):
    """A record could not be written; those before it are safe."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a sweep; the finished cells are in `directory`."""

    def __init__(self, directory: Path, done: int, cells: int) -> None:
        super().__init__(
            f"interrupted; {done} of {cells} cells are kept in {directory}; "
            f"go on with: attnbench run --resume --out {shlex.quote(str(directory))}"
        )
        self.directory, self.done, self.cells = directory, done, cells


def printable(text: str) -> str:
    """`text` on one line, without control characters and other code points that cannot be written or shown."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def words(error: BaseException, most: int = 300) -> str:
    """The message up to its stack traces and hints, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    head = printable(" ".join(lines[:3])) or type(error).__name__
    return head if len(head) <= most else head[: most - 1] + "…"


def unknown(kind: str, asked: str, known: Iterable[str]) -> RequestError:
    """`RequestError` for a name that is none of `known`, with the nearest of them first."""
    names = list(known)
    near = difflib.get_close_matches(asked, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return RequestError(f"{kind} {asked!r} is not known; {hint}there are: {', '.join(names)}")
