"""`kiln cancel`: end a build."""

import json

import click
from google.protobuf.json_format import MessageToDict

from kiln.build.wire_host import to_build_info
from kiln.cli import exits
from kiln.cli.asyncs import run_async
from kiln.cli.builds import state_of
from kiln.cli.command import kiln_command
from kiln.cli.session import opened_session
from kiln.cli.settings import Settings


@kiln_command("cancel")
@click.argument("build_id", metavar="ID")
@click.option("--why", default="", help="A word for those who follow it.")
@click.option("--force", is_flag=True, help="Also when others wait for the same build.")
@click.pass_context
def command(context: click.Context, build_id: str, why: str, force: bool) -> int:
    """End a build of a server; returns when nothing of it is left. One that has ended stays as it is."""
    settings = Settings.of(context)

    async def main() -> int:
        async with opened_session(settings) as session:
            info = await session.host.cancel(build_id, by="the command line", why=why, force=force)
        if settings.json:
            click.echo(json.dumps(MessageToDict(to_build_info(info))))
        else:
            click.echo(f"kiln: build {info.build_id}: {state_of(info)}", err=True)
        return exits.OK

    return run_async(main())
