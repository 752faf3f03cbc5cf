"""A wrapper: equal requests at the same time share one run, and each gets all of its events."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import IO

from kiln.aio import closing
from kiln.build.digest import request_digest
from kiln.build.events import BuildEvent, Finished, Heartbeat, Log, Progress, Queued, Sample, Stream, Wait
from kiln.build.model import BuildOptions, BuildRequest, CacheUse
from kiln.build.service import BuildService, Capabilities
from kiln.builders.errors import BuilderBroken
from kiln.builders.latest import Latest

_CHUNK = 65536
_IN_MEMORY_BYTES = 1 << 20

_Key = tuple[object, ...]


@dataclass(slots=True)
class _Stretch:
    """Log bytes of one stream, from `start` to `end` of the spool; the last stretch may grow."""

    stream: Stream
    start: int
    end: int


class _Run:
    """One run and what it said so far: memory grows with its events, not with its log, nor with who shares it."""

    task: asyncio.Task[None]

    def __init__(self, leader: str, spool_dir: str) -> None:
        self.sharers = 0
        self.is_over = False
        """It has its verdict, though its end may still be under way."""
        self._leader = leader
        self._said: list[BuildEvent | _Stretch] = []
        self._log: IO[bytes] = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES, dir=spool_dir)  # noqa: SIM115 - `end`.
        self._log_bytes = 0
        self._latest = Latest()
        self._error: Exception | None = None
        self._version = 0
        self._pulse = asyncio.Event()

    async def go(self, build: AbstractAsyncContextManager[AsyncIterator[BuildEvent]]) -> None:
        """Run it. The verdict is told once nothing is left running."""
        finished = None
        try:
            async with build as events:
                async for event in events:
                    if isinstance(event, Finished):
                        finished = event
                        self.is_over = True
                        break
                    self._take(event)
            if finished is not None:
                self._said.append(finished)
            else:
                self._error = BuilderBroken("the builder gave no verdict")
        except Exception as error:  # noqa: BLE001 - Raised by everybody's `events`.
            self._error = error
        finally:
            self.is_over = True
            self._wake()

    async def end(self) -> None:
        """Nobody is interested any more: end it, unless it is about to end, and wait until nothing is left of it."""
        if not self.is_over:
            self.task.cancel()
        cancelled = False
        while not self.task.done():
            try:
                await asyncio.wait([self.task])
            except asyncio.CancelledError:  # What still runs would outlive its owner.
                cancelled = True
        self._log.close()
        if cancelled:
            raise asyncio.CancelledError

    async def events(self, *, merged: bool) -> AsyncIterator[BuildEvent]:
        """All that was said from the beginning on."""
        if merged:
            yield Queued(Wait.MERGED, self._leader)
        index = offset = passed = 0
        while True:
            version = self._version
            while index < len(self._said):
                said = self._said[index]
                if not isinstance(said, _Stretch):
                    index += 1
                    yield said
                    if isinstance(said, Finished):
                        return
                elif offset < said.end:
                    data = self._read(offset, min(said.end - offset, _CHUNK))
                    yield Log(data, offset, said.stream)
                    offset += len(data)
                elif index + 1 < len(self._said):
                    index += 1
                else:
                    break
            passed, latest = self._latest.since(passed)
            for event in latest:
                yield event
            if self._error is not None:
                raise self._error
            while self._version == version:
                await self._pulse.wait()

    def _take(self, event: BuildEvent) -> None:
        match event:
            case Progress() | Sample() | Heartbeat():
                self._latest.say(event)
            case Log(data, _, stream):
                self._log.seek(self._log_bytes)
                self._log.write(data)
                self._log_bytes += len(data)
                last = self._said[-1] if self._said else None
                if isinstance(last, _Stretch) and last.stream is stream:
                    last.end = self._log_bytes
                else:
                    self._said.append(_Stretch(stream, self._log_bytes - len(data), self._log_bytes))
            case _:
                self._said.append(event)
        self._wake()

    def _read(self, offset: int, size: int) -> bytes:
        self._log.seek(offset)
        return self._log.read(size)

    def _wake(self) -> None:
        self._version += 1
        self._pulse.set()
        self._pulse = asyncio.Event()


def _key(request: BuildRequest, options: BuildOptions) -> _Key:
    """What has to be equal for a run to be shared: what is asked, and whatever could make it fail or fail otherwise."""
    return (
        request_digest(request),
        options.cache,
        options.wall_s,
        options.silence_s,
        options.memory_bytes,
        options.cpu_millis,
        options.processes,
        options.disk_bytes,
        options.log_bytes,
        options.keep_on_failure_s,
        options.split_stderr,
    )


class Deduplicated(BuildService):
    """Shares runs among callers. A run ends early only when the last who wants it leaves."""

    def __init__(self, inner: BuildService, *, spool_dir: str) -> None:
        """`spool_dir` takes logs that are too long for memory, without a name."""
        self._inner = inner
        self._spool_dir = spool_dir
        self._runs: dict[_Key, _Run] = {}

    async def capabilities(self) -> Capabilities:
        return await self._inner.capabilities()

    @asynccontextmanager
    async def build(self, request: BuildRequest, options: BuildOptions) -> AsyncIterator[AsyncIterator[BuildEvent]]:
        if options.cache is CacheUse.BYPASS:
            async with self._inner.build(request, options) as events:
                yield events
            return
        key = _key(request, options)
        run = self._runs.get(key)
        merged = run is not None and not run.is_over
        if run is None or not merged:
            run = self._runs[key] = _Run(options.build_id, self._spool_dir)
            run.task = asyncio.create_task(run.go(self._inner.build(request, options)))
        run.sharers += 1
        try:
            async with closing(run.events(merged=merged)) as events:
                yield events
        finally:
            run.sharers -= 1
            if not run.sharers:
                if self._runs.get(key) is run:
                    del self._runs[key]
                await run.end()
