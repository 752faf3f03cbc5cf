"""`kiln log`: what a build wrote."""

import sys

import click

from kiln.aio import closing
from kiln.cli import exits
from kiln.cli.asyncs import run_async
from kiln.cli.command import kiln_command
from kiln.cli.sanitize import Lines, log_text
from kiln.cli.session import opened_session
from kiln.cli.settings import Settings


@kiln_command("log")
@click.argument("build_id", metavar="ID")
@click.option("-f", "--follow", is_flag=True, help="Go on until the build ends.")
@click.option("--raw", is_flag=True, help="The bytes as they are. Without it, control characters are written out.")
@click.pass_context
def command(context: click.Context, build_id: str, follow: bool, raw: bool) -> int:
    """Print the log of a build, running or ended."""
    settings = Settings.of(context)
    colour = sys.stdout.isatty()
    out = sys.stdout.buffer

    async def main() -> int:
        lines = Lines()
        async with opened_session(settings) as session, closing(session.host.read_log(build_id, follow=follow)) as log:
            async for _, data in log:
                out.write(data if raw else log_text(lines.feed(data), colour=colour).encode())
                out.flush()
        out.write(log_text(lines.end(), colour=colour).encode())
        out.flush()
        return exits.OK

    return run_async(main())
