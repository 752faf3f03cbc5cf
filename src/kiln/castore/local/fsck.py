"""Checks of what a store holds against the digests it claims, and how much it holds. Blocks; run it in a thread."""

import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass

from kiln.castore.dirfd import DIRECTORY, Descent, remove_tree
from kiln.castore.errors import DirectoryInvalid
from kiln.castore.local.database import Database
from kiln.castore.local.files import MTIME_NS, StoreFiles, mode_of
from kiln.castore.model import Digest, Directory, DirectoryNode, FileNode, Node, Scheme, SymlinkNode
from kiln.castore.wire import decode_directory

_CHUNK_BYTES = 1 << 20
_DELETE = "delete from directories where digest = ?"


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong. `what` names it, relative to the store; `repaired`: it was dropped or set right."""

    what: str
    why: str
    repaired: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """What a store holds. Bytes are disk blocks, each inode once."""

    blobs: int
    blob_bytes: int
    trees: int
    tree_bytes: int  # Only what trees do not share with blobs.
    database_bytes: int
    other_bytes: int  # Temporary files and builds.


def check(files: StoreFiles, database: Database, scheme: Scheme, *, repair: bool) -> list[Damage]:
    """Re-hash every blob, directory and tree. With `repair`, what does not match is dropped: it can be had again.

    A directory whose blobs are not (yet) there is no damage: uploads may bring them in any order.
    """
    damage = list(_check_blobs(files, scheme, repair=repair, since=None))
    damage += _check_directories(database, scheme, repair=repair)
    damage += _check_trees(files, database, scheme, repair=repair)
    return damage


def drop_suspects(files: StoreFiles, scheme: Scheme, *, since: float, tmp: int) -> None:
    """After a crash of the machine: drop blobs changed from `since` on whose contents are torn, and such trees.

    Trees are only a cache of blobs and directories, so the suspect ones are dropped unseen. SQLite looks after its own.
    """
    for name in _trees(files):
        if _changed_since(os.lstat(name, dir_fd=files.trees), since):
            _drop_tree(name, files, tmp)
    for _ in _check_blobs(files, scheme, repair=True, since=since):
        pass


def disk_usage(path: str) -> Usage:
    """Walk the store at `path`."""
    seen: set[int] = set()
    blobs, blob_bytes = _measure(path, "blobs", seen)
    _, tree_bytes = _measure(path, "trees", seen)
    other = sum(_measure(path, name, seen)[1] for name in ("tmp", "builds"))
    trees = sum(len(os.listdir(entry.path)) for entry in os.scandir(os.path.join(path, "trees")))
    database = sum(entry.stat().st_blocks * 512 for entry in os.scandir(path) if entry.name.startswith("db.sqlite"))
    return Usage(blobs, blob_bytes, trees, tree_bytes, database, other)


def _measure(path: str, name: str, seen: set[int]) -> tuple[int, int]:
    """Files, and bytes of inodes not `seen` yet, below one of the store's directories."""
    count = total = 0
    with Descent(os.open(os.path.join(path, name), DIRECTORY)) as descent:
        pending = [_subdirectories_and_files(descent.descriptor)]
        while pending:
            directories, statuses = pending[-1]
            for status in statuses:
                count += 1
                if status.st_ino not in seen:
                    seen.add(status.st_ino)
                    total += status.st_blocks * 512
            statuses.clear()
            if directories:
                try:
                    descent.enter(directories.pop())
                except OSError:  # Gone meanwhile, or a build's own.
                    continue
                pending.append(_subdirectories_and_files(descent.descriptor))
            else:
                pending.pop()
                if pending:
                    descent.leave()
    return count, total


def _subdirectories_and_files(descriptor: int) -> tuple[list[bytes], list[os.stat_result]]:
    directories: list[bytes] = []
    statuses: list[os.stat_result] = []
    with os.scandir(descriptor) as found:
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                directories.append(os.fsencode(entry.name))
            else:
                try:
                    statuses.append(entry.stat(follow_symlinks=False))
                except FileNotFoundError:
                    continue
    return directories, statuses


def _changed_since(status: os.stat_result, since: float) -> bool:
    return (
        status.st_ctime >= since or status.st_ctime > time.time()
    )  # In the future: the clock was wrong then or is now.


def _check_blobs(files: StoreFiles, scheme: Scheme, *, repair: bool, since: float | None) -> Iterator[Damage]:
    for first in sorted(os.listdir(files.blobs)):
        descriptor = os.open(first, DIRECTORY, dir_fd=files.blobs)
        try:
            for rest in sorted(os.listdir(descriptor)):
                status = os.lstat(rest, dir_fd=descriptor)
                if since is not None and not _changed_since(status, since):
                    continue
                executable = rest.endswith(".x")
                wanted = first + rest.removesuffix(".x")
                why = _blob_damage(rest, descriptor, status, wanted, scheme)
                if why is None:
                    sealed = stat.S_IMODE(status.st_mode) == mode_of(executable) and status.st_mtime_ns == MTIME_NS
                    if sealed:
                        continue
                    why = "its mode or mtime was changed"
                    if repair:
                        _reseal(rest, descriptor, files, executable)
                elif repair:
                    remove_tree(os.fsencode(rest), dir_fd=descriptor)
                yield Damage(f"blobs/{first}/{rest}", why, repair)
        finally:
            os.close(descriptor)


def _blob_damage(name: str, dir_fd: int, status: os.stat_result, wanted: str, scheme: Scheme) -> str | None:
    if not stat.S_ISREG(status.st_mode):
        return "it is no regular file"
    if len(wanted) != 2 * Digest.LENGTH or set(wanted) - set("0123456789abcdef"):
        return "its name is no digest"
    try:
        found = _hash(name, dir_fd, scheme)
    except OSError as error:
        return str(error.strerror)
    return None if found.hex() == wanted else f"its contents have the digest {found.hex()}"


def _hash(name: str | bytes, dir_fd: int, scheme: Scheme) -> bytes:
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        hasher = scheme.new_hasher()
        while chunk := os.read(descriptor, _CHUNK_BYTES):
            hasher.update(chunk)
        return hasher.digest()
    finally:
        os.close(descriptor)


def _reseal(name: str, dir_fd: int, files: StoreFiles, executable: bool) -> None:
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        files.seal(descriptor, executable)
    finally:
        os.close(descriptor)


def _check_directories(database: Database, scheme: Scheme, *, repair: bool) -> Iterator[Damage]:
    """Digests and bodies first, then references, until nothing more falls: a dropped child takes its parents along."""
    parents: dict[bytes, list[bytes]] = {}
    present: set[bytes] = set()
    bad: list[tuple[bytes, str]] = []
    for digest, body in database.rows("select digest, body from directories"):
        why, directory = _decoded(digest, body, scheme)
        if directory is None:
            bad.append((digest, why))
            continue
        present.add(digest)
        for _, node in directory.entries:
            if isinstance(node, DirectoryNode):
                parents.setdefault(node.digest.raw, []).append(digest)
    bad += [(child, "") for child in parents if child not in present]
    while bad:
        digest, why = bad.pop()
        if why:
            if repair:
                database.write(_DELETE, [(digest,)])
            yield Damage(f"directory {digest.hex()}", why, repair)
        for parent in parents.get(digest, ()):
            if parent in present:
                present.remove(parent)
                bad.append((parent, f"it refers to directory {digest.hex()}, which is missing or damaged"))


def _decoded(digest: bytes, body: bytes, scheme: Scheme) -> tuple[str, Directory | None]:
    found = scheme.digest_of(body)
    if found.raw != digest:
        return f"its contents have the digest {found}", None
    try:
        return "", decode_directory(body)
    except DirectoryInvalid as error:
        return error.rule, None


def _trees(files: StoreFiles) -> Iterator[str]:
    for first in sorted(os.listdir(files.trees)):
        for rest in sorted(os.listdir(f"/proc/self/fd/{files.trees}/{first}")):
            yield f"{first}/{rest}"


def _drop_tree(name: str, files: StoreFiles, tmp: int) -> None:
    """Move a tree away before it is taken apart: nobody may ever see a part of one."""
    aside = name.replace("/", "")
    remove_tree(os.fsencode(aside), dir_fd=tmp)
    if os.geteuid() != 0:  # Moving a directory rewrites its "..".
        os.chmod(name, 0o700, dir_fd=files.trees)
    os.rename(name, aside, src_dir_fd=files.trees, dst_dir_fd=tmp)
    remove_tree(os.fsencode(aside), dir_fd=tmp)


def _check_trees(files: StoreFiles, database: Database, scheme: Scheme, *, repair: bool) -> Iterator[Damage]:
    for name in _trees(files):
        try:
            digest = bytes.fromhex(name.replace("/", ""))
            why = _tree_damage(name, digest, files, database, scheme)
        except ValueError:
            why = "its name is no digest"
        if why is not None:
            if repair:
                _drop_tree(name, files, files.temporary)
            yield Damage(f"trees/{name}", why, repair)


def _tree_damage(name: str, digest: bytes, files: StoreFiles, database: Database, scheme: Scheme) -> str | None:
    """Compare a tree with its directories: names, kinds, modes, times, contents."""

    def directory_of(digest: bytes) -> Directory | None:
        row = database.row("select body from directories where digest = ?", (digest,))
        return None if row is None else _decoded(digest, bytes(row[0]), scheme)[1]

    root = directory_of(digest)
    if root is None:
        return "its directory is not stored"
    try:
        descriptor = os.open(name, DIRECTORY, dir_fd=files.trees)
    except OSError as error:
        return str(error.strerror)
    with Descent(descriptor) as descent:
        levels = [_Level(root, descent.descriptor)]
        while levels:
            level = levels[-1]
            if level.why is not None:
                return f"{descent.path().decode(errors='replace')}: {level.why}"
            for entry, node in level.entries:
                if isinstance(node, DirectoryNode):
                    below = directory_of(node.digest.raw)
                    if below is None:
                        return f"directory {node.digest} is not stored"
                    descent.enter(entry)
                    levels.append(_Level(below, descent.descriptor))
                    break
                why = _entry_damage(entry, node, descent.descriptor, files, scheme)
                if why is not None:
                    return f"{descent.path(entry).decode(errors='replace')}: {why}"
            else:
                levels.pop()
                if levels:
                    descent.leave()
    return None


class _Level:
    """One directory of a tree against what it should be."""

    def __init__(self, wanted: Directory, descriptor: int) -> None:
        self.entries: Iterator[tuple[bytes, Node]] = iter(wanted.entries)
        self.why: str | None = None
        status = os.fstat(descriptor)
        with os.scandir(descriptor) as found:
            kinds = {os.fsencode(entry.name): entry.is_dir(follow_symlinks=False) for entry in found}
        if kinds != {name: isinstance(node, DirectoryNode) for name, node in wanted.entries}:
            self.why = "it has other entries"
        elif stat.S_IMODE(status.st_mode) != 0o555 or status.st_mtime_ns != MTIME_NS:
            self.why = "its mode or mtime was changed"


def _entry_damage(
    name: bytes, node: FileNode | SymlinkNode, dir_fd: int, files: StoreFiles, scheme: Scheme
) -> str | None:
    status = os.lstat(name, dir_fd=dir_fd)
    if isinstance(node, SymlinkNode):
        same = stat.S_ISLNK(status.st_mode) and os.readlink(name, dir_fd=dir_fd) == node.target
        return None if same else "it is another symlink"
    if status.st_mode != stat.S_IFREG | mode_of(node.executable) or status.st_mtime_ns != MTIME_NS:
        return "its kind, mode or mtime was changed"
    if files.is_inode(node.digest.raw, node.executable, status):  # Checked with the blobs.
        return None
    return None if _hash(name, dir_fd, scheme) == node.digest.raw else "it has other contents"
