"""The command line: one module a command. Each reads: make the request, carry it out, show what came of it.

Only the module of the command that is called is loaded, so that each starts with no more than it needs.
"""

from __future__ import annotations

import importlib
import sys

import click

from attnbench.cli.console import open_closed_streams, say
from attnbench.errors import DiskFull, Interrupted, RequestError, unknown

WRONG_REQUEST, INTERRUPTED = 2, 130

COMMANDS = {
    "run": "The sweep; with no arguments the seed's grid on the best device here.",
    "plan": "What `run` would do: its cells, forecasts of memory and time, and what cannot run.",
    "backends": "Every backend: what it is, whether it is available here or why not, and which cases it takes.",
    "presets": "The grids that ship with attnbench.",
    "show": "A run on this terminal: the fastest backends, by how much, statuses, and how far each got.",
    "report": "A run directory as a document, as a table, or as a chart.",
    "compare": "Two runs, cell by cell, with verdicts that know noise; exit code 1 where B is worse than A.",
    "recommend": "From a run: the fastest right backend for a shape, and the code that calls it.",
    "query": "The answer to a SELECT over the tables `records` and `runs` of one run or many.",
    "calibrate": "Measures this device's ceilings anew: memory, matrix products, exponentials, a launch.",
    "doctor": "What about this machine would spoil a benchmark, and how to mend it.",
}
"""Each command is `command` in the module of its name, and its help begins with these words."""


class _Commands(click.Group):
    """Commands that are loaded where they are called, and listed without being loaded."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        if cmd_name not in COMMANDS:
            raise unknown("command", cmd_name, COMMANDS)
        return importlib.import_module(f"attnbench.cli.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    invoke_without_command=True,
)
@click.version_option(package_name="attnbench")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Measures attention implementations: speed, memory, correctness and status, over a grid of shapes."""
    if ctx.invoked_subcommand is None:
        raise RequestError(f"no command was given; there are: {', '.join(COMMANDS)}; attnbench --help tells of each")


def main() -> None:
    """Entry point. Whatever is wrong with a request ends in one line on standard error and exit code 2."""
    open_closed_streams()
    try:
        sys.exit(cli.main(standalone_mode=False, prog_name="attnbench"))
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except (click.ClickException, RequestError) as error:
        say(error.format_message() if isinstance(error, click.ClickException) else str(error))
        sys.exit(WRONG_REQUEST)
    except DiskFull as error:
        say(f"{error}; the cells before it are safe; then go on with --resume")
        sys.exit(WRONG_REQUEST)
    except (KeyboardInterrupt, click.Abort) as stop:
        if isinstance(stop.__cause__, Interrupted):  # click makes an Abort of every KeyboardInterrupt
            say(str(stop.__cause__))
        else:
            say("interrupted before any cell was measured")
        sys.exit(INTERRUPTED)
