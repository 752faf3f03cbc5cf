"""A host whose builds are coroutines, served as kiln serves."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from kiln.aio import Emit, streaming
from kiln.build.events import Assigned, BuilderInfo, BuildEvent, Finished, Log, Success
from kiln.build.model import BuildOptions, BuildRequest
from kiln.build.service import BuildService, Capabilities
from kiln.builders.cached import Keys
from kiln.builders.host import Host
from kiln.castore.castore import Castore
from kiln.castore.local.store import LocalStore
from kiln.castore.model import BLAKE3_DOUBLED, Scheme
from kiln.protos.kiln.build.v1.build_pb2_grpc import BuildServiceStub
from kiln.rpc.url import parse_url
from kiln.server.listen import Security
from kiln.server.serve import Serving, serving

Script = Callable[[BuildRequest, Emit[BuildEvent]], Awaitable[None]]


async def hello(_request: BuildRequest, emit: Emit[BuildEvent]) -> None:
    await emit(Log(b"hello\n", 0))
    await emit(Finished(Success((), cacheable=True)))


@dataclass
class Scripted(BuildService):
    """Runs `script` for each build, and knows how many run."""

    scheme: Scheme
    script: Script = hello
    started: int = 0
    running: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    async def capabilities(self) -> Capabilities:
        builder = BuilderInfo(worker="scripted", contract="kiln-contract-1")
        return Capabilities(features=("samples",), builders=(builder,), castore_scheme=self.scheme.name)

    @asynccontextmanager
    async def build(self, request: BuildRequest, options: BuildOptions) -> AsyncIterator[AsyncIterator[BuildEvent]]:
        del options

        async def produce(emit: Emit[BuildEvent]) -> None:
            self.started += 1
            self.running += 1
            self.idle.clear()
            try:
                await emit(Assigned(BuilderInfo(worker="scripted")))
                await self.script(request, emit)
            finally:
                self.running -= 1
                if not self.running:
                    self.idle.set()

        async with streaming(produce, capacity=4) as events:
            yield events


@dataclass
class Served:
    """A server in this process, and a channel to it."""

    server: Serving
    builder: Scripted
    host: Host
    store: LocalStore
    channel: grpc.aio.Channel

    @property
    def kiln(self) -> Any:
        return BuildServiceStub(self.channel)


ServeBuilds = Callable[..., AbstractAsyncContextManager[Served]]


@pytest.fixture
def serve_builds(tmp_path: Path) -> ServeBuilds:
    """Serves builds made by a script, at a socket."""

    @asynccontextmanager
    async def served(
        script: Script = hello,
        *,
        scheme: Scheme = BLAKE3_DOUBLED,
        heartbeat_s: float = 15.0,
        addresses: tuple[str, ...] = (),
        security: Security = Security(),  # noqa: B008  A frozen value.
        **limits: Any,
    ) -> AsyncIterator[Served]:
        socket = tmp_path / "kiln.sock"
        store = LocalStore.open(str(tmp_path / "store"), scheme=scheme)
        urls = [parse_url(text, dict.fromkeys(("unix", "http", "https"), frozenset())) for text in addresses]
        urls = urls or [parse_url(f"unix://{socket}", {"unix": frozenset()})]
        log = logging.getLogger("kiln.tests")
        try:
            builder = Scripted(scheme, script)
            async with (
                Host(builder, store, Keys(scheme), heartbeat_s=heartbeat_s) as host,
                serving(host, Castore(store.blobs, store.directories), urls, security, log=log, **limits) as server,
                grpc.aio.insecure_channel(f"unix:{socket}") as channel,
            ):
                yield Served(server, builder, host, store, channel)
        finally:
            store.close()

    return served
