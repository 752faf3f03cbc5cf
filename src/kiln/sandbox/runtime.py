"""The interface of everything that can run a root plan."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from kiln.sandbox.launcher import Order
from kiln.sandbox.plan import RootPlan
from kiln.sandbox.uids import Identity


@dataclass(frozen=True, slots=True)
class Sources:
    """The host paths behind a plan's mounts: absolute, without symlinks."""

    inputs: tuple[str, ...]
    """By index of the request's inputs; empty for a symlink."""
    scratch: Mapping[str, str]
    shell: str = ""


@dataclass(frozen=True, slots=True)
class Streams:
    """Descriptors for the command. `terminal`: they are somebody's terminal (`kiln shell`)."""

    stdin: int
    stdout: int
    stderr: int
    terminal: bool = False


@dataclass(frozen=True, slots=True)
class RuntimeInfo:
    """What a runtime is, and where it falls short of the contract (name -> why)."""

    name: str
    version: str
    builder_id: str
    weaker: Mapping[str, str] = field(default_factory=dict)


class Runtime(Protocol):
    """Turns a plan into the order that starts it."""

    @property
    def info(self) -> RuntimeInfo:
        """What it is."""

    def order(
        self, plan: RootPlan, sources: Sources, identity: Identity | None, streams: Streams
    ) -> AbstractContextManager[Order]:
        """The order; its descriptors are valid inside the block. `identity` None: rootless."""
