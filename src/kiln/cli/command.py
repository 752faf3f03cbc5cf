"""What kiln's commands share: the global options, and how they are shown in the help."""

from collections.abc import Callable
from typing import Any

import click

from kiln.cli.settings import global_options


class KilnCommand(click.Command):
    """A command that takes the global options after its name too."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self._own = len(self.params)
        self.params.extend(global_options())

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's own options; the global ones stand in `kiln --help`."""
        own = [record for param in self.params[: self._own] if (record := param.get_help_record(ctx)) is not None]
        with formatter.section("Options"):
            formatter.write_dl([*own, ("--help", "Show this message and exit.")])
        formatter.write("\nGlobal options, before or after the command's name: see kiln --help.\n")


def kiln_command(name: str, **attributes: Any) -> Callable[[Callable[..., int]], KilnCommand]:
    """Make a function a command; what it returns is the exit code."""
    return click.command(name, cls=KilnCommand, **attributes)
