"""The two interfaces of whoever runs builds.

`BuildService` is that of backends and wrappers, for one build; `BuildHost` that of a host that owns its builds,
remembers them and lets anybody follow.
"""

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from kiln.build.events import BuilderInfo, BuildEvent, Event
from kiln.build.model import BuildOptions, BuildRequest
from kiln.castore.model import Digest


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a service can run, under which maxima, and which castore scheme its nodes are of."""

    systems: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    builders: tuple[BuilderInfo, ...] = ()
    maxima: BuildOptions = field(default_factory=BuildOptions)
    castore_scheme: str = "blake3/doubled"
    message_bytes_max: int = 0
    version: str = ""


class BuildService(Protocol):
    """Runs one build at a time of each caller's. Backends implement it; wrappers implement it around another."""

    def build(
        self, request: BuildRequest, options: BuildOptions
    ) -> AbstractAsyncContextManager[AsyncIterator[BuildEvent]]:
        """The build's events inside the block, the last one `Finished`. A failed build is such an event, no exception.

        Leaving the block before `Finished` cancels the build, and returns only when nothing of it is left running or
        mounted. `Accepted` comes from whoever records builds, not from backends.
        """

    async def capabilities(self) -> Capabilities:
        """What can be asked of this service now."""


@dataclass(frozen=True, slots=True)
class BuildInfo:
    """One build as a host remembers it."""

    build_id: str
    last: Event | None
    first_seq: int
    head_seq: int
    request: BuildRequest | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    request_digest: bytes = b""


class BuildHost(Protocol):
    """Owns builds: each has an id, goes on without its followers, and can be watched from any point, also later.

    The surface of `kiln.build.v1`; the same in process (`kiln.builders.host`) and over gRPC (`kiln.builders.grpc`).
    """

    async def submit(self, request: BuildRequest, options: BuildOptions, *, client_token: str = "") -> str:
        """Accept the build and return its id. The same token and request give the same build."""

    def watch(
        self, build_id: str, *, after_seq: int = 0, without_log: bool = False, recorded_only: bool = False
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Events after `after_seq`, ending with `Finished`. NotFound, or OutOfRange beyond the head."""

    def read_log(
        self, build_id: str, *, offset: int = 0, limit: int | None = None, follow: bool = False
    ) -> AsyncIterator[tuple[int, bytes]]:
        """(offset, bytes) of the log from `offset` (below 0: from the end); with `follow` until the build ends."""

    async def cancel(self, build_id: str, *, by: str, why: str = "", force: bool = False) -> BuildInfo:
        """End the build; returns when nothing of it runs or is mounted. A build that ended already stays as it is."""

    async def get(self, build_id: str, *, with_request: bool = False) -> BuildInfo:
        """What is known of one build. An unambiguous prefix of the id will do."""

    async def list(
        self,
        *,
        labels: Mapping[str, str] = MappingProxyType({}),
        running_only: bool = False,
        limit: int = 0,
        page: str = "",
    ) -> tuple[tuple[BuildInfo, ...], str]:
        """Newest first, and the next page's name (empty: none)."""

    async def find_missing(
        self, *, blobs: Iterable[Digest], directories: Iterable[Digest], closure: bool = False
    ) -> tuple[frozenset[Digest], frozenset[Digest]]:
        """Which of these the host's castore lacks; with `closure`, whatever is below the directories too."""

    async def capabilities(self) -> Capabilities:
        """What can be asked of this host now."""

    async def close(self, *, cancel: bool, why: str = "") -> None:
        """Take no more builds, and return once those there are have ended; with `cancel`, end them."""
