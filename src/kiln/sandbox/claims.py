"""Which process a build's directory belongs to: builds/<id>/ has a `lock` that is held for as long as its owner lives.

All directories of one owner share one lock: `lock` in each is a hard link to a single file with a single descriptor, so
ten thousand waiting builds cost no descriptors. The kernel lets go of it when the process ends, however it ends.
"""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from errno import EMLINK, ENOENT, ENOTEMPTY

from kiln.castore.dirfd import DIRECTORY
from kiln.castore.local.store import LocalStore

_LOCK = "lock"


class Claims:
    """The build directories that one owner makes in a store."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self._locks: list[int] = []
        self._path = ""

    def make(self, build_id: str) -> str:
        """Make builds/<id>/, ours from its first moment, and return its path. Raises FileExistsError."""
        directory = f"{self._store.builds_dir}/{build_id}"
        if os.path.lexists(directory):
            raise FileExistsError(directory)
        staging = f"{self._store.tmp_dir}/claim-{build_id}"
        os.mkdir(staging, 0o700)
        try:
            self._link(f"{staging}/{_LOCK}")
            os.rename(staging, directory)  # With its lock in it, or whoever recovers the store would remove it.
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{staging}/{_LOCK}")
            os.rmdir(staging)
            raise
        return directory

    def close(self) -> None:
        """Let go of all directories; those that are still there belong to nobody now."""
        for lock in self._locks:
            os.close(lock)
        self._locks.clear()

    def _link(self, path: str) -> None:
        if self._locks:
            try:
                os.link(self._path, path)
            except OSError as error:
                if error.errno != EMLINK:  # ext4 counts to 65,000.
                    raise
            else:
                return
        self._path = f"{self._store.tmp_dir}/lock-{secrets.token_hex(8)}"
        lock = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self._locks.append(lock)
        os.link(self._path, path)


def release(directory: str) -> None:
    """Make the directory nobody's; it goes, unless something was left in it on purpose. Gone already is fine."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{directory}/{_LOCK}")
    try:
        os.rmdir(directory)
    except OSError as error:
        if error.errno not in {ENOTEMPTY, ENOENT}:
            raise


@contextlib.contextmanager
def held(builds_dir: str, build_id: str) -> Iterator[str]:
    """The directory of a build that is over, ours for the block. Raises FileNotFoundError, BlockingIOError."""
    directory = f"{builds_dir}/{build_id}"
    with settled(builds_dir):
        lock = os.open(f"{directory}/{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise
    try:
        yield directory
    finally:
        release(directory)
        os.close(lock)


@contextlib.contextmanager
def settled(builds_dir: str) -> Iterator[None]:
    """Nobody else asks `is_held` meanwhile: asking takes the lock for a moment, and would look like an owner."""
    descriptor = os.open(builds_dir, DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_held(directory: str) -> bool:
    """Whether a living process owns the directory. Ask it inside `settled`."""
    try:
        lock = os.open(f"{directory}/{_LOCK}", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
