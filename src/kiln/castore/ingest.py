"""A path becomes blobs and directories in one pass: walk, hash, scan for references, copy or adopt.

Every name is opened through its directory's descriptor and no link is followed, so the walk stays inside the tree
whatever its owner does meanwhile. It blocks: run it in a thread.
"""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from errno import EACCES, ELOOP, EMLINK, ENOENT, ENOTDIR, ENXIO, EPERM, EXDEV
from typing import Protocol

from kiln.castore.dirfd import DIRECTORY, Descent, TreeMoved, change_mode
from kiln.castore.errors import IngestChanged, IngestDenied, IngestNotFound, IngestRefused
from kiln.castore.local.files import StoreFiles, clone_contents, write_all
from kiln.castore.model import Digest, DirectoryNode, FileNode, Hasher, Node, Scheme, SymlinkNode
from kiln.castore.refscan import RefScanner, Stream
from kiln.castore.wire import directory_entry, file_entry, symlink_entry
from kiln.errors import KilnError

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC  # A fifo must not hang the open.
_CHUNK_BYTES = 1 << 20  # Fastest of 64 KiB, 1 MiB and mmap.
_KINDS = {
    stat.S_IFIFO: "a fifo",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


@dataclass(frozen=True, slots=True)
class Ownership:
    """What may be done with the source.

    Plain: it stays as it is, and contents are copied. `take_over`: it is ours, no writer is left, and is made readable
    where need be; setuid and setgid files are refused. `adopt`, with `take_over`: its very inodes become the store's.
    """

    take_over: bool = False
    adopt: bool = False


@dataclass(frozen=True, slots=True)
class Walked:
    """One subtree: its node, and what was found in it. Blobs are stored; `directories` are for the caller to store."""

    node: Node
    directories: list[tuple[bytes, bytes]]  # Digest and canonical protobuf, children before parents.
    needles: frozenset[int]
    bytes: int
    files: int


class Job(Protocol):
    """A directory that somebody else may be walking."""

    def result(self) -> Walked:
        """What became of it; waits, or walks it now. Raises what its walk raised."""


class Sharing(Protocol):
    """Takes directories off a walker's hands."""

    def wants(self, files_so_far: int) -> bool:
        """Whether directories should be offered now."""

    def offer(self, parts: list[bytes]) -> Job:
        """Hand over the directory at `parts`, from the root."""


class Stopped(Exception):
    """The walk was asked to stop."""


class _Frame:
    """A directory being walked: encoded entries so far, and the directories below it that are still to come."""

    __slots__ = ("directories", "done", "entries", "files", "jobs", "name", "pending", "size", "symlinks")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.files: list[bytes] = []
        self.symlinks: list[bytes] = []
        self.directories: list[bytes] = []
        self.pending: list[bytes] = []  # Descending, so that `pop` gives the first.
        self.done: dict[bytes, tuple[bytes, int]] = {}
        self.jobs: dict[bytes, Job] = {}
        self.entries = 0


class Walker:
    """Walks trees into one store. Not for use by two threads at a time."""

    def __init__(
        self,
        files: StoreFiles,
        scheme: Scheme,
        scanner: RefScanner | None,
        ownership: Ownership,
        *,
        alone: bool = True,
        stop: Callable[[], bool] = bool,
    ) -> None:
        """`alone`: no other walker works on the same tree, so we know which blobs' inodes the tree already has.

        `stop` is asked at each directory; where it says so, the walk raises Stopped.
        """
        self._files = files
        self._scheme = scheme
        self._weight = scheme.weight
        self._new_hasher = scheme.new_hasher
        self._scanner = scanner
        self._take_over = ownership.take_over or ownership.adopt
        self._adopt = ownership.adopt
        self._stop = stop
        self._alone = alone
        self._claimed: set[tuple[bytes, bool]] = set()
        self._directories: list[tuple[bytes, bytes]] = []
        self._needles = frozenset[int]()  # Found by others.
        self._bytes = 0
        self._count = 0
        self._uid = os.geteuid()
        self._device = -1

    def walk(self, path: str, crew: Callable[[int], AbstractContextManager[Sharing]] | None = None) -> Walked:
        """The file, symlink or directory at `path`; its parents may be links, it is not followed.

        `crew` makes those who take directories of the tree with that open root off our hands.
        """
        name = os.fsencode(path)
        try:
            mode = os.lstat(name).st_mode
        except (FileNotFoundError, NotADirectoryError) as error:
            raise IngestNotFound(name) from error
        except OSError as error:
            raise IngestDenied(name, str(error.strerror)) from error
        if stat.S_ISDIR(mode):
            root = self._open_root(name)
            with crew(root) if crew else nullcontext() as sharing:
                return self.walk_directory(root, (), sharing)
        if stat.S_ISLNK(mode):
            return self._walked(SymlinkNode(self._target(name, None, name)))
        if not stat.S_ISREG(mode):
            raise IngestRefused(name, _KINDS.get(stat.S_IFMT(mode), "of an unknown kind"))
        digest, size, executable = self._file(name, None, name)
        return self._walked(FileNode(Digest(digest), size, executable))

    def walk_directory(self, descriptor: int, parts: Sequence[bytes], sharing: Sharing | None = None) -> Walked:
        """The directory at `parts` below the open directory `descriptor`, which is taken over."""
        self._directories, self._bytes, self._count = [], 0, 0
        with Descent(descriptor) as descent:
            self._device = os.fstat(descriptor).st_dev
            for part in parts:
                self._enter(descent, part)
            return self._walked(self._tree(descent, sharing))

    def _open_root(self, name: bytes) -> int:
        try:
            return os.open(name, DIRECTORY)
        except PermissionError as error:
            if not self._take_over:
                raise IngestDenied(name, str(error.strerror)) from error
        with _reading(name):
            parent = os.open(os.path.dirname(name) or b".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                change_mode(os.path.basename(name), lambda mode: mode | 0o700, dir_fd=parent)
            finally:
                os.close(parent)
            return os.open(name, DIRECTORY)

    def _walked(self, node: Node) -> Walked:
        needles = self._scanner.found if self._scanner is not None else frozenset[int]()
        return Walked(node, self._directories, self._needles | needles, self._bytes, self._count)

    def _tree(self, descent: Descent, sharing: Sharing | None) -> DirectoryNode:
        frames = [self._scan(descent, b"")]
        while True:
            frame = frames[-1]
            if self._stop():
                raise Stopped
            if sharing is not None and sharing.wants(self._count):
                self._share(frames, descent.parts(), sharing)
            if frame.pending:
                name = frame.pending.pop()
                self._enter(descent, name)
                frames.append(self._scan(descent, name))
                continue
            for name, job in frame.jobs.items():
                self._merge(frame, name, job.result())
            digest, size = self._finish(frame)
            if self._adopt:
                self._seal_directory(descent)
            frames.pop()
            if not frames:
                return DirectoryNode(Digest(digest), size)
            path = descent.path()
            try:
                descent.leave()
            except (TreeMoved, OSError) as error:
                raise IngestChanged(path) from error
            frames[-1].done[frame.name] = (digest, size)

    def _share(self, frames: list[_Frame], parts: list[bytes], sharing: Sharing) -> None:
        """Offer what is pending in the directory nearest to the root: those are likely to be the largest."""
        base = len(parts) + 1 - len(frames)
        for depth, frame in enumerate(frames):
            if frame.pending:
                self._alone = False
                for name in reversed(frame.pending):
                    frame.jobs[name] = sharing.offer([*parts[: base + depth], name])
                frame.pending.clear()
                return

    def _merge(self, frame: _Frame, name: bytes, walked: Walked) -> None:
        assert isinstance(walked.node, DirectoryNode)
        frame.done[name] = (walked.node.digest.raw, walked.node.size)
        self._directories += walked.directories
        self._bytes += walked.bytes
        self._count += walked.files
        self._needles |= walked.needles

    def _enter(self, descent: Descent, name: bytes) -> None:
        path = descent.path(name)
        with _reading(path):
            try:
                descent.enter(name)
            except PermissionError:
                if not self._take_over:
                    raise
                change_mode(name, lambda mode: mode | 0o700, dir_fd=descent.descriptor)
                descent.enter(name)
            if self._adopt:
                status = os.fstat(descent.descriptor)
                if status.st_dev != self._device:
                    raise IngestRefused(path, "on another file system than the directory around it")
                if self._uid != 0 and status.st_mode & 0o700 != 0o700:  # Entries are replaced in it.
                    os.fchmod(descent.descriptor, 0o700)

    def _scan(self, descent: Descent, name: bytes) -> _Frame:
        """Everything in the current directory but the contents of the directories in it."""
        frame = _Frame(name)
        descriptor = descent.descriptor
        with _reading(descent.path()), os.scandir(descriptor) as found:
            entries = sorted((os.fsencode(entry.name), entry) for entry in found)
        frame.entries = len(entries)
        scanner = self._scanner
        for entry_name, entry in entries:
            if scanner is not None:
                scanner.scan(entry_name)
            if entry.is_file(follow_symlinks=False):
                digest, size, executable = self._file(entry_name, descriptor, descent)
                frame.files.append(file_entry(entry_name, digest, size, executable))
            elif entry.is_dir(follow_symlinks=False):
                frame.pending.append(entry_name)
            elif entry.is_symlink():
                target = self._target(entry_name, descriptor, descent)
                if self._adopt:
                    self._files.seal_symlink(entry_name, descriptor)
                frame.symlinks.append(symlink_entry(entry_name, target))
            else:
                with _reading(descent.path(entry_name)):
                    mode = os.lstat(entry_name, dir_fd=descriptor).st_mode
                raise IngestRefused(descent.path(entry_name), _KINDS.get(stat.S_IFMT(mode), "of an unknown kind"))
        frame.pending.reverse()
        return frame

    def _finish(self, frame: _Frame) -> tuple[bytes, int]:
        size = self._weight * frame.entries
        for name in sorted(frame.done):
            digest, below = frame.done[name]
            size += below
            frame.directories.append(directory_entry(name, digest, below))
        body = b"".join(frame.directories + frame.files + frame.symlinks)
        hasher = self._new_hasher()
        hasher.update(body)
        digest = hasher.digest()
        self._directories.append((digest, body))
        return digest, size

    def _target(self, name: bytes, dir_fd: int | None, where: Descent | bytes) -> bytes:
        with _reading(_path(where, name)):
            target = os.readlink(name, dir_fd=dir_fd)
        if self._scanner is not None:
            self._scanner.scan(target)
        return target

    def _file(self, name: bytes, dir_fd: int | None, where: Descent | bytes) -> tuple[bytes, int, bool]:
        """Store one regular file. `where` names it for errors, worked out only when there is one."""
        try:
            descriptor = os.open(name, _READ, dir_fd=dir_fd)
        except OSError as error:
            path = _path(where, name)
            with _reading(path):
                if error.errno != EACCES or not self._take_over or dir_fd is None:
                    raise
                change_mode(name, lambda mode: mode | 0o400, dir_fd=dir_fd)
                descriptor = os.open(name, _READ, dir_fd=dir_fd)
        try:
            status = os.fstat(descriptor)
            mode = status.st_mode
            if not stat.S_ISREG(mode) or (self._take_over and mode & 0o6000):
                path = _path(where, name)
                if not stat.S_ISREG(mode):  # It was a regular file when the directory was read.
                    raise IngestChanged(path)
                raise IngestRefused(path, "a setuid or setgid file")
            size = status.st_size
            executable = mode & 0o100 != 0
            adopt = self._adopt and status.st_nlink == 1
            if size > _CHUNK_BYTES:
                digest = self._large(descriptor, size, executable, where, name, keep=not adopt)
            else:
                data = os.read(descriptor, size + 1)
                if len(data) != size:
                    raise IngestChanged(_path(where, name))
                hasher = self._new_hasher()
                hasher.update(data)
                digest = hasher.digest()
                if self._scanner is not None:
                    self._scanner.scan(data)
                if not adopt:
                    self._files.put(data, digest, executable)
            if self._adopt:
                if not (adopt and self._adopted(descriptor, status.st_uid, name, dir_fd, (digest, executable))):
                    self._replace(name, dir_fd, digest, executable)
            elif not self._take_over:
                after = os.fstat(descriptor)
                if (
                    after.st_mtime_ns != status.st_mtime_ns
                    or after.st_ctime_ns != status.st_ctime_ns
                    or after.st_size != size
                ):
                    raise IngestChanged(_path(where, name))
        finally:
            os.close(descriptor)
        self._bytes += size
        self._count += 1
        return digest, size, executable

    def _large(
        self, descriptor: int, size: int, executable: bool, where: Descent | bytes, name: bytes, *, keep: bool
    ) -> bytes:
        """Hash and scan a file that is read in chunks; with `keep`, a copy becomes the blob."""
        stream = self._scanner.stream() if self._scanner is not None else None
        hasher = self._new_hasher()
        if not keep:
            same_size = _pump(descriptor, size, hasher, stream, None)
        else:
            with self._files.new_file() as (temporary, target):
                same_size = _pump(descriptor, size, hasher, stream, target)
                if same_size:
                    self._files.keep(temporary, target, hasher.digest(), executable)
                else:
                    os.unlink(temporary, dir_fd=self._files.temporary)
        if not same_size:
            raise IngestChanged(_path(where, name))
        return hasher.digest()

    def _adopted(self, descriptor: int, owner: int, name: bytes, dir_fd: int | None, key: tuple[bytes, bool]) -> bool:
        """Make the file itself sealed property of the store, and its inode the blob where there is none yet.

        False where it cannot be: then a fresh inode has to take its place. `key`: digest, and whether executable.
        """
        digest, executable = key
        try:
            if owner != self._uid:
                os.fchown(descriptor, self._uid, os.getegid())
            if not _drop_attributes(descriptor):
                self._files.put_copy(descriptor, digest, executable)
                return False
            self._files.seal(descriptor, executable)
        except PermissionError:
            self._files.put_copy(descriptor, digest, executable)
            return False
        try:
            self._files.link_from(name, dir_fd, digest, executable)
        except FileExistsError:
            # Equal contents are stored already: share that inode, unless this tree may have it under another name.
            return not self._alone or key in self._claimed
        except OSError as error:
            if error.errno not in {EMLINK, EXDEV, EPERM}:
                raise
            self._files.put_copy(descriptor, digest, executable)
            return False
        self._claimed.add(key)
        return True

    def _replace(self, name: bytes, dir_fd: int | None, digest: bytes, executable: bool) -> None:
        """Put a link to the blob in the file's place, or a copy where the tree may have that inode already."""
        if dir_fd is None:  # A lone file: the blob is all there is to it.
            return
        os.unlink(name, dir_fd=dir_fd)
        key = (digest, executable)
        if self._alone and key not in self._claimed and self._files.link_into(digest, executable, name, dir_fd):
            self._claimed.add(key)
        else:
            self._files.copy_into(digest, name, dir_fd, 0o555 if executable else 0o444, sealed=True)

    def _seal_directory(self, descent: Descent) -> None:
        descriptor = descent.descriptor
        with _reading(descent.path()):
            if os.fstat(descriptor).st_uid != self._uid:
                os.fchown(descriptor, self._uid, os.getegid())
            if not _drop_attributes(descriptor):
                raise IngestRefused(descent.path(), "a directory with extended attributes that cannot be removed")
            self._files.seal_directory(descriptor)


def _drop_attributes(descriptor: int) -> bool:
    """Remove extended attributes, ACLs and capabilities among them; False where one stays."""
    try:
        for attribute in os.listxattr(descriptor):
            if attribute != "security.selinux":  # The policy's label: every file has one, and it cannot be removed.
                os.removexattr(descriptor, attribute)
    except OSError as error:
        return error.errno not in {EPERM, EACCES}  # Else: the file system has none.
    return True


def _path(where: Descent | bytes, name: bytes) -> bytes:
    """For errors: a file's path is worked out only when there is one."""
    return where if isinstance(where, bytes) else where.path(name)


def _pump(descriptor: int, size: int, hasher: Hasher, stream: Stream | None, target: int | None) -> bool:
    """Read to the end through the hasher, the scanner and, if given, into `target`; False if it is not `size` bytes.

    Two threads share the work, for hashers, scanners and the kernel all let go of the GIL: where there is something to
    write or scan, the other one reads and hashes the next chunk meanwhile; else it hashes while this one reads.
    """
    if target is not None and clone_contents(descriptor, target):
        descriptor, target = target, None  # A snapshot: nothing to write, and nobody else can change it.

    def hash_next() -> bytes:
        chunk = os.read(descriptor, _CHUNK_BYTES)
        hasher.update(chunk)
        return chunk

    with ThreadPoolExecutor(1) as executor:
        if target is None and stream is None:
            return _read_and_hash(descriptor, size, hasher, executor)
        total = 0
        hashing = executor.submit(hash_next)
        while total <= size and (chunk := hashing.result()):
            total += len(chunk)
            hashing = executor.submit(hash_next)
            if target is not None:
                write_all(target, chunk)
            if stream is not None:
                stream.feed(chunk)
    return total == size


def _read_and_hash(descriptor: int, size: int, hasher: Hasher, executor: Executor) -> bool:
    total = 0
    hashing: Future[object] | None = None
    while total <= size and (chunk := os.read(descriptor, _CHUNK_BYTES)):
        if hashing is not None:
            hashing.result()
        hashing = executor.submit(hasher.update, chunk)
        total += len(chunk)
    if hashing is not None:
        hashing.result()
    return total == size


@contextmanager
def _reading(path: bytes) -> Iterator[None]:
    """Trouble with the source becomes an error that names the path."""
    try:
        yield
    except KilnError:
        raise
    except OSError as error:
        if error.errno in {ENOENT, ELOOP, ENOTDIR, ENXIO}:  # It was there, and of that kind, a moment ago.
            raise IngestChanged(path) from error
        raise IngestDenied(path, str(error.strerror)) from error
