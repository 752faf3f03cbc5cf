"""The global options, which every command takes before and after its name."""

import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import click
from click.core import ParameterSource

from kiln.cli.units import Duration, IdRange, Size
from kiln.server.config import BuilderConfig

_META = "kiln.settings"
_BUILDER = "bwrap://"
_PREFIX = "global_"  # Commands have parameters of the same names.


@dataclass(frozen=True, slots=True)
class Settings:
    """What the global options say; None where the default is not the command line's to know."""

    store: str
    builder: str = _BUILDER
    json: bool = False
    events: str | None = None
    allow_net: bool = False
    allow_path: tuple[str, ...] = ()
    uid_range: tuple[int, int] | None = None
    shell: str | None = None
    slots: int | None = None
    max_memory: int | None = None
    max_disk: int | None = None
    max_log: int | None = None
    max_processes: int | None = None
    max_wall: float | None = None
    salt: str = ""

    def builder_config(self) -> BuilderConfig:
        """The builder that is asked for, and the policy of one here."""
        return BuilderConfig(
            url=self.builder,
            allow_network=self.allow_net,
            allowed_paths=self.allow_path,
            slots=self.slots,
            memory_bytes=self.max_memory,
            disk_bytes=self.max_disk,
            log_bytes=self.max_log,
            processes=self.max_processes,
            wall_s=self.max_wall,
            uid_range=self.uid_range,
            shell=self.shell,
            salt=self.salt,
        )

    @property
    def builds_here(self) -> bool:
        """Whether builds run in this process, and not on a server."""
        return not self.builder.startswith("grpc+")

    def command(self, words: str) -> str:
        """How to type another command that finds what this one did."""
        default = default_store(os.environ, os.getuid())
        store = [] if self.store == default else ["--store", shlex.quote(self.store)]
        builder = [] if self.builder == _BUILDER else ["--builder", shlex.quote(self.builder)]
        return " ".join(["kiln", *store, *builder, words])

    @classmethod
    def of(cls, context: click.Context) -> "Settings":
        """What was given before and after the command; what came later counts."""
        given = context.meta.get(_META, {})
        return cls(**{"store": default_store(os.environ, os.getuid()), **given})


def default_store(environment: Mapping[str, str], uid: int) -> str:
    """The store's URL where none is given: $XDG_DATA_HOME/kiln, or /var/lib/kiln for root."""
    if uid == 0 and not environment.get("XDG_DATA_HOME"):
        return "/var/lib/kiln"
    data_home = environment.get("XDG_DATA_HOME") or os.path.join(os.path.expanduser("~"), ".local", "share")
    return os.path.join(data_home, "kiln")


def _remember(context: click.Context, parameter: click.Parameter, value: object) -> None:
    assert parameter.name is not None
    if context.get_parameter_source(parameter.name) is not ParameterSource.COMMANDLINE:
        return
    name = parameter.name.removeprefix(_PREFIX)
    given = context.meta.setdefault(_META, {})
    if isinstance(value, tuple) and parameter.multiple:
        value = (*given.get(name, ()), *value)
    given[name] = value


def _option(flag: str, **attributes: Any) -> click.Option:
    name = _PREFIX + flag.removeprefix("--").replace("-", "_")
    return click.Option((flag, name), callback=_remember, expose_value=False, **attributes)


def global_options() -> Iterable[click.Option]:
    """New instances of all of them."""
    count = click.IntRange(min=1)
    return (
        _option("--store", metavar="URL", help="The store: a path, local:///PATH, or another kiln's grpc+… URL."),
        _option("--builder", metavar="URL", help="Who builds: bwrap:// (here, the default), dummy://, or grpc+… URL."),
        _option("--json", is_flag=True, help="Results as JSON: one document, or JSON lines for streams."),
        _option("--events", metavar="FILE", help="Write the build's events to FILE, a line of JSON each."),
        _option("--allow-net", is_flag=True, help="Policy of a builder here: builds may ask for the network."),
        _option("--allow-path", metavar="PATH", multiple=True, help="Policy: builds may ask to see this host path."),
        _option("--uid-range", type=IdRange(), help="Policy: host user ids for builds, when root."),
        _option("--shell", metavar="PATH", help="Policy: the static shell that builds get as /bin/sh."),
        _option("--slots", metavar="N", type=count, help="Policy: builds at a time (default: the number of CPUs)."),
        _option("--max-memory", type=Size(), help="Policy: memory for all builds together (default: 80 % of it)."),
        _option("--max-disk", type=Size(), help="Policy: disk for one build (default: 20G)."),
        _option("--max-log", type=Size(), help="Policy: log of one build (default: 64M)."),
        _option("--max-processes", metavar="N", type=count, help="Policy: processes of one build (default: 4096)."),
        _option("--max-wall", type=Duration(), help="Policy: the longest a build may take (default: 6h)."),
        _option("--salt", metavar="TEXT", help="Policy: another salt is another cache of results."),
    )
