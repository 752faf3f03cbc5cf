"""`kiln shell`: look around in what a failed build left."""

import click

from kiln.build.events import Failure, Finished
from kiln.cli.asyncs import run_async
from kiln.cli.command import kiln_command
from kiln.cli.session import opened_session
from kiln.cli.settings import Settings
from kiln.cli.terminal import passed_on
from kiln.errors import Precondition


class NotHere(Precondition):
    """A shell needs the sandbox's own host."""

    def __init__(self, builder: str) -> None:
        super().__init__(
            f"the builder {builder} runs no sandbox in this process: run `kiln shell` on the host it is on"
        )
        self.builder = builder


class NotFailed(Precondition):
    """Only what a failed build left is kept."""

    def __init__(self, build_id: str) -> None:
        super().__init__(f"build {build_id} has not failed: only what a failed build left is kept")
        self.build_id = build_id


@kiln_command("shell")
@click.argument("build_id", metavar="ID")
@click.pass_context
def command(context: click.Context, build_id: str) -> int:
    """Open a shell in the sandbox of a failed build: its inputs, and what it left in its scratch paths.

    Commands may come from stdin, too. The exit code is the shell's.
    """
    settings = Settings.of(context)

    async def main() -> int:
        async with opened_session(settings) as session:
            info = await session.host.get(build_id, with_request=True)
            if session.sandbox is None:
                session.store.local.require_writable()
                raise NotHere(settings.builder)
            ended = info.last.body if info.last is not None else None
            if info.request is None or not isinstance(ended, Finished) or not isinstance(ended.verdict, Failure):
                raise NotFailed(info.build_id)
            with passed_on() as streams:
                return await session.sandbox.enter(info.request, info.build_id, streams)

    return run_async(main())
