"""`kiln build`: a BuildRequest from a file."""

import os
import sys
from typing import Any

import click

from kiln.build.model import BuildRequest
from kiln.build.wire import decode_request
from kiln.build.wire_json import request_from_json
from kiln.castore.model import printable
from kiln.cli.asyncs import run_async
from kiln.cli.building import build, refusals_shown
from kiln.cli.command import kiln_command
from kiln.cli.interrupts import interrupts
from kiln.cli.options import Running, run_options
from kiln.cli.session import opened_session
from kiln.cli.settings import Settings
from kiln.errors import Denied, NotFound


@kiln_command("build")
@click.argument("file", metavar="REQUEST.json|REQUEST.binpb|-")
@run_options
@click.pass_context
def command(context: click.Context, /, file: str, **values: Any) -> int:
    """Run a BuildRequest: proto3 JSON, or protobuf in a file whose name ends in .binpb; - reads JSON from stdin."""
    settings = Settings.of(context)
    with refusals_shown(settings):
        request = _read(file)

    async def main() -> int:
        with interrupts() as interrupted, refusals_shown(settings):
            async with opened_session(settings) as session:
                return await build(request, Running(**values), session, settings, interrupted)

    return run_async(main())


def _read(path: str) -> BuildRequest:
    if path == "-":
        return request_from_json(sys.stdin.buffer.read())
    shown = printable(os.fsencode(path))
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError as error:
        raise NotFound(f"there is no request file {shown}") from error
    except OSError as error:
        raise Denied(f"cannot read the request file {shown}: {error.strerror}") from error
    return decode_request(data) if path.endswith(".binpb") else request_from_json(data)
