"""What killed kiln processes left in a store: processes, mounts, directories, and builds without an end.

Run it before building in a store. What is somebody's is left alone: see `kiln.sandbox.claims`.
"""

import asyncio
import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

from kiln.build.events import Accepted, Event, Failure, Finished, Log, Reason, Retry
from kiln.builders.journal import Archive, decode_records, encode_record
from kiln.builders.kept import KeptFailures, kept_until, remove_directory
from kiln.builders.recording import JOURNAL, LOG
from kiln.castore.errors import IngestNotFound
from kiln.castore.local.database import BuildRow
from kiln.castore.local.store import LocalStore
from kiln.castore.model import FileNode
from kiln.sandbox.cgroups import Hierarchies, groups_of_store, remove_group
from kiln.sandbox.claims import is_held, release, settled
from kiln.sandbox.mounts import unmount

_TAIL_BYTES = 8192
_OCTAL = re.compile(rb"\\([0-7]{3})")  # How mountinfo writes spaces and the like.
_OWNER_GONE = "the kiln process that ran it ended"


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was cleaned up: control groups, mounts; and the builds that were ended."""

    groups: int = 0
    mounts: int = 0
    builds: tuple[str, ...] = ()
    pruned: tuple[str, ...] = ()
    """Kept failures whose time was over, or for which there was no room."""


async def recover(store: LocalStore, hierarchies: Hierarchies, store_id: str, *, kept_bytes_max: int) -> Recovered:
    """Clean up after processes that are gone, and end their builds. Several may do so at once."""
    lock = settled(store.builds_dir)
    await asyncio.to_thread(lock.__enter__)
    try:
        groups, mounts, abandoned = await asyncio.to_thread(_stop, store, hierarchies, store_id)
        builds = [await _end(store, row) for row in store.builds.running() if not _is_held(store, row.id)]
        for name in abandoned:
            await asyncio.to_thread(_clear, store, f"{store.builds_dir}/{name}")
    finally:
        lock.__exit__(None, None, None)
    pruned = await asyncio.to_thread(KeptFailures(store, bytes_max=kept_bytes_max).prune, time.time())
    return Recovered(groups, mounts, tuple(builds), tuple(pruned))


def _is_held(store: LocalStore, build_id: str) -> bool:
    return is_held(f"{store.builds_dir}/{build_id}")


def _stop(store: LocalStore, hierarchies: Hierarchies, store_id: str) -> tuple[int, int, list[str]]:
    """End the processes of builds without an owner, then their mounts; returns which directories remain."""
    groups = [group for name, group in groups_of_store(hierarchies, store_id) if not _is_held(store, name)]
    for group in groups:
        remove_group(group)
    abandoned = [name for name in os.listdir(store.builds_dir) if not _is_held(store, name)]
    return len(groups), _unmount(f"{store.builds_dir}/{name}" for name in abandoned), abandoned


def _unmount(directories: Iterable[str]) -> int:
    """Take away every mount in `directories`, the innermost first."""
    roots = tuple(os.fsencode(f"{directory}/") for directory in directories)
    with open("/proc/self/mountinfo", "rb") as lines:
        points = [_OCTAL.sub(lambda digits: bytes([int(digits[1], 8)]), line.split(b" ")[4]) for line in lines]
    inside = [point for point in points if point.startswith(roots)]
    for point in reversed(inside):
        unmount(point)
    return len(inside)


def _clear(store: LocalStore, directory: str) -> None:
    """Remove a directory nobody owns; of a kept failure, only what was its owner's."""
    if kept_until(directory) is None:
        remove_directory(store, directory)
        return
    for name in (JOURNAL, LOG):
        with suppress(FileNotFoundError):
            os.unlink(f"{directory}/{name}")
    release(directory)


async def _end(store: LocalStore, row: BuildRow) -> str:
    """Give a build without an owner its verdict, and keep its journal and its log."""
    directory = f"{store.builds_dir}/{row.id}"
    archive = Archive.decode(row.record)
    now_s = time.time()
    elapsed_us = round(max(0.0, now_s - row.created) * 1e6)
    journal, last, log_bytes = _journal(f"{directory}/{JOURNAL}")
    if last is None:  # Only a crash of the machine takes all of it.
        last = Event(row.id, 1, row.created, 0, 1, Accepted(row.digest))
        journal = encode_record(last)
    if not isinstance(last.body, Finished):
        if unsaid := _read(f"{directory}/{LOG}", log_bytes):  # Written, and the process killed before it said so.
            last = replace(last, seq=last.seq + 1, time_s=now_s, elapsed_us=elapsed_us, body=Log(unsaid, log_bytes))
            journal += encode_record(last)
        tail = _read(f"{directory}/{LOG}", max(0, log_bytes + len(unsaid) - _TAIL_BYTES))
        failure = Failure(Reason.INFRASTRUCTURE, _OWNER_GONE, Retry.ELSEWHERE, log_tail=tail)
        finished = Finished(failure, log=await _keep_log(store, f"{directory}/{LOG}"))
        last = replace(last, seq=last.seq + 1, time_s=now_s, elapsed_us=elapsed_us, body=finished)
        journal += encode_record(last)
    record = archive.ended(last, journal)
    store.builds.put(replace(row, ended=last.time_s, record=record))
    return row.id


def _journal(path: str) -> tuple[bytes, Event | None, int]:
    """The journal as far as it is whole, its last event, and how much of the log it covers."""
    data = _read(path, 0)
    records = list(decode_records(data, start=0))
    if not records:
        return b"", None, 0
    return data[: records[-1].end], records[-1].event, sum(record.log_bytes for record in records)


async def _keep_log(store: LocalStore, path: str) -> FileNode:
    try:
        node = (await store.ingest(path)).node
    except IngestNotFound:
        return FileNode(store.scheme.empty, 0)
    assert isinstance(node, FileNode)
    return node


def _read(path: str, offset: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read()
    except FileNotFoundError:
        return b""
