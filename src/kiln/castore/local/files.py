"""The files below blobs/ and trees/: their names, how they come to be, how they are linked into trees."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EINVAL, EMLINK, ENOSYS, ENOTTY, EOPNOTSUPP, EXDEV

from kiln.castore.dirfd import DIRECTORY

MTIME_NS = 1_000_000_000  # 1 s after the epoch, for files and directories alike (kiln-contract-1).
_TIMES = (MTIME_NS, MTIME_NS)
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_FICLONE = 0x40049409  # linux/fs.h: share the extents of another file.
_COPY_BYTES = 64 << 20  # Per copy_file_range call; the kernel cuts it where it likes.


def mode_of(executable: bool) -> int:
    """The mode of a sealed file."""
    return 0o555 if executable else 0o444


def blob_name(digest: bytes, executable: bool = False) -> str:
    """Where a blob stands below blobs/; its executable twin is an inode of its own."""
    text = digest.hex()
    return f"{text[:2]}/{text[2:]}.x" if executable else f"{text[:2]}/{text[2:]}"


def tree_name(digest: bytes) -> str:
    """Where a checked-out directory stands below trees/."""
    text = digest.hex()
    return f"{text[:2]}/{text[2:]}"


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data`: one write may take a part."""
    written = os.write(descriptor, data)
    while written < len(data):
        written += os.write(descriptor, memoryview(data)[written:])


def clone_contents(source: int, target: int) -> bool:
    """Make the empty file `target` share the extents of `source`; False where the file system cannot."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno not in {EOPNOTSUPP, ENOTTY, EXDEV, EINVAL, ENOSYS}:
            raise
        return False
    return True


def copy_contents(source: int, target: int) -> None:
    """Make the empty file `target` equal to `source`: shared extents where the file system can, else in the kernel."""
    if clone_contents(source, target):
        return
    offset = 0
    try:
        while copied := os.copy_file_range(source, target, _COPY_BYTES, offset, offset):
            offset += copied
    except OSError as error:
        if offset or error.errno not in {EOPNOTSUPP, EXDEV, EINVAL, ENOSYS}:
            raise
        while chunk := os.pread(source, 1 << 20, offset):
            write_all(target, chunk)
            offset += len(chunk)


class StoreFiles:
    """The store's files through descriptors of blobs/, trees/ and a private temporary directory.

    Every file is written under a temporary name, sealed (mode, mtime), and only then given its own by rename or link:
    a name in blobs/ never has half its bytes. Methods block and raise OSError. The descriptors are the caller's.
    """

    def __init__(self, blobs: int, trees: int, temporary: int, prefix: str) -> None:
        """`prefix` keeps the temporary names of several users of one directory apart."""
        self.blobs = blobs
        self.trees = trees
        self.temporary = temporary
        self._prefix = prefix
        self._names = 0

    def has(self, digest: bytes) -> bool:
        """Whether the contents are there, executable or not."""
        return os.access(blob_name(digest), os.F_OK, dir_fd=self.blobs) or os.access(
            blob_name(digest, executable=True), os.F_OK, dir_fd=self.blobs
        )

    def is_inode(self, digest: bytes, executable: bool, status: os.stat_result) -> bool:
        """Whether `status` is of the blob's very inode."""
        try:
            blob = os.lstat(blob_name(digest, executable), dir_fd=self.blobs)
        except FileNotFoundError:
            return False
        return blob.st_ino == status.st_ino and blob.st_dev == status.st_dev

    def open(self, digest: bytes) -> int:
        """Open the contents for reading. Raises FileNotFoundError."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(blob_name(digest), flags, dir_fd=self.blobs)
        except FileNotFoundError:
            return os.open(blob_name(digest, executable=True), flags, dir_fd=self.blobs)

    def temporary_name(self) -> str:
        """A name in the temporary directory that nobody else uses."""
        self._names += 1
        return f"{self._prefix}{self._names}"

    def create(self) -> tuple[str, int]:
        """A new temporary file: its name and descriptor, both the caller's to get rid of."""
        name = self.temporary_name()
        return name, os.open(name, _NEW, 0o600, dir_fd=self.temporary)

    @contextmanager
    def new_file(self) -> Iterator[tuple[str, int]]:
        """A temporary file: its name and descriptor, writable and readable; gone after the block unless renamed."""
        name, descriptor = self.create()
        try:
            yield name, descriptor
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.temporary)
            raise
        finally:
            os.close(descriptor)

    def put(self, data: bytes, digest: bytes, executable: bool) -> None:
        """Keep a small blob, if it is not there yet. This is ingest's hot path: five system calls."""
        target = blob_name(digest, executable)
        if os.access(target, os.F_OK, dir_fd=self.blobs):
            return
        name, descriptor = self.create()
        try:
            try:
                write_all(descriptor, data)
                os.fchmod(descriptor, 0o555 if executable else 0o444)
                os.utime(descriptor, ns=_TIMES)
            finally:
                os.close(descriptor)
            os.rename(name, target, src_dir_fd=self.temporary, dst_dir_fd=self.blobs)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.temporary)
            raise

    def keep(self, name: str, descriptor: int, digest: bytes, executable: bool) -> None:
        """Seal a finished temporary file and make it the blob; drop it where there is one, whose inode trees share."""
        target = blob_name(digest, executable)
        if os.access(target, os.F_OK, dir_fd=self.blobs):
            os.unlink(name, dir_fd=self.temporary)
            return
        self.seal(descriptor, executable)
        os.rename(name, target, src_dir_fd=self.temporary, dst_dir_fd=self.blobs)

    def seal(self, descriptor: int, executable: bool) -> None:
        """Give a file the mode and times that inputs have."""
        os.fchmod(descriptor, mode_of(executable))
        os.utime(descriptor, ns=_TIMES)

    def put_copy(self, source: int, digest: bytes, executable: bool) -> None:
        """Keep a copy of the open file `source`, whose digest is known, as a blob, if it is not there yet."""
        if os.access(blob_name(digest, executable), os.F_OK, dir_fd=self.blobs):
            return
        with self.new_file() as (name, descriptor):
            copy_contents(source, descriptor)
            self.keep(name, descriptor, digest, executable)

    def link_from(self, name: bytes, dir_fd: int | None, digest: bytes, executable: bool) -> None:
        """Make the sealed file `name` the blob, by a hard link. Raises FileExistsError where there is one."""
        target = blob_name(digest, executable)
        os.link(name, target, src_dir_fd=dir_fd, dst_dir_fd=self.blobs, follow_symlinks=False)

    def twin(self, digest: bytes, executable: bool) -> None:
        """Make the wanted one of the two inodes from the other, if it is not there. Raises FileNotFoundError."""
        if os.access(blob_name(digest, executable), os.F_OK, dir_fd=self.blobs):
            return
        source = self.open(digest)
        try:
            self.put_copy(source, digest, executable)
        finally:
            os.close(source)

    def link_into(self, digest: bytes, executable: bool, name: bytes, dir_fd: int) -> bool:
        """Hard-link a blob as `name` in a tree; False where its inode takes no more links. Raises FileNotFoundError."""
        self.twin(digest, executable)
        try:
            os.link(blob_name(digest, executable), name, src_dir_fd=self.blobs, dst_dir_fd=dir_fd)
        except OSError as error:
            if error.errno != EMLINK:
                raise
            return False
        return True

    def copy_into(self, digest: bytes, name: bytes, dir_fd: int, mode: int, *, sealed: bool) -> None:
        """Write a blob's contents as the new file `name`, an inode of its own. Raises FileNotFoundError."""
        source = self.open(digest)
        try:
            target = os.open(name, _NEW, 0o600, dir_fd=dir_fd)
            try:
                copy_contents(source, target)
                os.fchmod(target, mode)
                if sealed:
                    os.utime(target, ns=_TIMES)
            finally:
                os.close(target)
        finally:
            os.close(source)

    def seal_symlink(self, name: bytes, dir_fd: int) -> None:
        """Make a symlink ours, with the times that inputs have; its mode means nothing."""
        if os.lstat(name, dir_fd=dir_fd).st_uid != os.geteuid():
            os.chown(name, os.geteuid(), os.getegid(), dir_fd=dir_fd, follow_symlinks=False)
        os.utime(name, ns=_TIMES, dir_fd=dir_fd, follow_symlinks=False)

    def seal_directory(self, descriptor: int) -> None:
        """Give a directory the mode and times that inputs have; after its entries were made."""
        os.fchmod(descriptor, 0o555)
        os.utime(descriptor, ns=_TIMES)

    def sync(self, digest: bytes) -> None:
        """Flush one blob, in both its forms, and its names to the disk."""
        for name, flags in (
            (blob_name(digest), os.O_RDONLY),
            (blob_name(digest, executable=True), os.O_RDONLY),
            (digest.hex()[:2], DIRECTORY),
        ):
            with suppress(FileNotFoundError):
                descriptor = os.open(name, flags | os.O_CLOEXEC, dir_fd=self.blobs)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
