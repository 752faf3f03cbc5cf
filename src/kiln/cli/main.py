"""Arguments -> a command -> an exit code. The edge: no traceback passes it."""

import asyncio
import io
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import IO, Any

import click

from kiln.cli.settings import global_options
from kiln.version import __version__

# Name -> one line of help. The module of a command is imported when the command is run, not before: some need gRPC,
# which alone takes 80 ms.
COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "run": "Run a command in a sandbox and capture its outputs.",
        "build": "Run a BuildRequest from a file.",
        "request": "Print the BuildRequest that `run` would run.",
        "store": "Import, export, list and check content.",
        "serve": "Offer builder and store to other hosts and processes.",
        "builds": "List builds, the newest first.",
        "show": "Show one build.",
        "log": "Print the log of a build.",
        "watch": "Follow a build to its end.",
        "cancel": "End a build.",
        "shell": "Open a shell in what a failed build left.",
        "doctor": "Say what works here, and if not, why and what to do.",
        "completions": "Print the completion script of a shell.",
    }
)


class _Lazy(click.Group):
    """A group whose commands are modules of this package."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  Click's signature.
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  Click's.
        if cmd_name not in COMMANDS:
            return None
        from importlib import import_module  # noqa: PLC0415  Beside its only use.

        module = import_module(f"kiln.cli.{cmd_name}")
        found: click.Command = module.command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  Click's.
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def kiln() -> click.Group:
    """The whole command line."""
    group = _Lazy(
        "kiln",
        help="Run builds: content-addressed inputs in, a sandboxed command, content-addressed outputs out.",
        params=list(global_options()),
        no_args_is_help=True,
    )
    return click.version_option(__version__, prog_name="kiln", message="%(prog)s %(version)s")(group)


def run(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code. Results are on stdout, the rest on stderr."""
    # Names of any bytes come in as surrogates, and what cannot be encoded is shown, not raised.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = kiln().main(list(arguments), prog_name="kiln", standalone_mode=False)
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001  The edge.
        return _exit_of(error)
    return code if isinstance(code, int) else 0


def _exit_of(error: BaseException) -> int:
    from kiln.cli import exits  # noqa: PLC0415  Only errors need it.
    from kiln.cli.asyncs import PipeClosed  # noqa: PLC0415
    from kiln.cli.sanitize import one_line  # noqa: PLC0415
    from kiln.errors import KilnError  # noqa: PLC0415

    match error:
        case BrokenPipeError() | PipeClosed():
            # Whoever read our results has enough. Python would complain once more when it flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return exits.PIPE_CLOSED
        case KeyboardInterrupt() | asyncio.CancelledError() | click.Abort():
            _say("cancelled")
            return exits.CANCELLED
        case click.exceptions.NoArgsIsHelpError():
            sys.stderr.write(error.format_message() + "\n")
            return exits.USAGE
        case click.ClickException():
            if isinstance(error, click.UsageError) and error.ctx is not None:
                sys.stderr.write(error.ctx.get_usage() + "\n")
            _say(one_line(error.format_message()))
            return exits.USAGE
        case KilnError():
            _say(one_line(str(error)) + exits.way_out(error))
            if os.environ.get("KILN_DEBUG") == "1":
                traceback.print_exception(error)
            return exits.exit_of_error(error)
        case SystemExit():
            return error.code if isinstance(error.code, int) else exits.TROUBLE
        case _:
            if os.environ.get("KILN_DEBUG") == "1":
                traceback.print_exception(error)
            what = one_line(" ".join(f"{type(error).__name__}: {error}".split()))
            _say(f"this is a bug in kiln: {what}. Run it again with KILN_DEBUG=1 and report what it prints")
            return exits.TROUBLE


def _say(sentence: str) -> None:
    stream: IO[Any] = sys.stderr
    stream.write(f"kiln: {sentence}\n")
