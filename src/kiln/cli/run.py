"""`kiln run`: a command in a sandbox, from inputs to outputs."""

from typing import Any

import click

from kiln.cli.assemble import request_of
from kiln.cli.asyncs import run_async
from kiln.cli.building import build, refusals_shown
from kiln.cli.command import kiln_command
from kiln.cli.interrupts import interrupts
from kiln.cli.options import Requesting, Running, request_options, run_options
from kiln.cli.session import opened_session
from kiln.cli.settings import Settings


@kiln_command("run")
@request_options
@run_options
@click.pass_context
def command(context: click.Context, /, **values: Any) -> int:
    """Run CMD in a sandbox and capture its outputs.

    Inputs stand in inputs/, read-only. Working directory and HOME are build/. Outputs are named by their path from
    the root: -o build/lua.
    """
    settings = Settings.of(context)
    requesting = Requesting(**{name: values[name] for name in Requesting.__slots__})
    running = Running(**{name: values[name] for name in Running.__slots__})

    async def main() -> int:
        with interrupts() as interrupted, refusals_shown(settings):
            async with opened_session(settings) as session:
                request = request_of(await requesting.asked(session.store), await session.system())
                return await build(request, running, session, settings, interrupted)

    return run_async(main())
