"""Where followers find a build's events and log, whether it runs here, in another process, or has ended."""

import asyncio
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace

from kiln.build.events import (
    Accepted,
    Assigned,
    AttemptEnded,
    BuilderInfo,
    Event,
    Finished,
    Heartbeat,
    Log,
    Notice,
    PassingEvent,
    Phase,
    PhaseSpan,
    Queued,
    RecordedEvent,
)
from kiln.builders.errors import BuildNotFound, OwnerGone
from kiln.builders.journal import Archive, Record, decode_records, encode_record
from kiln.builders.latest import Latest
from kiln.castore.errors import ContentMissing
from kiln.castore.local.files import write_all
from kiln.castore.local.store import LocalStore
from kiln.castore.model import FileNode
from kiln.sandbox.claims import is_held, settled

JOURNAL, LOG = "journal", "log"

_CHUNK = 65536
_RECENT = 16  # Events kept decoded for those who keep up: with logs of at most 64 KiB each, 1 MiB a build.
_POLL_S = 0.05  # How soon pending log bytes of another process's build have to be readable.
_POLLS_PER_LOOK = 20  # How many of these until we ask whether the other process is alive.


class Recording(ABC):
    """One build's journal and log. Positions in both are bytes and stay valid whatever becomes of the build."""

    build_id: str

    @property
    @abstractmethod
    def head(self) -> int:
        """`seq` of the newest event."""

    @property
    @abstractmethod
    def last(self) -> Event | None:
        """The newest event; of a log the data may be left out."""

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether `Finished` is in the journal, and the log complete."""

    @property
    @abstractmethod
    def log_bytes(self) -> int:
        """How long the log is so far."""

    @abstractmethod
    def read(self, position: int) -> Sequence[Record]:
        """Some records from `position` on; none at the head."""

    @abstractmethod
    def read_log(self, offset: int, size: int) -> bytes:
        """At most `size` bytes of the log from `offset`; fewer where it ends."""

    version = 0
    """Another number whenever there may be more to be had."""

    @abstractmethod
    async def changed(self, since: int) -> None:
        """Until `version` is not `since`."""

    def passing(self, after: int) -> tuple[int, Sequence[PassingEvent]]:
        """The latest passing event of each kind said after the counter `after`, and the counter now."""
        return after, ()


class Live(Recording):
    """A build of this process: what it says is written down before anybody sees it. All calls from its event loop."""

    def __init__(
        self, build_id: str, directory: str, *, time_s: Callable[[], float], monotonic_s: Callable[[], float]
    ) -> None:
        self.build_id = build_id
        self.directory = directory
        self._time_s = time_s
        self._monotonic_s = monotonic_s
        self._began_s = monotonic_s()
        self._attempt = 1
        self._spans: list[PhaseSpan] = []
        self._journal: int | None = None
        self._journal_bytes = 0
        self._sealed: bytes | None = None
        self._log: int | None = None
        self._log_bytes = 0
        self._log_path = f"{directory}/{LOG}"
        self._recent: deque[Record] = deque(maxlen=_RECENT)
        self._last: Event | None = None
        self._latest = Latest()
        self._pulse = asyncio.Event()
        self.log_truncated = False
        self.builder: BuilderInfo | None = None
        """Whoever was assigned last."""

    @property
    def head(self) -> int:
        return 0 if self._last is None else self._last.seq

    @property
    def last(self) -> Event | None:
        return self._last

    @property
    def ended(self) -> bool:
        return self._last is not None and isinstance(self._last.body, Finished)

    @property
    def log_bytes(self) -> int:
        return self._log_bytes

    @property
    def spans(self) -> tuple[PhaseSpan, ...]:
        """The phases so far; the last one lasts until now."""
        self._end_phase(self._elapsed_us())
        return tuple(self._spans)

    @property
    def log_path(self) -> str:
        """The file the log is in; there is none while nothing was written."""
        return self._log_path

    def record(self, body: RecordedEvent) -> None:
        """Write an event down, then let followers have it. Raises OSError; it is then as if it had not been said."""
        elapsed_us = self._elapsed_us()
        if isinstance(body, Log):
            self._append_log(body.data)
            body = replace(body, offset=self._log_bytes - len(body.data))
        elif isinstance(body, Phase):
            self._end_phase(elapsed_us)
            self._spans.append(PhaseSpan(body.kind, elapsed_us, elapsed_us))
        elif isinstance(body, Assigned):
            self.builder = body.builder
        elif isinstance(body, Notice):
            self.log_truncated |= body.kind == "LOG_TRUNCATED"
        event = self._event(body, elapsed_us)
        start = self._journal_bytes
        self._append(encode_record(event), waits=isinstance(body, Accepted | Queued))
        if isinstance(body, AttemptEnded):
            self._attempt += 1
        log_bytes = len(body.data) if isinstance(body, Log) else 0
        self._say(Record(event, log_bytes, start, self._journal_bytes))

    def end_unwritten(self, finished: Finished) -> None:
        """The verdict, where the disk takes no more: only in memory."""
        if not self.ended:
            event = self._event(finished, self._elapsed_us())
            self._say(Record(event, 0, self._journal_bytes, self._journal_bytes + 1))

    def pass_on(self, body: PassingEvent) -> None:
        """Let followers have a passing event; whoever is slow gets the latest of its kind only."""
        self._latest.say(body)
        self._wake()

    def seal(self, log_path: str) -> bytes:
        """The whole journal, kept in memory for those still reading; the log is at `log_path` from now on."""
        self._sealed = self._read_journal(0, self._journal_bytes)
        self._log_path = log_path
        for descriptor in (self._journal, self._log):
            if descriptor is not None:
                os.close(descriptor)
        self._journal = self._log = None
        return self._sealed

    def read(self, position: int) -> Sequence[Record]:
        if self._recent and position >= self._recent[0].start:
            return [record for record in self._recent if record.start >= position]
        return _records(self._read_journal, position)

    def read_log(self, offset: int, size: int) -> bytes:
        if offset >= self._log_bytes:
            return b""
        if self._log is not None:
            return os.pread(self._log, size, offset)
        return _read_range(self._log_path, offset, size)

    async def changed(self, since: int) -> None:
        while self.version == since:
            await self._pulse.wait()

    def passing(self, after: int) -> tuple[int, Sequence[PassingEvent]]:
        return self._latest.since(after)

    def _end_phase(self, elapsed_us: int) -> None:
        if self._spans:
            self._spans[-1] = replace(self._spans[-1], to_us=elapsed_us)

    def _event(self, body: RecordedEvent, elapsed_us: int) -> Event:
        return Event(self.build_id, self.head + 1, self._time_s(), elapsed_us, self._attempt, body)

    def _say(self, record: Record) -> None:
        self._recent.append(record)
        self._last = record.event
        self._wake()

    def _elapsed_us(self) -> int:
        return round((self._monotonic_s() - self._began_s) * 1e6)

    def _wake(self) -> None:
        self.version += 1
        self._pulse.set()
        self._pulse = asyncio.Event()

    def _append(self, record: bytes, *, waits: bool) -> None:
        """Write one record. A build that waits holds no descriptor: there may be thousands."""
        if self._journal is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._journal = os.open(f"{self.directory}/{JOURNAL}", flags, 0o600)
        try:
            write_all(self._journal, record)
        except OSError:
            os.ftruncate(self._journal, self._journal_bytes)  # Half a record would hide all that follow.
            raise
        finally:
            if waits:
                os.close(self._journal)
                self._journal = None
        self._journal_bytes += len(record)

    def _append_log(self, data: bytes) -> None:
        if self._log is None:
            self._log = os.open(self._log_path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            write_all(self._log, data)
        except OSError:
            os.ftruncate(self._log, self._log_bytes)
            raise
        self._log_bytes += len(data)

    def _read_journal(self, offset: int, size: int) -> bytes:
        if self._sealed is not None:
            return self._sealed[offset : offset + size]
        if self._journal is not None:
            return os.pread(self._journal, size, offset)
        return _read_range(f"{self.directory}/{JOURNAL}", offset, size)


class Ended(Recording):
    """A build that is over, from the archive."""

    def __init__(self, build_id: str, journal: bytes, last: Event, log_bytes: int, log_path: str | None) -> None:
        """`log_path` is None where the log is no longer in the store."""
        self.build_id = build_id
        self._journal = journal
        self._last = last
        self._log_bytes = log_bytes
        self._log_path = log_path

    @property
    def head(self) -> int:
        return self._last.seq

    @property
    def last(self) -> Event | None:
        return self._last

    @property
    def ended(self) -> bool:
        return True

    @property
    def log_bytes(self) -> int:
        return self._log_bytes

    def read(self, position: int) -> Sequence[Record]:
        return _records(lambda offset, size: self._journal[offset : offset + size], position)

    def read_log(self, offset: int, size: int) -> bytes:
        if offset >= self._log_bytes or self._log_path is None:
            return b""
        return _read_range(self._log_path, offset, size)

    async def changed(self, since: int) -> None:  # noqa: ARG002 - Nothing changes any more.
        await asyncio.get_running_loop().create_future()


class Elsewhere(Recording):
    """A build of another process with the same store: its files are read as they grow."""

    def __init__(self, store: LocalStore, build_id: str) -> None:
        self.build_id = build_id
        self._store = store
        self._directory = f"{store.builds_dir}/{build_id}"
        self._journal_bytes = 0
        self._seen_log_bytes = 0
        self._last: Event | None = None
        self._after: Recording | None = None
        """What the archive has, once it ended."""
        self._look()

    @property
    def head(self) -> int:
        return 0 if self.last is None else self.last.seq

    @property
    def last(self) -> Event | None:
        return self._last if self._after is None else self._after.last

    @property
    def ended(self) -> bool:
        return self._after is not None

    @property
    def log_bytes(self) -> int:
        if self._after is not None:
            return self._after.log_bytes
        try:
            return os.stat(f"{self._directory}/{LOG}").st_size
        except FileNotFoundError:
            return 0

    def read(self, position: int) -> Sequence[Record]:
        if self._after is not None:
            return self._after.read(position)
        try:
            return _records(self._read_file, position)
        except FileNotFoundError:  # It just ended; `changed` finds the archive.
            return ()

    def read_log(self, offset: int, size: int) -> bytes:
        if self._after is not None:
            return self._after.read_log(offset, size)
        try:
            return _read_range(f"{self._directory}/{LOG}", offset, size)
        except FileNotFoundError:
            return b""

    async def changed(self, since: int) -> None:
        polls = 0
        while self.version == since and not self.ended:
            await asyncio.sleep(_POLL_S)
            self._look()
            polls += 1
            row = self._store.builds.get(self.build_id)
            if row is None:
                raise BuildNotFound(self.build_id)
            if row.ended is not None:
                self._after = await ended(self._store, self.build_id, Archive.decode(row.record))
                self.version += 1
            elif polls % _POLLS_PER_LOOK == 0 and not await asyncio.to_thread(self._is_alive):
                raise OwnerGone(self.build_id)

    def _look(self) -> None:
        """Catch up with the journal and the log."""
        self.version += self.log_bytes != self._seen_log_bytes
        self._seen_log_bytes = self.log_bytes
        while records := self.read(self._journal_bytes):
            self._journal_bytes = records[-1].end
            self._last = records[-1].event
            self.version += 1

    def _is_alive(self) -> bool:
        with settled(self._store.builds_dir):
            row = self._store.builds.get(self.build_id)  # It may have ended since we looked.
            return is_held(self._directory) or row is None or row.ended is not None

    def _read_file(self, offset: int, size: int) -> bytes:
        return _read_range(f"{self._directory}/{JOURNAL}", offset, size)


async def ended(store: LocalStore, build_id: str, archive: Archive) -> Ended:
    """A build that ended, as the store keeps it."""
    last = archive.last
    assert last is not None
    assert isinstance(last.body, Finished)
    log = last.body.log
    path = None if log is None else await log_path(store, log)
    return Ended(build_id, archive.journal, last, 0 if log is None else log.size, path)


async def log_path(store: LocalStore, log: FileNode) -> str | None:
    """The file of a kept log; None where the store has it no longer."""
    try:
        return (await store.stage([log]))[0]
    except ContentMissing:
        return None


async def follow(
    recording: Recording, *, after_seq: int, without_log: bool, recorded_only: bool, heartbeat_s: float
) -> AsyncIterator[Event]:
    """Events after `after_seq`, the last one `Finished`; a heartbeat after `heartbeat_s` without any."""
    position = passed = 0
    while True:
        version = recording.version  # Before looking, or what comes meanwhile is missed.
        said = False
        while records := recording.read(position):
            position = records[-1].end
            for event in _wanted(recording, records, after_seq, without_log=without_log):
                said = True
                yield event
                if isinstance(event.body, Finished):
                    return
        if recording.ended and not said:
            return  # All of it lies before `after_seq`.
        if not recorded_only:
            passed, bodies = recording.passing(passed)
            for body in bodies:
                said = True
                yield _passing(recording, body)
        if said:
            continue
        try:
            async with asyncio.timeout(heartbeat_s):
                await recording.changed(version)
        except TimeoutError:
            if not recorded_only:
                yield _passing(recording, Heartbeat(recording.head, recording.log_bytes))


def _wanted(recording: Recording, records: Sequence[Record], after_seq: int, *, without_log: bool) -> Iterator[Event]:
    for record in records:
        event = record.event
        if event.seq <= after_seq:
            continue
        if isinstance(event.body, Log):
            if without_log:
                continue
            if len(event.body.data) < record.log_bytes:
                data = recording.read_log(event.body.offset, record.log_bytes)
                event = replace(event, body=_log_or_gap(event.body, data, record.log_bytes))
        yield event


def _log_or_gap(log: Log, data: bytes, size: int) -> Log | Notice:
    if len(data) == size:
        return replace(log, data=data)
    fields = {"offset": str(log.offset), "bytes": str(size)}
    return Notice("LOG_TRUNCATED", f"{size} bytes of the log are no longer kept", fields)


def _passing(recording: Recording, body: PassingEvent) -> Event:
    last = recording.last
    assert last is not None
    return Event(recording.build_id, 0, last.time_s, last.elapsed_us, last.attempt, body)


def _records(read: Callable[[int, int], bytes], position: int) -> list[Record]:
    """The records in a chunk from `position` on; the chunk grows until one fits."""
    size = _CHUNK
    while True:
        data = read(position, size)
        records = list(decode_records(data, start=position))
        if records or len(data) < size:
            return records
        size *= 2


def _read_range(path: str, offset: int, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while size and (part := os.pread(descriptor, size, offset)):
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)
