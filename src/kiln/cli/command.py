"""What kiln's commands share: the global options, and how they are shown in the help."""

from collections.abc import Callable, Sequence
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
        _write_options(self.params[: self._own], ctx, formatter)


class KilnGroup(click.Group):
    """A command of commands, with the global options at every place."""

    def __init__(self, name: str, commands: Sequence[click.Command], **attributes: Any) -> None:
        super().__init__(name, commands=commands, params=list(global_options()), no_args_is_help=True, **attributes)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Its commands, each with the whole first line of its help; the global options stand in `kiln --help`."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, (command.help or "").partition("\n")[0]) for name, command in self.commands.items()]
            )
        _write_options([], ctx, formatter)


def kiln_command(name: str, **attributes: Any) -> Callable[[Callable[..., int]], KilnCommand]:
    """Make a function a command; what it returns is the exit code."""
    return click.command(name, cls=KilnCommand, **attributes)


def _write_options(own: Sequence[click.Parameter], ctx: click.Context, formatter: click.HelpFormatter) -> None:
    # The line of usage has the arguments.
    options = [param.get_help_record(ctx) for param in own if isinstance(param, click.Option)]
    with formatter.section("Options"):
        formatter.write_dl([*filter(None, options), ("--help", "Show this message and exit.")])
    formatter.write("\nGlobal options, before or after the command's name: see kiln --help.\n")
