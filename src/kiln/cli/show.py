"""`kiln show`: all that is known of one build."""

import json
from collections.abc import Iterator

import click
from google.protobuf.json_format import MessageToDict

from kiln.build.events import Failure, Finished, Success
from kiln.build.service import BuildInfo
from kiln.build.wire_host import to_build_info
from kiln.cli import exits
from kiln.cli.asyncs import run_async
from kiln.cli.builds import state_of
from kiln.cli.command import kiln_command
from kiln.cli.nodes import node_line, shown_name
from kiln.cli.report import result_lines
from kiln.cli.sanitize import one_line
from kiln.cli.session import opened_session
from kiln.cli.settings import Settings
from kiln.cli.units import shown_moment, shown_size, shown_time
from kiln.cli.view import PHASES


@kiln_command("show")
@click.argument("build_id", metavar="ID")
@click.pass_context
def command(context: click.Context, build_id: str) -> int:
    """Show a build: its request, how it went, what it used and made. The first characters of its id will do.

    With --json, a BuildInfo with the request.
    """
    settings = Settings.of(context)

    async def main() -> int:
        async with opened_session(settings) as session:
            info = await session.host.get(build_id, with_request=True)
        if settings.json:
            click.echo(json.dumps(MessageToDict(to_build_info(info))))
        else:
            for name, value in _facts(info, settings):
                click.echo(f"{name + ':':13}{value}")
        return exits.OK

    return run_async(main())


def _facts(info: BuildInfo, settings: Settings) -> Iterator[tuple[str, str]]:
    yield "build", info.build_id
    yield "state", state_of(info)
    if info.last is not None:
        yield "began", shown_moment(info.last.time_s - info.last.elapsed_us / 1e6)
    for name, value in sorted(info.labels.items()):
        yield "label", one_line(f"{name}={value}")
    request = info.request
    if request is not None:
        yield "request", info.request_digest.hex()
        yield "command", one_line(" ".join(request.command))
        for input_name, node in request.inputs:
            yield "input", node_line(input_name, node)
        for output in request.outputs:
            yield "output", one_line(output)
        for path in request.constraints.available_ro_paths:
            yield "sees", one_line(path)
        if request.constraints.network_access:
            yield "network", "asked for"
    if info.last is not None and isinstance(info.last.body, Finished):
        yield from _end(info, info.last.body, settings)


def _end(info: BuildInfo, finished: Finished, settings: Settings) -> Iterator[tuple[str, str]]:
    if finished.builder is not None:
        yield "builder", one_line(f"{finished.builder.url} on {finished.builder.worker}, {finished.builder.contract}")
        for name, why in sorted(finished.builder.weaker.items()):
            yield "weaker", one_line(f"{name}: {why}")
    for span in finished.spans:
        yield "phase", f"{PHASES[span.kind]}: {shown_time((span.to_us - span.from_us) / 1e6)}"
    usage = finished.usage
    yield "time", f"{shown_time(usage.wall_s)}, of CPU {shown_time(usage.user_s + usage.system_s)}"
    if usage.memory_peak:
        yield "memory", f"{shown_size(usage.memory_peak)} at most"
    if usage.unmeasured:
        yield "unmeasured", one_line(", ".join(usage.unmeasured))
    if finished.log is not None:
        cut = ", cut at its limit" if finished.log_truncated else ""
        yield "log", f"{shown_size(finished.log.size)}{cut}: {settings.command('log')} {info.build_id}"
    match finished.verdict:
        case Success() as success:
            if success.cached is not None:
                yield "made by", one_line(success.cached.origin_build_id)
            if info.request is not None:
                for line in result_lines(info.request, success):
                    yield "result", line
        case Failure(message=message, near=near):
            yield "why", one_line(message)
            if near:
                yield "near it", ", ".join(shown_name(path.encode("utf-8", "surrogateescape")) for path in near)
