"""The steps by which the launcher process completes the root of a runtime that waits, in its mount namespace."""

import os
from typing import Any

from kiln.sandbox import mounts

_NEW_ROOT = b"/newroot"
_OLD_ROOT = b"/oldroot"
_IN_THE_ROOTS_TMPFS = frozenset({"dir", "file", "link", "remove"})


def raw(text: str) -> bytes:
    """The bytes of a name that came as JSON."""
    return text.encode("utf-8", "surrogateescape")


def complete_root(steps: list[list[Any]], uid: int, gid: int) -> None:
    """Carry out `steps` below /newroot. What is made in the root's own tmpfs is made as `uid`, the only one it knows.

    Steps: ["dir", path, mode] ["file", path, mode, contents] ["link", path, target] ["remove", path]
    ["bind", source, path, attributes, recursive] ["tmpfs", path, attributes, options] ["attributes", path, attributes]
    """
    umask = os.umask(0)
    try:
        _carry_out(steps, uid, gid)
    finally:  # The next runtime starts under it.
        os.umask(umask)


def _carry_out(steps: list[list[Any]], uid: int, gid: int) -> None:
    acting = (0, 0)

    def act(wanted: tuple[int, int]) -> None:
        nonlocal acting
        if wanted != acting:
            mounts.act_as(*wanted)
            acting = wanted

    for step in steps:
        kind = step[0]
        path = _NEW_ROOT + b"/" + raw(step[2] if kind == "bind" else step[1])
        act((uid, gid) if kind in _IN_THE_ROOTS_TMPFS else (0, 0))
        try:
            match kind:
                case "dir":
                    os.mkdir(path, step[2])
                case "file":
                    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, step[2])
                    with os.fdopen(descriptor, "wb") as file:
                        file.write(raw(step[3]))
                case "link":
                    os.symlink(raw(step[2]), path)
                case "remove":
                    os.unlink(path)
                case "bind":
                    mounts.bind(_OLD_ROOT + raw(step[1]), path, step[3], recursive=step[4])
                case "tmpfs":
                    mounts.tmpfs(path, step[2], step[3])
                case "attributes":
                    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
                    mounts.set_attributes(descriptor, step[2])
                    os.close(descriptor)
        except OSError as error:
            where = os.fsdecode(path.removeprefix(_NEW_ROOT))
            source = f" (from {step[1]})" if kind == "bind" else ""
            raise OSError(f"cannot make {kind} {where}{source}: {error}") from error
    act((0, 0))
