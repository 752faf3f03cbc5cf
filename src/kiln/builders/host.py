"""The host of builds: each has an id, is written down as it goes, and runs on without those who watch it."""

import asyncio
import json
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from types import MappingProxyType, TracebackType
from typing import Self

from kiln.aio import closing
from kiln.build.build_id import build_id as new_build_id
from kiln.build.digest import request_digest
from kiln.build.events import (
    Accepted,
    BuildEvent,
    Cancelling,
    Event,
    Failure,
    Finished,
    Heartbeat,
    Progress,
    Queued,
    Reason,
    Retry,
    Sample,
    Wait,
)
from kiln.build.model import BuildOptions, BuildRequest
from kiln.build.service import BuildHost, BuildInfo, BuildService, Capabilities
from kiln.build.wire_submission import Submission
from kiln.builders.cached import Keys
from kiln.builders.errors import (
    BeyondHead,
    BuildAmbiguous,
    BuildNotFound,
    HostClosing,
    PageInvalid,
    QueueFull,
    RunsElsewhere,
)
from kiln.builders.journal import Archive, encode_archive
from kiln.builders.kept import KeptFailures
from kiln.builders.recording import JOURNAL, LOG, Elsewhere, Live, Recording, ended, follow, log_path
from kiln.castore.castore import Castore
from kiln.castore.closure import missing_of_closure
from kiln.castore.local.database import BuildRow
from kiln.castore.local.store import LocalStore
from kiln.castore.local.trouble import host_trouble
from kiln.castore.model import Digest, DirectoryNode, FileNode
from kiln.errors import KilnError
from kiln.sandbox.claims import Claims, release

_CHUNK = 65536
_TAIL_BYTES = 8192
_SMALL_LOG_BYTES = 65536  # Kept without a detour over another thread, which costs more than writing them.
_PAGE = 50
_TOKENS_MAX = 10_000
_PRUNE_EVERY_S = 600.0


@dataclass(slots=True, eq=False)
class _Build:
    """One build of this host that has not ended."""

    live: Live
    submission: Submission
    created_s: float
    digest: bytes
    followers: int = 0
    cancelling: Cancelling | None = None
    finished: Finished | None = None
    """The inner service's verdict: from here on, nothing can cancel the build any more."""
    began: bool = False
    leader: str = ""
    """The build whose run it shares."""
    grace: asyncio.TimerHandle | None = None
    task: asyncio.Task[None] = field(init=False)


class Host(BuildHost):
    """Builds of one service, kept in one store. Use it as a context manager; leaving it cancels what runs."""

    def __init__(
        self,
        inner: BuildService,
        store: LocalStore,
        keys: Keys,
        *,
        kept_bytes_max: int = 10 << 30,
        builds_max: int = 10_000,
        heartbeat_s: float = 10.0,
        time_s: Callable[[], float] = time.time,
        monotonic_s: Callable[[], float] = time.monotonic,
        random_bits: Callable[[int], int] = secrets.randbits,
    ) -> None:
        self._inner = inner
        self._store = store
        self._keys = keys
        self._builds_max = builds_max
        self._heartbeat_s = heartbeat_s
        self._time_s = time_s
        self._monotonic_s = monotonic_s
        self._random_bits = random_bits
        self._epoch = f"{random_bits(64):016x}"
        self._claims = Claims(store)
        self._kept = KeptFailures(store, bytes_max=kept_bytes_max)
        self._one_more_kept = asyncio.Event()
        self._builds: dict[str, _Build] = {}
        self._tokens: dict[tuple[str, bytes], str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._maxima = BuildOptions()
        self._closing = False

    async def __aenter__(self) -> Self:
        self._maxima = (await self._inner.capabilities()).maxima
        self._housekeeping = asyncio.create_task(self._prune())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # No TaskGroup: it would wrap what the block raises, and a build never fails its host.
        self._housekeeping.cancel()
        await self.close(cancel=True)
        await asyncio.wait([self._housekeeping])
        self._claims.close()

    async def close(self, *, cancel: bool, why: str = "this kiln is shutting down") -> None:
        """Take no more builds and wait until those there are have ended; with `cancel`, end them."""
        self._closing = True
        if cancel:
            for build in list(self._builds.values()):
                self._begin_cancel(build, Cancelling("kiln", why))
        while self._tasks:  # Builds, and then the removal of their directories.
            await asyncio.gather(*self._tasks)

    async def submit(self, request: BuildRequest, options: BuildOptions, *, client_token: str = "") -> str:
        if self._closing:
            raise HostClosing
        digest = request_digest(request)
        if client_token and (known := self._tokens.get((client_token, digest))):
            return known
        if len(self._builds) >= self._builds_max:
            raise QueueFull(self._builds_max)
        created_s = self._time_s()
        name = new_build_id(int(created_s * 1000), self._random_bits(35))
        options = replace(options, build_id=name)
        submission = Submission(request, options, client_token)
        directory = self._claims.make(name)
        try:
            live = Live(name, directory, time_s=self._time_s, monotonic_s=self._monotonic_s)
            effective = _effective(options, self._maxima)
            live.record(Accepted(digest, self._keys.key(request), effective=effective, server_epoch=self._epoch))
            build = _Build(live, submission, created_s, digest)
            self._store.builds.put(self._row(build, encode_archive(submission)))
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(f"{directory}/{JOURNAL}")
            release(directory)
            raise
        self._builds[name] = build
        build.task = asyncio.create_task(self._own(build), name=f"build {name}")
        self._tasks.add(build.task)
        build.task.add_done_callback(self._tasks.discard)
        if client_token:
            self._remember(client_token, digest, name)
        return name

    @asynccontextmanager
    async def watch(
        self, build_id: str, *, after_seq: int = 0, without_log: bool = False, recorded_only: bool = False
    ) -> AsyncIterator[AsyncIterator[Event]]:
        recording = await self._recording(build_id)
        if after_seq > recording.head:
            raise BeyondHead("event", asked=after_seq, head=recording.head)
        events = follow(
            recording,
            after_seq=after_seq,
            without_log=without_log,
            recorded_only=recorded_only,
            heartbeat_s=self._heartbeat_s,
        )
        with self._counted(recording.build_id):
            async with closing(events):
                yield events

    async def read_log(
        self, build_id: str, *, offset: int = 0, limit: int | None = None, follow: bool = False
    ) -> AsyncIterator[tuple[int, bytes]]:
        recording = await self._recording(build_id)
        if offset < 0:
            offset = max(0, recording.log_bytes + offset)
        elif offset > recording.log_bytes:
            raise BeyondHead("log offset", asked=offset, head=recording.log_bytes)
        while limit is None or limit > 0:
            version, is_over = recording.version, recording.ended
            data = recording.read_log(offset, _CHUNK if limit is None else min(limit, _CHUNK))
            if data:
                yield offset, data
                offset += len(data)
                limit = None if limit is None else limit - len(data)
            elif is_over or not follow:
                return
            else:
                await recording.changed(version)

    async def cancel(self, build_id: str, *, by: str, why: str = "", force: bool = False) -> BuildInfo:
        row = self._row_of(build_id)
        build = self._builds.get(row.id)
        if build is None:
            if row.ended is None:
                raise RunsElsewhere(row.id)
            return await self.get(row.id)
        builds = [build]
        if force:
            leader = build.leader or row.id
            builds += [b for b in self._builds.values() if b is not build and leader in {b.leader, b.live.build_id}]
        for each in builds:
            self._begin_cancel(each, Cancelling(by, why))
        await asyncio.wait([each.task for each in builds])
        return await self.get(row.id)

    async def get(self, build_id: str, *, with_request: bool = False) -> BuildInfo:
        return self._info(self._row_of(build_id), with_request=with_request)

    async def list(
        self,
        *,
        labels: Mapping[str, str] = MappingProxyType({}),
        running_only: bool = False,
        limit: int = 0,
        page: str = "",
    ) -> tuple[tuple[BuildInfo, ...], str]:
        limit = limit or _PAGE
        found: list[BuildRow] = []
        for row in self._newest(_from_page(page), running_only=running_only):
            if labels.items() <= json.loads(row.labels).items():
                if len(found) == limit:
                    last = found[-1]
                    return tuple(self._info(row) for row in found), f"{last.created!r} {last.id}"
                found.append(row)
        return tuple(self._info(row) for row in found), ""

    async def find_missing(
        self, *, blobs: Iterable[Digest], directories: Iterable[Digest], closure: bool = False
    ) -> tuple[frozenset[Digest], frozenset[Digest]]:
        lacking = await self._store.blobs.missing(blobs)
        if not closure:
            return lacking, await self._store.directories.missing(directories)
        castore = Castore(self._store.blobs, self._store.directories)
        below = await missing_of_closure([DirectoryNode(digest, 0) for digest in directories], castore)
        return lacking | below.blobs, below.directories

    async def capabilities(self) -> Capabilities:
        return await self._inner.capabilities()

    async def _prune(self) -> None:
        """Remove kept failures whose time is over, or that take too much room."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_PRUNE_EVERY_S):
                    await self._one_more_kept.wait()
            self._one_more_kept.clear()
            with suppress(KilnError, OSError):  # The next time will do.
                await asyncio.to_thread(self._kept.prune, self._time_s())

    async def _own(self, build: _Build) -> None:
        """One build, from its first step to its end."""
        build.began = True
        try:
            finished = await self._run(build)
        except asyncio.CancelledError:
            # Not by `cancel`: whoever holds the host is being torn down.
            await self._end(build, Finished(_cancelled(Cancelling("kiln", "it is shutting down"))))
            raise
        await self._end(build, finished)

    async def _run(self, build: _Build) -> Finished:
        """Run it on the inner service, writing down what that says; its verdict, or ours where it has none."""
        options = build.submission.options
        if build.cancelling is not None:
            return Finished(_cancelled(build.cancelling))
        try:
            async with self._inner.build(build.submission.request, options) as events:
                async for body in events:
                    if isinstance(body, Finished):
                        build.finished = body
                        break
                    self._take(build, body)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            if build.cancelling is None or task.uncancel():
                raise
            return Finished(_cancelled(build.cancelling))
        except KilnError as error:
            return Finished(Failure(Reason.INFRASTRUCTURE, str(error), Retry.ELSEWHERE))
        except OSError as error:
            return Finished(Failure(Reason.INFRASTRUCTURE, host_trouble(error, self._store.path), Retry.ELSEWHERE))
        except Exception as error:  # noqa: BLE001 - A bug below ends one build, not all of them.
            said = f"a bug in kiln ended the build: {type(error).__name__}: {error}"
            return Finished(Failure(Reason.INFRASTRUCTURE, said, Retry.ELSEWHERE))
        if build.finished is None:
            return Finished(Failure(Reason.INFRASTRUCTURE, "the builder gave no verdict", Retry.ELSEWHERE))
        return build.finished

    @staticmethod
    def _take(build: _Build, body: BuildEvent) -> None:
        match body:
            case Progress() | Sample() | Heartbeat():
                build.live.pass_on(body)
            case Accepted() | Finished():
                raise AssertionError(body)
            case _:
                if isinstance(body, Queued) and body.wait is Wait.MERGED:
                    build.leader = body.detail
                build.live.record(body)

    def _begin_cancel(self, build: _Build, cancelling: Cancelling) -> None:
        if build.cancelling is not None or build.finished is not None:
            return
        build.cancelling = cancelling
        with suppress(OSError):  # A full disk keeps nobody from cancelling.
            build.live.record(cancelling)
        if build.began:  # A task that is cancelled before its first step never takes it.
            build.task.cancel()

    async def _end(self, build: _Build, finished: Finished) -> None:
        """Write the verdict down, put journal and log where they stay, and tell the followers."""
        build.finished = finished
        live = build.live
        if isinstance(finished.verdict, Failure) and not finished.verdict.log_tail:
            tail = live.read_log(max(0, live.log_bytes - _TAIL_BYTES), _TAIL_BYTES)
            finished = replace(finished, verdict=replace(finished.verdict, log_tail=tail))
        log, path, lost = None, live.log_path, False
        try:
            log = await self._keep_log(live)
            path = await log_path(self._store, log) or path
        except (KilnError, OSError):
            lost = True
        truncated = finished.log_truncated or live.log_truncated or lost
        builder = finished.builder or live.builder
        finished = replace(finished, builder=builder, log=log, log_truncated=truncated, spans=live.spans)
        if build.grace is not None:
            build.grace.cancel()
        try:
            live.record(finished)
            archive = encode_archive(build.submission, live.last, live.seal(path))
            self._store.builds.put(self._row(build, archive, ended_s=self._time_s()))
        except (KilnError, OSError):
            # The store takes no more: the build is remembered as long as we live, and ended by whoever recovers.
            live.end_unwritten(finished)
            return
        del self._builds[live.build_id]
        # Nobody waits for it: removing a directory takes half a millisecond.
        clearing = asyncio.create_task(self._clear(live.directory))
        self._tasks.add(clearing)
        clearing.add_done_callback(self._tasks.discard)

    async def _clear(self, directory: str) -> None:
        if await asyncio.to_thread(_clear, directory):
            self._one_more_kept.set()

    async def _keep_log(self, live: Live) -> FileNode:
        if not live.log_bytes:
            return FileNode(self._store.scheme.empty, 0)
        if live.log_bytes <= _SMALL_LOG_BYTES:
            return await self._store.add_blob(live.read_log(0, live.log_bytes))
        node = (await self._store.ingest(live.log_path, adopt=True)).node
        assert isinstance(node, FileNode)
        return node

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        """Somebody follows the build inside the block; with the last one it may end."""
        build = self._builds.get(name)
        if build is None:
            yield
            return
        build.followers += 1
        if build.grace is not None:
            build.grace.cancel()
            build.grace = None
        try:
            yield
        finally:
            build.followers -= 1
            options = build.submission.options
            if not build.followers and options.cancel_on_disconnect:
                cancelling = Cancelling("disconnect", "the last one who watched it left")
                if options.disconnect_grace_s:
                    loop = asyncio.get_running_loop()
                    build.grace = loop.call_later(options.disconnect_grace_s, self._begin_cancel, build, cancelling)
                else:
                    self._begin_cancel(build, cancelling)

    def _remember(self, token: str, digest: bytes, name: str) -> None:
        self._tokens[token, digest] = name
        if len(self._tokens) > _TOKENS_MAX:
            del self._tokens[next(iter(self._tokens))]

    def _row(self, build: _Build, archive: bytes, *, ended_s: float | None = None) -> BuildRow:
        labels = json.dumps(dict(build.submission.options.labels), sort_keys=True)
        return BuildRow(build.live.build_id, build.created_s, build.digest, ended_s, labels, archive)

    def _row_of(self, prefix: str) -> BuildRow:
        row = self._store.builds.get(prefix)
        if row is not None:
            return row
        rows = self._store.builds.with_prefix(prefix, limit=2) if prefix else []
        if not rows:
            raise BuildNotFound(prefix)
        if len(rows) > 1:
            raise BuildAmbiguous(prefix)
        return rows[0]

    async def _recording(self, build_id: str) -> Recording:
        build = self._builds.get(build_id)
        if build is not None:
            return build.live
        row = self._row_of(build_id)
        build = self._builds.get(row.id)
        if build is not None:
            return build.live
        if row.ended is None:
            return Elsewhere(self._store, row.id)
        return await ended(self._store, row.id, Archive.decode(row.record))

    def _info(self, row: BuildRow, *, with_request: bool = False) -> BuildInfo:
        archive = Archive.decode(row.record)
        build = self._builds.get(row.id)
        if build is not None:
            last = build.live.last
        elif row.ended is None:
            last = Elsewhere(self._store, row.id).last
        else:
            last = archive.last
        return BuildInfo(
            row.id,
            last,
            first_seq=1,
            head_seq=0 if last is None else last.seq,
            request=archive.submission.request if with_request else None,
            labels=json.loads(row.labels),
            request_digest=row.digest,
        )

    def _newest(self, before: BuildRow | None, *, running_only: bool) -> Iterator[BuildRow]:
        if running_only:
            place = None if before is None else (before.created, before.id)
            running = reversed(self._store.builds.running())
            yield from (row for row in running if place is None or (row.created, row.id) < place)
            return
        while rows := self._store.builds.newest(limit=_PAGE, before=before):
            yield from rows
            before = rows[-1]


def _clear(directory: str) -> bool:
    """Remove what the host has in a build's directory; returns whether it is a kept failure.

    The rest is the backend's: a kept failure stays, and so does the scratch of a run that others still share, whose
    backend, once it took that away, finds no journal and removes the rest.
    """
    is_kept = os.path.lexists(f"{directory}/kept")
    for name in (JOURNAL, LOG):
        with suppress(FileNotFoundError):
            os.unlink(f"{directory}/{name}")
    if is_kept or not os.path.lexists(f"{directory}/scratch"):
        release(directory)
    return is_kept


def _cancelled(cancelling: Cancelling) -> Failure:
    why = f": {cancelling.why}" if cancelling.why else ""
    return Failure(Reason.CANCELLED, f"cancelled by {cancelling.by}{why}")


def _effective(options: BuildOptions, maxima: BuildOptions) -> BuildOptions:
    """The options within what the service allows.

    Memory that nobody asked for is the builder's choice (`Assigned` has it), and so are CPUs: all of them.
    """

    def least(asked: int, most: int) -> int:
        return min(asked or most, most) if most else asked

    def least_s(asked: float | None, most: float | None) -> float | None:
        return asked if most is None else min(asked or most, most)

    return replace(
        options,
        build_id="",
        labels={},
        wall_s=least_s(options.wall_s, maxima.wall_s),
        silence_s=least_s(options.silence_s, maxima.silence_s),
        memory_bytes=least(options.memory_bytes, maxima.memory_bytes) if options.memory_bytes else 0,
        cpu_millis=least(options.cpu_millis, maxima.cpu_millis) if options.cpu_millis else 0,
        processes=least(options.processes, maxima.processes),
        disk_bytes=least(options.disk_bytes, maxima.disk_bytes),
        log_bytes=least(options.log_bytes, maxima.log_bytes),
    )


def _from_page(page: str) -> BuildRow | None:
    if not page:
        return None
    created, _, name = page.partition(" ")
    try:
        return BuildRow(name, float(created), b"", None, "", b"")
    except ValueError as error:
        raise PageInvalid(page) from error
