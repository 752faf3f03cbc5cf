"""`kiln builds`: a list of builds, the newest first."""

import json

import click
from google.protobuf.json_format import MessageToDict

from kiln.build.events import Failure, Finished
from kiln.build.service import BuildInfo
from kiln.build.wire_host import to_build_info
from kiln.cli import exits
from kiln.cli.asyncs import run_async
from kiln.cli.command import kiln_command
from kiln.cli.options import pairs
from kiln.cli.sanitize import one_line
from kiln.cli.session import opened_session
from kiln.cli.settings import Settings
from kiln.cli.units import shown_moment, shown_time


@kiln_command("builds")
@click.option("-n", "--limit", metavar="N", type=click.IntRange(min=1), default=20, help="How many (default: 20).")
@click.option("--running", is_flag=True, help="Only those that have not ended.")
@click.option("--label", "labels", metavar="NAME=VALUE", multiple=True, callback=pairs, help="Only those with it.")
@click.pass_context
def command(context: click.Context, limit: int, running: bool, labels: tuple[tuple[str, str], ...]) -> int:
    """List builds, the newest first: id, begin, duration, state, labels. With --json, a BuildInfo a line."""
    settings = Settings.of(context)

    async def main() -> int:
        async with opened_session(settings) as session:
            page, left = "", limit
            while left:
                found, page = await session.host.list(labels=dict(labels), running_only=running, limit=left, page=page)
                for info in found:
                    click.echo(json.dumps(MessageToDict(to_build_info(info))) if settings.json else _line(info))
                left -= len(found)
                if not page:
                    break
        return exits.OK

    return run_async(main())


def _line(info: BuildInfo) -> str:
    labels = " ".join(f"{name}={value}" for name, value in sorted(info.labels.items()))
    last = info.last
    began = shown_moment(last.time_s - last.elapsed_us / 1e6) if last is not None else "-"
    took = shown_time(last.elapsed_us / 1e6) if last is not None and isinstance(last.body, Finished) else "-"
    return one_line(f"{info.build_id}  {began:19}  {took:>8}  {state_of(info):24}  {labels}".rstrip())


def state_of(info: BuildInfo) -> str:
    """A word or two for where a build stands."""
    body = None if info.last is None else info.last.body
    if not isinstance(body, Finished):
        return "running"
    if isinstance(body.verdict, Failure):
        return f"failed: {body.verdict.reason.name.lower()}"
    return "succeeded (cached)" if body.verdict.cached else "succeeded"
