"""The Linux system calls that Python lacks: mounts by descriptor (Linux 5.12), namespaces, personality, keyrings.

Imports nothing of kiln's, so that the launcher process starts in milliseconds. Numbers are the same on all
architectures from 424 on (include/uapi/asm-generic/unistd.h); flags are from include/uapi/linux/{mount,sched,keyctl}.h.
"""

import ctypes
import errno
import os
import struct

_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT, _MOUNT_SETATTR = 428, 429, 430, 431, 432, 442

_KEYCTL = {"x86_64": 250, "aarch64": 219}
_KEYCTL_JOIN_SESSION_KEYRING = 1

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 4
_FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 1, 6

RDONLY, NOSUID, NODEV = 1, 2, 4

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000

ADDR_NO_RANDOMIZE = 0x0040000
PER_LINUX32 = 0x0008

_PR_SET_CHILD_SUBREAPER, _PR_SET_PDEATHSIG = 36, 1

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(number: int, what: str, *arguments: object) -> int:
    return _checked(_libc.syscall(number, *arguments), what)


def set_attributes(descriptor: int, attributes: int, *, recursive: bool = False) -> None:
    """Add mount attributes to the mount (with `recursive`, and all below it) that `descriptor` refers to."""
    flags = _AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    request = struct.pack("QQQQ", attributes, 0, 0, 0)
    _syscall(_MOUNT_SETATTR, "mount_setattr", descriptor, b"", flags, request, len(request))


def attach(descriptor: int, target: bytes) -> None:
    """Put the detached mount `descriptor` onto `target`, whose last component may be anything but a symlink."""
    _syscall(_MOVE_MOUNT, "move_mount", descriptor, b"", _AT_FDCWD, target, _MOVE_MOUNT_F_EMPTY_PATH)


def bind(source: bytes, target: bytes, attributes: int, *, recursive: bool = False) -> None:
    """Show `source` at `target` as well, with `attributes` from the start: there is no moment without them."""
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | (_AT_RECURSIVE if recursive else 0)
    tree = _syscall(_OPEN_TREE, "open_tree", _AT_FDCWD, source, flags)
    try:
        set_attributes(tree, attributes, recursive=recursive)
        attach(tree, target)
    finally:
        os.close(tree)


def unmount(target: bytes) -> None:
    """Take the mount at `target` away; who still uses it keeps it till then (MNT_DETACH, umount2(2))."""
    _checked(_libc.umount2(target, 2), "umount2")


def tmpfs(target: bytes, attributes: int, options: dict[str, str]) -> None:
    """Mount an empty file system in memory on `target`; options such as mode and size are those of its man page."""
    filesystem = _syscall(_FSOPEN, "fsopen", b"tmpfs", 1)
    try:
        for key, value in options.items():
            _syscall(_FSCONFIG, "fsconfig", filesystem, _FSCONFIG_SET_STRING, key.encode(), value.encode(), 0)
        _syscall(_FSCONFIG, "fsconfig", filesystem, _FSCONFIG_CMD_CREATE, None, None, 0)
        mount = _syscall(_FSMOUNT, "fsmount", filesystem, 1, attributes)
    finally:
        os.close(filesystem)
    try:
        attach(mount, target)
    finally:
        os.close(mount)


def enter(descriptor: int, kind: int) -> None:
    """Join the namespace that `descriptor` refers to (setns(2)); needs a single-threaded process for users."""
    _checked(_libc.setns(descriptor, kind), "setns")


def act_as(uid: int, gid: int) -> None:
    """Make files as `uid` and `gid` from here on (setfsuid(2)): capabilities over files go and come with uid 0."""
    if uid == 0:
        _libc.setfsuid(0)
        _libc.setfsgid(0)
    else:
        _libc.setfsgid(gid)
        _libc.setfsuid(uid)


def set_personality(persona: int) -> None:
    """The execution domain of this process and what it executes (personality(2))."""
    _checked(_libc.personality(ctypes.c_ulong(persona)), "personality")


def leave_session_keyring() -> None:
    """Have an empty session keyring from here on: the inherited one may hold keys of whoever started kiln."""
    try:
        _syscall(_KEYCTL[os.uname().machine], "keyctl", _KEYCTL_JOIN_SESSION_KEYRING, None)
    except OSError as error:
        if error.errno != errno.ENOSYS:  # A kernel without keys has nothing to hide.
            raise


def adopt_orphans() -> None:
    """Become the parent of all descendants whose own parent ends."""
    _checked(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def die_with_parent(signal: int) -> None:
    """Be sent `signal` when the parent thread ends."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal, 0, 0, 0), "prctl")
