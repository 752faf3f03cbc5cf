"""One process's stay in a store: its temporary directory, and the record of what may not have reached the disk yet.

tmp/<session>/ is locked for as long as its owner lives, so whoever opens the store can tell and remove what a killed
process left. The file `since` in it says from when on, and in which boot, blobs were written without being flushed;
it is flushed itself, before the first of them. After a crash of the machine exactly the files changed since then are
suspect (a file's ctime cannot be set, so it needs no journal beside it); after a mere kill the page cache still has
them, and the next session takes the date over.
"""

import ctypes
import fcntl
import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass

from kiln.castore.dirfd import DIRECTORY, remove_tree

_SINCE = "since"
_CLOCK_SLACK_S = 5.0  # ctime comes from the kernel's coarse clock, and clocks are corrected.


@dataclass(frozen=True, slots=True)
class Unflushed:
    """Files changed from `since` (seconds since the epoch) on, in the boot `boot`, may not be on the disk."""

    boot: str
    since: float

    def encode(self) -> bytes:
        """As the file `since` has it."""
        return f"{self.boot} {self.since!r}\n".encode()

    @classmethod
    def decode(cls, data: bytes) -> "Unflushed":
        """Raises ValueError where `data` is none: the crash cut it off, so everything is suspect."""
        boot, since = data.decode("ascii").split()
        return cls(boot, float(since))


def boot_id() -> str:
    """What changes when the machine starts anew."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


class Session:
    """A locked directory below tmp/."""

    def __init__(self, tmp: int, *, boot: str, since: float | None = None) -> None:
        """`tmp` is the open, locked directory tmp/; `since` is inherited from a killed process of this boot."""
        self.name = f"{os.getpid()}-{secrets.token_hex(6)}"
        self._tmp = os.dup(tmp)
        self._boot = boot
        os.mkdir(self.name, 0o700, dir_fd=tmp)
        self.descriptor = os.open(self.name, DIRECTORY, dir_fd=tmp)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        self.since = time.time() - _CLOCK_SLACK_S
        self._record(self.since if since is None else min(since, self.since))

    def flush(self) -> None:
        """Bring everything written so far to the disk, and start a new period."""
        since = time.time() - _CLOCK_SLACK_S
        sync_file_system(self.descriptor)
        self._record(since)

    def close(self) -> None:
        """Flush, and leave nothing behind."""
        sync_file_system(self.descriptor)
        remove_tree(os.fsencode(self.name), dir_fd=self._tmp)
        os.close(self.descriptor)
        os.close(self._tmp)

    def _record(self, since: float) -> None:
        self.since = since
        descriptor = os.open("since.new", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self.descriptor)
        try:
            os.write(descriptor, Unflushed(self._boot, since).encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename("since.new", _SINCE, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        os.fsync(self.descriptor)
        os.fsync(self._tmp)


def abandoned(tmp: int) -> dict[str, Unflushed | None]:
    """Sessions below the open, locked directory `tmp` whose owner is dead, with what they had not flushed.

    None: unreadable, so its period is unknown.
    """
    found: dict[str, Unflushed | None] = {}
    for name in os.listdir(tmp):
        try:
            descriptor = os.open(name, DIRECTORY, dir_fd=tmp)
        except OSError:
            found[name] = None
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found[name] = None
            with suppress(OSError, ValueError):
                since = os.open(_SINCE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor)
                try:
                    found[name] = Unflushed.decode(os.read(since, 256))
                finally:
                    os.close(since)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)
    return found


def sync_file_system(descriptor: int) -> None:
    """syncfs(2): flush all of the file system on which `descriptor` lies."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(descriptor) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
