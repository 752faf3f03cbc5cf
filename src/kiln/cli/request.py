"""`kiln request`: what `kiln run` would run, as a BuildRequest on stdout."""

import json
from typing import Any

import click

from kiln.build.wire_json import request_to_json
from kiln.cli import exits
from kiln.cli.assemble import request_of
from kiln.cli.asyncs import run_async
from kiln.cli.command import kiln_command
from kiln.cli.options import Requesting, request_options
from kiln.cli.session import opened_session
from kiln.cli.settings import Settings


@kiln_command("request")
@request_options
@click.pass_context
def command(context: click.Context, /, **values: Any) -> int:
    """Print the BuildRequest that `kiln run` with the same options would run, and run nothing.

    Inputs given as paths are imported into the store.
    """
    settings = Settings.of(context)
    requesting = Requesting(**values)

    async def main() -> int:
        async with opened_session(settings) as session:
            request = request_of(await requesting.asked(session.store), await session.system())
        click.echo(json.dumps(request_to_json(request), indent=None if settings.json else 2))
        return exits.OK

    return run_async(main())
