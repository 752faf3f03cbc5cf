"""Walking trees by directory descriptor: any depth, any path length, no link followed, few descriptors."""

import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Self

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_DESCRIPTORS_MAX = 64  # Per walk. Deeper levels reopen their parents through "..".


class TreeMoved(Exception):
    """A directory's ".." is no longer the directory through which it was entered."""


class _Level:
    __slots__ = ("descriptor", "identity", "name")

    def __init__(self, name: bytes, descriptor: int) -> None:
        status = os.fstat(descriptor)
        self.name = name
        self.descriptor = descriptor
        self.identity = (status.st_dev, status.st_ino)


class Descent:
    """A position in a tree: `enter` a directory below, `leave` to its parent.

    Holds at most 64 descriptors: a parent that was closed is opened again through "..", and has to be the same inode.
    """

    def __init__(self, descriptor: int) -> None:
        """Take over `descriptor`, the open root."""
        self._levels = [_Level(b"", descriptor)]

    @property
    def descriptor(self) -> int:
        """The directory we stand in; valid until the next `enter` or `leave`."""
        return self._levels[-1].descriptor

    def path(self, name: bytes = b"") -> bytes:
        """Where we stand, or `name` in it, relative to the root; "." is the root itself."""
        parts = [level.name for level in self._levels[1:]]
        return b"/".join([*parts, name] if name else parts) or b"."

    def parts(self) -> list[bytes]:
        """The names that lead from the root to where we stand."""
        return [level.name for level in self._levels[1:]]

    def enter(self, name: bytes) -> None:
        """Go down into `name`. Raises OSError, ELOOP or ENOTDIR where it is no directory."""
        self._levels.append(_Level(name, os.open(name, DIRECTORY, dir_fd=self.descriptor)))
        if len(self._levels) > _DESCRIPTORS_MAX:
            above = self._levels[-1 - _DESCRIPTORS_MAX]
            os.close(above.descriptor)
            above.descriptor = -1

    def leave(self) -> None:
        """Go back up. Raises TreeMoved where the directory was moved meanwhile."""
        parent = self._levels[-2]
        if parent.descriptor < 0:
            reopened = _Level(parent.name, os.open(b"..", DIRECTORY, dir_fd=self.descriptor))
            if reopened.identity != parent.identity:
                os.close(reopened.descriptor)
                raise TreeMoved
            self._levels[-2] = reopened
        os.close(self._levels.pop().descriptor)

    def close(self) -> None:
        """Close every descriptor, the root's too."""
        for level in self._levels:
            if level.descriptor >= 0:
                os.close(level.descriptor)
        self._levels.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def visit(descriptor: int) -> Iterator[tuple[int, list[tuple[str, os.stat_result]]]]:
    """Each directory from the open root `descriptor` down, parents first: (its descriptor, names and states in it).

    For trees that may change meanwhile: what vanishes or is moved away is left out. A descriptor is valid until the
    next step.
    """
    with Descent(os.dup(descriptor)) as descent, suppress(TreeMoved):
        pending: list[list[str]] = []
        entered = True
        while True:
            if entered:
                entries = _states(descent.descriptor)
                yield descent.descriptor, entries
                pending.append([name for name, status in entries if stat.S_ISDIR(status.st_mode)])
            while pending and not pending[-1]:
                pending.pop()
                if pending:
                    descent.leave()
            if not pending:
                return
            try:
                descent.enter(os.fsencode(pending[-1].pop()))
                entered = True
            except OSError:
                entered = False


def _states(descriptor: int) -> list[tuple[str, os.stat_result]]:
    found = []
    with suppress(OSError), os.scandir(descriptor) as entries:
        for entry in entries:
            with suppress(OSError):
                found.append((entry.name, entry.stat(follow_symlinks=False)))
    return found


def change_mode(name: bytes, change: Callable[[int], int], *, dir_fd: int) -> None:
    """Set the mode of `name` to `change(its mode)`, whatever the present one is, and follow no link."""
    descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISLNK(mode):  # fchmod refuses O_PATH descriptors; their /proc name leads to the same inode.
            os.chmod(f"/proc/self/fd/{descriptor}", change(stat.S_IMODE(mode)))
    finally:
        os.close(descriptor)


def remove_tree(name: bytes, *, dir_fd: int) -> None:
    """Remove `name` and all below it, of any depth, read-only or mode 000; nothing there is no error.

    Directories are moved up into the root one at a time before they are emptied, so one descriptor is enough, and
    neither depth nor path length matters.
    """
    try:
        if not stat.S_ISDIR(os.lstat(name, dir_fd=dir_fd).st_mode):
            os.unlink(name, dir_fd=dir_fd)
            return
        root = _open_writable(name, dir_fd)
    except FileNotFoundError:
        return
    try:
        prefix = b".removing-" + secrets.token_hex(8).encode() + b"-"
        pending = _empty(root, root, prefix, 0)
        moved = len(pending)
        while pending:
            below = pending.pop()
            descriptor = _open_writable(below, root)
            try:
                lifted = _empty(descriptor, root, prefix, moved)
            finally:
                os.close(descriptor)
            moved += len(lifted)
            pending += lifted
            os.rmdir(below, dir_fd=root)
    finally:
        os.close(root)
    os.rmdir(name, dir_fd=dir_fd)


def remove_path(path: str) -> None:
    """`remove_tree` of what is at `path`."""
    parent, name = os.path.split(os.fsencode(path.rstrip("/")))
    dir_fd = os.open(parent or b".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        remove_tree(name, dir_fd=dir_fd)
    finally:
        os.close(dir_fd)


def _open_writable(name: bytes, dir_fd: int) -> int:
    """Open the directory `name` so that its entries can be removed and it can be moved."""
    if os.geteuid() != 0:  # Nothing stops root.
        with suppress(PermissionError):  # Not ours: the open or the removal says so.
            change_mode(name, lambda mode: mode | 0o700, dir_fd=dir_fd)
    return os.open(name, DIRECTORY, dir_fd=dir_fd)


def _empty(descriptor: int, root: int, prefix: bytes, moved: int) -> list[bytes]:
    """Unlink what is no directory, move the directories into `root`; returns their new names."""
    with os.scandir(descriptor) as found:
        entries = [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in found]
    lifted: list[bytes] = []
    for name, is_directory in entries:
        if is_directory:
            if os.geteuid() != 0:  # Moving a directory rewrites its "..", which takes write permission on it.
                with suppress(PermissionError):
                    change_mode(name, lambda mode: mode | 0o700, dir_fd=descriptor)
            target = prefix + b"%d" % (moved + len(lifted))
            os.rename(name, target, src_dir_fd=descriptor, dst_dir_fd=root)
            lifted.append(target)
        else:
            os.unlink(name, dir_fd=descriptor)
    return lifted
