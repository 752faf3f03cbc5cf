"""The static shell that builds get as /bin/sh: found on the host, checked, taken into the store."""

import dataclasses
import os
import shutil
import struct

from kiln.castore.local.store import LocalStore
from kiln.castore.model import FileNode
from kiln.errors import Usage

_CANDIDATES = ("busybox", "/bin/busybox", "/usr/lib/klibc/bin/sh", "bash-static")
_PT_INTERP = 3
_SHELL_BYTES_MAX = 64 << 20


class ShellUnusable(Usage):
    """A shell that cannot stand alone in a sandbox."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path} cannot be the builds' shell: {why}; on Debian, busybox-static brings one that can")
        self.path = path


def is_static(program: bytes) -> bool:
    """Whether an ELF executable needs no interpreter: elf(5), program headers of type PT_INTERP. Not ELF: False."""
    if len(program) < 64 or program[:4] != b"\x7fELF" or program[5] != 1:
        return False
    if program[4] == 2:
        offset, (size, count) = *struct.unpack_from("<Q", program, 32), struct.unpack_from("<HH", program, 54)
    else:
        offset, (size, count) = *struct.unpack_from("<I", program, 28), struct.unpack_from("<HH", program, 42)
    if offset + size * count > len(program):
        return False
    return all(struct.unpack_from("<I", program, offset + size * n)[0] != _PT_INTERP for n in range(count))


async def import_shell(store: LocalStore, path: str | None) -> FileNode | None:
    """The shell at `path` as a node of `store`; with None, the first usable one of this host, if there is any.

    Raises ShellUnusable for a `path` that was asked for.
    """
    if path is not None:
        return await _imported(store, path)
    for candidate in _CANDIDATES:
        found = shutil.which(candidate)
        if found is not None:
            try:
                return await _imported(store, found)
            except ShellUnusable:
                continue
    return None


async def _imported(store: LocalStore, path: str) -> FileNode:
    program = _read(path)
    if not is_static(program):
        raise ShellUnusable(path, "it is not a static ELF program, and its libraries would not be there")
    return dataclasses.replace(await store.add_blob(program), executable=True)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > _SHELL_BYTES_MAX:
                raise ShellUnusable(path, "it is larger than any shell")
            return file.read()
    except OSError as error:
        raise ShellUnusable(path, str(error.strerror)) from error
