"""Watches one running build: its log, its limits, its end."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

from kiln.aio import Emit
from kiln.build.events import BuildEvent, Log, Sample, Stream, Usage
from kiln.sandbox.launcher import Ended, Launch
from kiln.sandbox.policy import Limits

_CHUNK = 65536
_TAIL_BYTES = 8192
_COALESCE_S = 0.01  # A log event costs a follower some 50 us; a build that writes line by line gets one for many.
_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class Stop:
    """The limit for which the build was ended (names as in `LimitDetail`)."""

    what: str
    limit: int
    peak: int


@dataclass(frozen=True, slots=True)
class Ending:
    """How it went. `stopped`: kiln ended it."""

    ended: Ended
    stopped: Stop | None
    log_bytes: int
    log_tail: bytes
    wall_s: float
    disk_peak: int | None
    """None where it ended before disk was first looked at."""


class Supervision:
    """One launch, from its start to its end."""

    def __init__(
        self,
        launch: Launch,
        *,
        logs: Mapping[int, Stream],
        limits: Limits,
        emit: Emit[BuildEvent],
        disk_bytes: Callable[[], int],
        sample: Callable[[], Usage],
        sample_every_s: float,
    ) -> None:
        self._launch = launch
        self._logs = logs
        self._limits = limits
        self._emit = emit
        self._disk_bytes = disk_bytes
        self._sample = sample
        self._sample_every_s = sample_every_s
        self._stopped: Stop | None = None
        self._log_bytes = 0
        self._tail = bytearray()
        self._disk_peak: int | None = None
        self._last_word = 0.0

    async def run(self) -> Ending:
        """Until nothing of it is left; cancelled, it kills the build first. Raises LaunchFailed or LauncherGone."""
        loop = asyncio.get_running_loop()
        started = self._last_word = loop.time()
        pumps = [asyncio.ensure_future(self._pump(descriptor, stream)) for descriptor, stream in self._logs.items()]
        watchers = [asyncio.ensure_future(self._watch_clock(started)), asyncio.ensure_future(self._watch_use())]
        try:
            ended = await asyncio.shield(self._launch.ended)
            wall_s = loop.time() - started
            await asyncio.gather(*pumps)
            if ended.exit_code == 0 and self._stopped is None:
                self._stopped = await self._over_disk_limit()
        finally:
            for task in watchers:
                task.cancel()
            self._launch.kill()
            # Whoever cancels gets control back only once all is dead; a second cancellation does not change that.
            await _uninterrupted(self._launch.ended)
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, *watchers, return_exceptions=True)
        return Ending(ended, self._stopped, self._log_bytes, bytes(self._tail), wall_s, self._disk_peak)

    def _stop(self, what: str, limit: int, peak: int) -> None:
        if self._stopped is None and not self._launch.ended.done():
            self._stopped = Stop(what, limit, peak)
            self._launch.kill()

    async def _pump(self, descriptor: int, stream: Stream) -> None:
        async for data in _chunks(descriptor, self._launch.ended):
            self._last_word = asyncio.get_running_loop().time()
            room = self._limits.log_bytes - self._log_bytes
            kept = data[:room]
            if kept:
                offset, self._log_bytes = self._log_bytes, self._log_bytes + len(kept)
                self._tail += kept
                del self._tail[:-_TAIL_BYTES]
                await self._emit(Log(kept, offset, stream))
            if len(kept) < len(data):
                self._stop("log", self._limits.log_bytes, self._log_bytes + len(data) - len(kept))

    async def _watch_clock(self, started: float) -> None:
        """Ends the build at its wall or silence limit."""
        loop = asyncio.get_running_loop()
        while True:
            deadlines = [(started + self._limits.wall_s, "wall", self._limits.wall_s)]
            if self._limits.silence_s is not None:
                deadlines.append((self._last_word + self._limits.silence_s, "silence", self._limits.silence_s))
            when, what, limit_s = min(deadlines)
            if (left := when - loop.time()) <= 0:
                self._stop(what, round(limit_s * 1000), round((limit_s - left) * 1000))
                return
            await asyncio.sleep(left)

    async def _watch_use(self) -> None:
        """Looks at the disk now and then, and emits samples where asked."""
        every_s = min(_POLL_S, self._sample_every_s) if self._sample_every_s else _POLL_S
        pause = every_s
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(pause)
            began = loop.time()
            if (over := await self._over_disk_limit()) is not None:
                self._stop(over.what, over.limit, over.peak)
                return
            if self._sample_every_s:
                await self._emit(Sample(self._sample()))
            # A scratch of a million files takes a while to look at: never spend more than a tenth of the time on it.
            pause = max(every_s, 10 * (loop.time() - began))

    async def _over_disk_limit(self) -> Stop | None:
        used = await asyncio.to_thread(self._disk_bytes)
        self._disk_peak = max(used, self._disk_peak or 0)
        return Stop("disk", self._limits.disk_bytes, used) if used > self._limits.disk_bytes else None


async def _chunks(descriptor: int, ended: "asyncio.Future[Ended]") -> AsyncIterator[bytes]:
    """What comes through the pipe `descriptor`, until its last writer is gone; small writes are gathered a little.

    Once the build has `ended`, what is in the pipe is all: on the host's network, a build can leave its end to others.
    """
    loop = asyncio.get_running_loop()
    os.set_blocking(descriptor, False)
    readable = asyncio.Event()
    loop.add_reader(descriptor, readable.set)
    ended.add_done_callback(lambda _: readable.set())
    try:
        while True:
            try:
                data = os.read(descriptor, _CHUNK)
            except BlockingIOError:
                if ended.done():
                    return
                readable.clear()
                await readable.wait()
                continue
            if not data:
                return
            yield data
            if len(data) < _CHUNK and not ended.done():
                await asyncio.wait([ended], timeout=_COALESCE_S)
    finally:
        loop.remove_reader(descriptor)


async def _uninterrupted(future: "asyncio.Future[Ended]") -> None:
    """Wait for `future`, however often we are cancelled; its own exception is the caller's to see elsewhere."""
    cancelled = False
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
