"""The options that `run` and `request` share, and those that `run` and `build` share."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from kiln.build.model import BuildOptions, CacheUse
from kiln.cli.assemble import Asked
from kiln.cli.nodes import is_node_text, parse_node
from kiln.cli.stores import OpenStore
from kiln.cli.units import Duration, Size

F = TypeVar("F", bound=Callable[..., Any])


def request_options(function: F) -> F:
    """What the request says."""
    return _all(
        function,
        click.option(
            "-i",
            "--input",
            "inputs",
            metavar="NAME=PATH|NODE",
            multiple=True,
            callback=pairs,
            help="An input: a path to import, the JSON of an Entry, or a digest. Repeatable.",
        ),
        click.option(
            "-o",
            "--output",
            "outputs",
            metavar="PATH",
            multiple=True,
            help="A path that the command makes; its parent directory is writable. Repeatable.",
        ),
        click.option(
            "-e",
            "--env",
            "environment",
            metavar="NAME=VALUE",
            multiple=True,
            callback=pairs,
            help="An environment variable. Repeatable.",
        ),
        click.option("--scratch", metavar="PATH", multiple=True, help="Another writable path. Repeatable."),
        click.option("--inputs-dir", metavar="PATH", default="inputs", help="Where inputs stand (default: inputs)."),
        click.option("--sh", "shell", is_flag=True, help="Provide /bin/sh."),
        click.option("--net", "network", is_flag=True, help="Ask for the network; the builder's policy decides."),
        click.option(
            "--ro-path",
            "paths",
            metavar="PATH",
            multiple=True,
            help="Ask to see this host path; the builder's policy decides. Repeatable.",
        ),
        click.option(
            "--memory",
            type=Size(),
            default="0",
            metavar="BYTES",
            help="Memory that the host must have, and the build's limit.",
        ),
        click.argument("command", metavar="CMD [ARG]...", nargs=-1, required=True, type=click.UNPROCESSED),
    )


def run_options(function: F) -> F:
    """How one run of a request goes, and what happens to its outputs."""
    return _all(
        function,
        click.option("--timeout", type=Duration(), help="End the build after this time."),
        click.option("--silence-timeout", type=Duration(), help="End the build when it writes nothing for this time."),
        click.option("--export", metavar="DIR", help="Write each output to DIR/its path."),
        click.option("--rebuild", is_flag=True, help="Run in spite of the cache, and report what differs."),
        click.option(
            "--label",
            "labels",
            metavar="NAME=VALUE",
            multiple=True,
            callback=pairs,
            help="A label to find the build by. Repeatable.",
        ),
        click.option("--strict", is_flag=True, help="Refuse outputs that are not sorted, as Snix does."),
    )


@dataclass(frozen=True, slots=True)
class Running:
    """The values of `run_options`."""

    timeout: float | None
    silence_timeout: float | None
    export: str | None
    rebuild: bool
    labels: tuple[tuple[str, str], ...]
    strict: bool

    def build_options(self, *, memory: int) -> BuildOptions:
        """As the builder takes them. The build is this command's: it ends with it."""
        return BuildOptions(
            wall_s=self.timeout,
            silence_s=self.silence_timeout,
            memory_bytes=memory,
            cache=CacheUse.REFRESH if self.rebuild else CacheUse.USE,
            cancel_on_disconnect=True,
            labels=dict(self.labels),
        )


@dataclass(frozen=True, slots=True)
class Requesting:
    """The values of `request_options`."""

    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    scratch: tuple[str, ...]
    inputs_dir: str
    shell: bool
    network: bool
    paths: tuple[str, ...]
    memory: int
    command: tuple[str, ...]

    async def asked(self, store: OpenStore) -> Asked:
        """With every input in `store`; paths are imported now."""
        inputs = []
        for name, value in self.inputs:
            if is_node_text(value):
                node = await parse_node(value, store.castore)
            else:
                node = (await store.ingest(value)).node
            inputs.append((os.fsencode(name), node))
        return Asked(
            command=self.command,
            inputs=tuple(inputs),
            outputs=self.outputs,
            environment=tuple((name, os.fsencode(value)) for name, value in self.environment),
            scratch=self.scratch,
            inputs_dir=self.inputs_dir,
            shell=self.shell,
            network=self.network,
            paths=self.paths,
            memory=self.memory,
        )


def _all(function: F, *decorators: Callable[[F], F]) -> F:
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


def pairs(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """NAME=VALUE, each in two."""
    for value in values:
        if "=" not in value:
            raise click.BadParameter(f"{value!r} has no '='", context, parameter)
    return tuple((name, rest) for name, _, rest in (value.partition("=") for value in values))
