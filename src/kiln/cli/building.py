"""A request, from the command line to its verdict: upload, submit, follow, fetch, export, report."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

import click

from kiln.build.errors import RequestInvalid
from kiln.build.events import Success
from kiln.build.model import BuildRequest
from kiln.build.unary_status import invalid_request
from kiln.build.validate import check_outputs_sorted
from kiln.build.wire_json import failure_to_json
from kiln.castore.errors import ExportFailed
from kiln.cli.follow import EventsFile, Follower, follow_and_cancel
from kiln.cli.interrupts import Interrupts
from kiln.cli.options import Running
from kiln.cli.report import exit_of, result_json, result_lines, verdict_lines
from kiln.cli.session import Session
from kiln.cli.settings import Settings
from kiln.cli.view import shown


async def build(
    request: BuildRequest, running: Running, session: Session, settings: Settings, interrupts: Interrupts
) -> int:
    """Build `request` and print what came of it; returns the exit code."""
    if running.strict:
        check_outputs_sorted(request)
    options = running.build_options(memory=request.constraints.min_memory)
    await session.offer(node for _, node in request.inputs)
    with EventsFile(settings.events) as events, shown() as view:
        follower = Follower(view, again=settings.command("watch"), echo=events.write)
        build_id = await session.host.submit(request, options)
        finished = await follow_and_cancel(follower, session.host, build_id, view, interrupts)
    for line in verdict_lines(build_id, finished, follower.tail, settings):
        click.echo(line, err=True)
    if isinstance(finished.verdict, Success):
        await session.fetch(output.node for output in finished.verdict.outputs)
        if running.export is not None:
            await _export(request, finished.verdict, running.export, session)
    if settings.json:
        click.echo(json.dumps(result_json(build_id, request, finished)))
    elif isinstance(finished.verdict, Success):
        for line in result_lines(request, finished.verdict):
            click.echo(line)
    return exit_of(finished)


@contextmanager
def refusals_shown(settings: Settings) -> Iterator[None]:
    """With --json, a request that breaks a rule is a result too, before it is an error."""
    try:
        yield
    except RequestInvalid as error:
        if settings.json:
            click.echo(
                json.dumps({"build_id": "", "cached": False, "failure": failure_to_json(invalid_request(error))})
            )
        raise


async def _export(request: BuildRequest, success: Success, directory: str, session: Session) -> None:
    for path, output in zip(request.outputs, success.outputs, strict=True):
        destination = os.path.join(directory, path)
        parent = os.path.dirname(destination)
        try:
            os.makedirs(parent, exist_ok=True)
        except OSError as error:
            raise ExportFailed(os.fsencode(parent), str(error.strerror)) from error
        await session.store.export(output.node, destination)
