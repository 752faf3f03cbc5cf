"""A node becomes plain files of the user's: writable, no hard links into the store. Blocks; run it in a thread."""

import os
import secrets
from collections.abc import Callable
from errno import EDQUOT, EEXIST, EISDIR, ENOENT, ENOSPC, ENOTDIR, ENOTEMPTY

from kiln.castore.checkout import Place, check_contents, write_tree
from kiln.castore.dirfd import DIRECTORY, remove_tree
from kiln.castore.errors import ExportFailed, ExportFull
from kiln.castore.local.files import StoreFiles
from kiln.castore.model import Digest, Directory, DirectoryNode, FileNode, Node, Scheme, SymlinkNode


def export(
    node: Node, destination: str, read: Callable[[Digest], Directory], files: StoreFiles, scheme: Scheme
) -> None:
    """Write `node` as `destination`, replacing what stands there only once all of it is written and verified.

    Raises FileNotFoundError for a missing blob, DigestMismatch for a damaged one, ExportFailed and ExportFull where the
    destination cannot be written.
    """

    def place(name: bytes, node: FileNode | SymlinkNode, dir_fd: int) -> None:
        if isinstance(node, SymlinkNode):
            os.symlink(node.target, name, dir_fd=dir_fd)
        else:
            files.copy_into(node.digest.raw, name, dir_fd, 0o755 if node.executable else 0o644, sealed=False)
            check_contents(name, dir_fd, node.digest, scheme)

    parent, name = os.path.split(os.fsencode(destination.rstrip("/")))
    if name in {b"", b".", b".."}:
        raise ExportFailed(os.fsencode(destination), "it has no name of its own to replace")
    try:
        dir_fd = os.open(parent or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ExportFailed(parent, str(error.strerror)) from error
    suffix = secrets.token_hex(8).encode()
    temporary, replaced = b".kiln-export-" + suffix, b".kiln-replaced-" + suffix
    try:
        _write(node, temporary, dir_fd, read, place)
        _replace(temporary, name, replaced, dir_fd)
    except OSError as error:
        if error.errno in {ENOSPC, EDQUOT}:
            raise ExportFull(os.fsencode(destination), str(error.strerror)) from error
        if error.errno == ENOENT:  # A blob, not the destination: the caller finds out which are missing.
            raise
        raise ExportFailed(os.fsencode(destination), str(error.strerror)) from error
    finally:
        remove_tree(temporary, dir_fd=dir_fd)
        remove_tree(replaced, dir_fd=dir_fd)
        os.close(dir_fd)


def _write(node: Node, name: bytes, dir_fd: int, read: Callable[[Digest], Directory], place: Place) -> None:
    if not isinstance(node, DirectoryNode):
        place(name, node, dir_fd)
        return
    directory = read(node.digest)
    os.mkdir(name, 0o755, dir_fd=dir_fd)
    root = os.open(name, DIRECTORY, dir_fd=dir_fd)
    write_tree(root, directory, read, place, lambda descriptor: os.fchmod(descriptor, 0o755))


def _replace(temporary: bytes, name: bytes, replaced: bytes, dir_fd: int) -> None:
    """Rename, over a file or symlink in one step; a directory in the way (rename refuses it) is moved aside first."""
    try:
        os.rename(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except OSError as error:
        if error.errno not in {EISDIR, ENOTDIR, EEXIST, ENOTEMPTY}:
            raise
        os.rename(name, replaced, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        try:
            os.rename(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        except OSError:
            os.rename(replaced, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
            raise
