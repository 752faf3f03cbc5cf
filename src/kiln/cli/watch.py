"""`kiln watch`: a build somebody else runs, or ran, followed to its end."""

import json
import sys

import click

from kiln.build.events import Event
from kiln.build.wire_json import event_to_json
from kiln.cli.asyncs import run_async
from kiln.cli.command import kiln_command
from kiln.cli.follow import EventsFile, Follower
from kiln.cli.report import exit_of, verdict_lines
from kiln.cli.session import opened_session
from kiln.cli.settings import Settings
from kiln.cli.view import shown


@kiln_command("watch")
@click.argument("build_id", metavar="ID")
@click.option(
    "--after", "after_seq", metavar="SEQ", type=click.IntRange(min=0), default=0, help="Only events after this number."
)
@click.pass_context
def command(context: click.Context, build_id: str, after_seq: int) -> int:
    """Follow a build to its end; the exit code is that of its verdict. With --json, its events, one a line.

    Ctrl-C stops watching; the build goes on.
    """
    settings = Settings.of(context)

    async def main() -> int:
        async with opened_session(settings) as session:
            full_id = (await session.host.get(build_id)).build_id
            with EventsFile(settings.events) as events:

                def echo(event: Event) -> None:
                    events.write(event)
                    if settings.json:
                        sys.stdout.write(json.dumps(event_to_json(event)) + "\n")
                        sys.stdout.flush()

                with shown() as view:
                    follower = Follower(view, again=settings.command("watch"), echo=echo)
                    finished = await follower.follow(session.host, full_id, after_seq=after_seq)
        for line in verdict_lines(full_id, finished, follower.tail, settings):
            click.echo(line, err=True)
        return exit_of(finished)

    return run_async(main())
