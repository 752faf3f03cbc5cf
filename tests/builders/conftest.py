"""A small real builder whose builds are coroutines, and what the tests of builders need around it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kiln.aio import Emit, streaming
from kiln.build.events import Assigned, BuilderInfo, BuildEvent, Finished, Log, Success
from kiln.build.model import BuildOptions, BuildRequest
from kiln.build.service import BuildService, Capabilities
from kiln.builders.cached import Keys
from kiln.builders.host import Host
from kiln.castore.local.store import LocalStore

Script = Callable[[BuildRequest, BuildOptions, Emit[BuildEvent]], Awaitable[None]]


class ScriptedBuilder(BuildService):
    """Runs `script` for each build, and counts."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.started = 0
        self.running = 0
        self.running_most = 0

    async def capabilities(self) -> Capabilities:
        return Capabilities(maxima=BuildOptions(wall_s=60.0, log_bytes=1 << 20))

    @asynccontextmanager
    async def build(self, request: BuildRequest, options: BuildOptions) -> AsyncIterator[AsyncIterator[BuildEvent]]:
        async def produce(emit: Emit[BuildEvent]) -> None:
            self.started += 1
            self.running += 1
            self.running_most = max(self.running, self.running_most)
            try:
                await self.script(request, options, emit)
            finally:
                try:
                    await asyncio.sleep(0)  # An end takes a moment, also of a cancelled build.
                finally:
                    self.running -= 1

        async with streaming(produce, capacity=4) as events:
            yield events


async def hello(request: BuildRequest, options: BuildOptions, emit: Emit[BuildEvent]) -> None:
    """Says a word and succeeds, with nothing made."""
    del request, options
    await emit(Assigned(BuilderInfo(worker="scripted")))
    await emit(Log(b"hello\n", 0))
    await emit(Finished(Success((), cacheable=True)))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    opened = LocalStore.open(str(tmp_path / "store"))
    yield opened
    opened.close()


@pytest.fixture
def keys(store: LocalStore) -> Keys:
    return Keys(store.scheme)


@pytest.fixture
def scripted() -> Callable[..., ScriptedBuilder]:
    """Makes a builder from a script; without one, builds say hello and succeed."""

    def make(script: Script = hello) -> ScriptedBuilder:
        return ScriptedBuilder(script)

    return make


@pytest.fixture
def hosting(store: LocalStore, keys: Keys) -> Callable[..., Host]:
    """Makes a host over a builder; to be used as a context manager."""

    def make(inner: BuildService, **options: float) -> Host:
        return Host(inner, store, keys, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def a_request() -> Callable[..., BuildRequest]:
    """Makes a request without inputs; different words make different requests."""

    def make(*words: str) -> BuildRequest:
        return BuildRequest(command=("/bin/true", *words))

    return make
