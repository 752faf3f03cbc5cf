"""A directory becomes a tree of files: for builds by hard link, read-only and cached; `export.py` writes plain ones.

Blocks; run it in a thread.
"""

import os
from collections.abc import Callable, Iterator
from errno import EEXIST, ENOTEMPTY

from kiln.castore.dirfd import DIRECTORY, Descent, remove_tree
from kiln.castore.errors import DigestMismatch, EntriesTooMany
from kiln.castore.local.files import StoreFiles, mode_of, tree_name
from kiln.castore.model import Digest, Directory, DirectoryNode, FileNode, Node, Scheme, SymlinkNode

ENTRIES_MAX = 4_000_000
"""Of one tree, counted as often as they stand in it: a few small directories can refer to each other for ever. The
largest trees that people build from have half a million."""

_CHUNK_BYTES = 1 << 20

Place = Callable[[bytes, FileNode | SymlinkNode, int], None]  # Name, node, the directory's descriptor.


def write_tree(
    root: int, directory: Directory, read: Callable[[Digest], Directory], place: Place, finish: Callable[[int], None]
) -> None:
    """Fill the empty directory `root`, which is taken over; `finish` gets each directory once its entries are there.

    Depth costs neither descriptors nor stack.
    """
    with Descent(root) as descent:
        levels: list[Iterator[tuple[bytes, Node]]] = [iter(directory)]
        while levels:
            for name, node in levels[-1]:
                if isinstance(node, DirectoryNode):
                    below = read(node.digest)
                    os.mkdir(name, 0o700, dir_fd=descent.descriptor)
                    descent.enter(name)
                    levels.append(iter(below))
                    break
                place(name, node, descent.descriptor)
            else:
                finish(descent.descriptor)
                levels.pop()
                if levels:
                    descent.leave()


def check_out(digest: Digest, read: Callable[[Digest], Directory], files: StoreFiles, scheme: Scheme) -> None:
    """Make trees/<digest>, unless it is there.

    Raises FileNotFoundError for a missing blob, DigestMismatch for a damaged one, EntriesTooMany, and what `read`
    raises.

    It is built aside and renamed, so other processes see all of it or nothing; whoever comes second drops its own.
    Within the tree no two names share an inode: a tool that looks (tar does) sees the same in every sandbox.
    """
    target = tree_name(digest.raw)
    if os.access(target, os.F_OK, dir_fd=files.trees):
        return
    directory = read(digest)
    entries = scheme.size_of(directory) // scheme.weight
    if entries > ENTRIES_MAX:
        raise EntriesTooMany(digest, entries=entries, entries_max=ENTRIES_MAX)
    linked: set[FileNode] = set()

    def place(name: bytes, node: FileNode | SymlinkNode, dir_fd: int) -> None:
        if isinstance(node, SymlinkNode):
            os.symlink(node.target, name, dir_fd=dir_fd)
            files.seal_symlink(name, dir_fd)
            return
        if node in linked or not files.link_into(node.digest.raw, node.executable, name, dir_fd):
            files.copy_into(node.digest.raw, name, dir_fd, mode_of(node.executable), sealed=True)
        if node not in linked:
            check_contents(name, dir_fd, node.digest, scheme)
            linked.add(node)

    temporary = files.temporary_name()
    os.mkdir(temporary, 0o700, dir_fd=files.temporary)
    try:
        root = os.open(temporary, DIRECTORY, dir_fd=files.temporary)
        write_tree(root, directory, read, place, files.seal_directory)
        keep_tree(temporary, files.temporary, digest, files)
    finally:
        remove_tree(os.fsencode(temporary), dir_fd=files.temporary)  # It is gone where all went well.


def check_contents(name: str | bytes, dir_fd: int, digest: Digest, scheme: Scheme) -> None:
    """Raise DigestMismatch unless the file has the contents of `digest`: links and the kernel's copies show us none."""
    hasher = scheme.new_hasher()
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        while chunk := os.read(descriptor, _CHUNK_BYTES):
            hasher.update(chunk)
    finally:
        os.close(descriptor)
    found = Digest(hasher.digest())
    if found != digest:
        raise DigestMismatch(wanted=digest, found=found, what="blob")


def keep_tree(name: str, dir_fd: int | None, digest: Digest, files: StoreFiles) -> None:
    """Rename a finished, sealed tree to trees/<digest>; where there is one, leave ours as it is."""
    root = os.open(name, DIRECTORY, dir_fd=dir_fd)
    try:
        if os.geteuid() != 0:  # Moving a directory rewrites its "..", which takes write permission on it.
            os.fchmod(root, 0o755)
        try:
            os.rename(name, tree_name(digest.raw), src_dir_fd=dir_fd, dst_dir_fd=files.trees)
        except OSError as error:  # Somebody else was faster, with the same contents.
            if error.errno not in {EEXIST, ENOTEMPTY}:
                raise
        files.seal_directory(root)
    finally:
        os.close(root)
