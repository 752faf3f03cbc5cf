"""The local store: one directory, opened by any number of processes at once."""

import asyncio
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Lock
from typing import Literal, TypeVar

from kiln.castore.checkout import check_contents, check_out, keep_tree
from kiln.castore.dirfd import DIRECTORY, remove_path, remove_tree
from kiln.castore.errors import (
    ContentMissing,
    DirectoryNotFound,
    StoreCorrupt,
    StoreNotFound,
    StoreReadOnly,
    StoreSchemeDiffers,
)
from kiln.castore.export import export
from kiln.castore.ingest import Ownership, Walked, Walker
from kiln.castore.ingest_worker import Crew
from kiln.castore.local.blobs import LocalBlobs
from kiln.castore.local.database import Builds, Database, Results
from kiln.castore.local.directories import LocalDirectories
from kiln.castore.local.files import StoreFiles, blob_name, tree_name
from kiln.castore.local.fsck import Damage, Usage, check, disk_usage, drop_suspects
from kiln.castore.local.session import Session, abandoned, boot_id
from kiln.castore.local.trouble import store_trouble
from kiln.castore.model import BLAKE3_DOUBLED, SCHEMES, Digest, DirectoryNode, FileNode, Node, Scheme, SymlinkNode
from kiln.castore.refscan import RefScanner

Durability = Literal["normal", "strict"]

_DATABASE = "db.sqlite"
_DIRECTORIES = ("blobs", "trees", "tmp", "builds")
_FLUSH_AFTER_S = 600.0  # How much a crash can make suspect in a process that runs for long.
_PROCESSES_MAX = 4  # For one import; more have to be asked for.

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ingested:
    """What an import found. `bytes` and `files` count regular files, each name on its own."""

    node: Node
    needles: frozenset[int]
    bytes: int
    files: int


class LocalStore:
    """A store on local disk. Make one with `open`; every method may be called from any task."""

    def __init__(self, path: str, database: Database, scheme: Scheme, *, strict: bool, writable: bool) -> None:
        self.path = path
        self.scheme = scheme
        self._database = database
        self._strict = strict
        self._writable = writable
        self._session: Session | None = None
        self._session_lock = Lock()
        self._walks = 0
        self._blobs_fd = os.open(os.path.join(path, "blobs"), DIRECTORY)
        self._trees_fd = os.open(os.path.join(path, "trees"), DIRECTORY)
        self._files = StoreFiles(self._blobs_fd, self._trees_fd, -1, "")  # For reading.
        self.blobs = LocalBlobs(self._files, scheme, path, self._writer, strict=strict)
        self.directories = LocalDirectories(database, scheme, self.require_writable)
        self.results = Results(database)
        self.builds = Builds(database)

    @classmethod
    def open(cls, path: str, *, scheme: Scheme | None = None, durability: Durability = "normal") -> "LocalStore":
        """Open the store at `path`, or make one where there is nothing or an empty directory.

        A scheme is chosen when the store is made (blake3/doubled where None); later it has to be None or the same.
        What killed processes left is cleaned up, and after a crash of the machine what was not flushed is checked.
        A store that cannot be written still opens for reading. Raises StoreNotFound, StoreSchemeDiffers, StoreCorrupt,
        StoreReadOnly, StoreFull, StoreBusy.
        """
        path = os.path.abspath(path)
        strict = durability == "strict"
        with store_trouble(path):
            writable = _make(path)
            database = Database(os.path.join(path, _DATABASE), store=path, writable=writable, strict=strict)
            try:
                found = _scheme(database, path, scheme, writable=writable)
                store = cls(path, database, found, strict=strict, writable=writable)
            except BaseException:
                database.close()
                raise
            try:
                if writable:
                    store._recover()
                    if not store._files.has(found.empty.raw):
                        store._writer().put(b"", found.empty.raw, False)
            except BaseException:
                store.close()
                raise
            return store

    @property
    def builds_dir(self) -> str:
        """Where running builds and kept failures live, a directory each, named by their id."""
        return os.path.join(self.path, "builds")

    @property
    def tmp_dir(self) -> str:
        """A directory of this process's own, on the store's file system; emptied when the store is closed."""
        with store_trouble(self.path):
            return os.path.join(self.path, "tmp", self._open_session().name)

    def close(self) -> None:
        """Flush what was written, and leave no temporary file."""
        if self._session is not None:
            self._session.close()
            self._session = None
        self._database.close()
        os.close(self._blobs_fd)
        os.close(self._trees_fd)

    @property
    def writable(self) -> bool:
        """Whether more than reading is possible here."""
        return self._writable

    async def stage(self, nodes: Sequence[DirectoryNode | FileNode]) -> list[str]:
        """For each node a path to bind: its tree, its blob, or the blob's executable twin.

        All are sealed as the contract wants it, and what a tree is made from is verified; what was staged before is
        not read again. Raises ContentMissing with everything that is missing from all nodes, DigestMismatch,
        EntriesTooMany.
        """
        paths = []
        absent = []
        for node in nodes:
            if isinstance(node, DirectoryNode):
                path = f"{self.path}/trees/{tree_name(node.digest.raw)}"
            else:
                path = f"{self.path}/blobs/{blob_name(node.digest.raw, node.executable)}"
            paths.append(path)
            if not os.access(path, os.F_OK):
                absent.append(node)
        if absent:
            await _in_thread(self._stage, absent)
        return paths

    async def ingest(
        self,
        path: str,
        *,
        needles: Sequence[bytes] = (),
        adopt: bool = False,
        take_over: bool = False,
        processes: int | None = None,
    ) -> Ingested:
        """Import `path`: a file, a symlink (not followed) or a directory.

        Plain, the source is only read. `take_over` is for what a build left, once nothing of it runs: it is made
        readable where need be, and setuid and setgid files are refused. With `adopt` the files themselves become the
        store's, and `path` is gone afterwards: a file whose inode has one name becomes the blob by hard link, others
        are copied to inodes of their own, and the directory becomes the tree of its digest.
        `processes` bounds those that walk a large tree (None: one per CPU, at most 4). `needles`: which of them occur
        in contents, symlink targets or names. Raises IngestNotFound, IngestDenied, IngestRefused, IngestChanged.
        """
        ownership = Ownership(take_over=take_over or adopt, adopt=adopt)
        stop = Event()
        return await _in_thread(self._ingest, path, needles, ownership, processes, stop, stop=stop)

    async def add_blob(self, data: bytes) -> FileNode:
        """Store a small file's contents; the node is not executable."""
        digest = self.scheme.digest_of(data)
        with store_trouble(self.path):
            files = self._writer()
            files.put(data, digest.raw, False)
            if self._strict:
                await asyncio.to_thread(files.sync, digest.raw)
        return FileNode(digest, len(data))

    async def export(self, node: Node, destination: str) -> None:
        """Write `node` as plain, writable files, replacing what stands at `destination` at the very end.

        Raises ContentMissing, DigestMismatch, ExportFailed, ExportFull; the destination is then as it was.
        """
        await _in_thread(self._export, node, destination)

    async def fsck(self, *, repair: bool = False) -> list[Damage]:
        """Check everything there is against its digest; with `repair`, drop what is damaged."""
        if repair:
            self.require_writable()
        with store_trouble(self.path):
            files = self._writer() if repair else self._files
            return await _in_thread(check, files, self._database, self.scheme, repair=repair)

    async def du(self) -> Usage:
        """How much the store holds."""
        return await asyncio.to_thread(disk_usage, self.path)

    def require_writable(self) -> None:
        """Raise StoreReadOnly where this store can only be read."""
        if not self._writable:
            why = "its file system is read-only" if os.statvfs(self.path).f_flag & os.ST_RDONLY else "permission denied"
            raise StoreReadOnly(self.path, why)

    def _open_session(self) -> Session:
        with self._session_lock:
            if self._session is None:
                self.require_writable()
                with _locked(os.path.join(self.path, "tmp")) as tmp:
                    self._session = Session(tmp, boot=boot_id())
            return self._session

    def _writer(self) -> StoreFiles:
        """The store's files with a place for temporary ones, whose names no other caller gets."""
        session = self._open_session()
        with self._session_lock:
            self._walks += 1
            return StoreFiles(self._blobs_fd, self._trees_fd, session.descriptor, f"{self._walks}-")

    def _recover(self) -> None:
        """Clean up after processes that were killed; check what a crash of the machine may have torn."""
        with _locked(os.path.join(self.path, "tmp")) as tmp:
            left = abandoned(tmp)
            if not left:
                return
            boot = boot_id()
            inherited = []
            suspect = []
            for unflushed in left.values():
                if unflushed is None or unflushed.boot == boot:
                    inherited.append(time.time() if unflushed is None else unflushed.since)
                else:
                    suspect.append(unflushed.since)
            if suspect:
                drop_suspects(self._files, self.scheme, since=min(suspect), tmp=tmp)
            self._session = Session(tmp, boot=boot, since=min(inherited + suspect))
            for name in left:
                remove_tree(os.fsencode(name), dir_fd=tmp)

    def _stage(self, nodes: Sequence[DirectoryNode | FileNode]) -> None:
        with store_trouble(self.path):
            files = self._writer()
            try:
                for node in nodes:
                    if isinstance(node, DirectoryNode):
                        check_out(node.digest, self.directories.read, files, self.scheme)
                    else:
                        files.twin(node.digest.raw, node.executable)
                        check_contents(
                            blob_name(node.digest.raw, node.executable), files.blobs, node.digest, self.scheme
                        )
            except (FileNotFoundError, DirectoryNotFound):
                self._raise_missing(nodes)
                raise

    def _raise_missing(self, nodes: Sequence[Node]) -> None:
        """Raise ContentMissing with all that the closures of `nodes` lack, if they lack anything."""
        blobs: set[Digest] = set()
        directories: set[Digest] = set()
        seen: set[Node] = set()
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if isinstance(node, SymlinkNode) or node in seen:
                continue
            seen.add(node)
            if isinstance(node, FileNode):
                if not self._files.has(node.digest.raw):
                    blobs.add(node.digest)
                continue
            try:
                pending += [below for _, below in self.directories.read(node.digest).entries]
            except DirectoryNotFound:
                directories.add(node.digest)
        if blobs or directories:
            raise ContentMissing(blobs=frozenset(blobs), directories=frozenset(directories))

    def _ingest(
        self, path: str, needles: Sequence[bytes], ownership: Ownership, processes: int | None, stop: Event
    ) -> Ingested:
        adopt = ownership.adopt
        with store_trouble(self.path):
            files = self._writer()
            if adopt and not self._is_beside(path):
                ownership = Ownership(take_over=True)  # No hard links between file systems: copied, then removed.
            scanner = RefScanner(needles) if needles else None
            workers = (processes or min(len(os.sched_getaffinity(0)), _PROCESSES_MAX)) - 1

            def crew(root: int) -> Crew:
                return Crew(root, files, self.scheme, needles, ownership, workers=workers)

            walker = Walker(files, self.scheme, scanner, ownership, stop=stop.is_set)
            walked = walker.walk(path, crew if workers and sys.executable else None)
            self._keep(walked, path, files, adopted=ownership.adopt)
            if adopt:
                remove_path(path)
            session = self._open_session()
            if self._strict or time.time() - session.since > _FLUSH_AFTER_S:
                session.flush()
        return Ingested(walked.node, walked.needles, walked.bytes, walked.files)

    def _keep(self, walked: Walked, path: str, files: StoreFiles, *, adopted: bool) -> None:
        """Make a walked tree visible: its directories, then its tree."""
        if walked.directories:
            self.directories.insert(walked.directories)
        if adopted and isinstance(walked.node, DirectoryNode):
            keep_tree(path, None, walked.node.digest, files)

    def _is_beside(self, path: str) -> bool:
        """Whether `path` lies on the store's file system, or does not exist: then the walk says so."""
        try:
            return os.lstat(path).st_dev == os.fstat(self._blobs_fd).st_dev
        except OSError:
            return True

    def _export(self, node: Node, destination: str) -> None:
        try:
            export(node, destination, self.directories.read, self._files, self.scheme)
        except (FileNotFoundError, DirectoryNotFound):
            self._raise_missing([node])
            raise


def _make(path: str) -> bool:
    """Make what is missing of the store's layout; returns whether it can be written."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except FileNotFoundError as error:
        raise StoreNotFound(path, "its parent directory does not exist") from error
    except OSError as error:
        raise StoreNotFound(path, f"it cannot be made: {error.strerror}") from error
    try:
        names = os.listdir(path)
    except OSError as error:
        raise StoreNotFound(path, str(error.strerror)) from error
    if _DATABASE in names:
        lacking = [name for name in _DIRECTORIES if name not in names]
        if lacking:
            raise StoreCorrupt(os.path.join(path, lacking[0]), "it is missing", "make the directory again, then fsck")
        return os.access(path, os.W_OK)
    strangers = [name for name in names if name not in _DIRECTORIES]
    if strangers:
        raise StoreNotFound(path, f"the directory is not empty, and has no {_DATABASE}")
    if not os.access(path, os.W_OK):
        raise StoreNotFound(path, "the directory is empty and cannot be written")
    with _locked(path):
        for name in _DIRECTORIES:
            os.makedirs(os.path.join(path, name), 0o700, exist_ok=True)
        for name in ("blobs", "trees"):
            for first in range(256):  # All of them now: nothing has to look for them later.
                os.makedirs(os.path.join(path, name, f"{first:02x}"), 0o755, exist_ok=True)
    return True


def _scheme(database: Database, path: str, wanted: Scheme | None, *, writable: bool) -> Scheme:
    row = database.row("select value from meta where key = 'scheme'")
    if row is None:
        if not writable:
            raise StoreCorrupt(database.path, "no scheme is recorded", "make the store again")
        database.write("insert or ignore into meta values ('scheme', ?)", [((wanted or BLAKE3_DOUBLED).name,)])
        row = database.row("select value from meta where key = 'scheme'")
        assert row is not None
    name = row[0]
    if name not in SCHEMES:
        raise StoreCorrupt(database.path, f"unknown scheme {name!r}", "open it with the kiln that made it")
    if wanted is not None and wanted.name != name:
        raise StoreSchemeDiffers(path, recorded=name, wanted=wanted.name)
    return SCHEMES[name]


@contextmanager
def _locked(path: str) -> Iterator[int]:
    """The directory `path`, opened and locked against other processes."""
    descriptor = os.open(path, DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        fcntl.flock(
            descriptor, fcntl.LOCK_UN
        )  # Closing does it only once no duplicate is left, and a session keeps one.
        os.close(descriptor)


async def _in_thread(function: Callable[..., T], *args: object, stop: Event | None = None, **kwargs: object) -> T:
    """Run `function` in a thread; a cancelled caller sets `stop` and waits: nothing goes on behind its back."""
    thread = asyncio.create_task(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        if stop is not None:
            stop.set()
        await asyncio.wait([thread])
        if not thread.cancelled():
            thread.exception()  # Retrieved: nobody is left to be told.
        raise
