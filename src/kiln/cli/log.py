"""`kiln log`: what a build wrote."""

import sys

import click

from kiln.aio import closing
from kiln.cli import exits
from kiln.cli.asyncs import run_async
from kiln.cli.command import kiln_command
from kiln.cli.sanitize import Lines, log_line
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

    def write(lines: list[bytes]) -> None:
        out.write("".join(log_line(line, colour=colour) + "\n" for line in lines).encode("utf-8", "backslashreplace"))

    async def main() -> int:
        lines = Lines()
        async with opened_session(settings) as session, closing(session.host.read_log(build_id, follow=follow)) as log:
            async for _, data in log:
                if raw:
                    out.write(data)
                else:
                    write(lines.feed(data))
                out.flush()
        write(lines.end())
        out.flush()
        return exits.OK

    return run_async(main())
