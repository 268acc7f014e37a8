"""What a command has to say: documents on standard output, one line at a time on standard error."""

from __future__ import annotations

import os
import sys

from attnbench.errors import printable


def open_closed_streams() -> None:
    """Daemons close the standard streams; a pipe that took such a number would be mistaken for one."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115 - as long as the process


def show(text: str, *, newline: bool = True, to: str = "stdout") -> None:
    """Prints a document. A reader that has had enough of it, as `head`, is no failure."""
    stream = getattr(sys, to)
    whole = text + "\n" * newline
    try:
        try:
            stream.write(whole)
        except UnicodeEncodeError:  # a stream that has no ± or ×
            stream.write(whole.encode(stream.encoding, "replace").decode(stream.encoding))
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str) -> None:
    """One line on standard error."""
    show(f"attnbench: {printable(text)}", to="stderr")
