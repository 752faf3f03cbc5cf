"""A named node <-> the Entry of `snix.castore.v1`, the Node of `tvix.castore.v1` (pure).

The two messages have the same bytes. Whether a name is wanted depends on where the message stands (the result of a
build has none), so names are taken as they come: `Directory` and `check_name` are there for those who want one.
"""

from kiln.castore.model import Digest, DirectoryNode, FileNode, Node, SymlinkNode
from kiln.errors import Invalid
from kiln.protos.snix.castore.protos import castore_pb2
from kiln.protos.tvix.castore.protos import castore_pb2 as tvix_castore_pb2


class EntryUnset(Invalid):
    """An Entry that is neither directory, file nor symlink."""

    def __init__(self) -> None:
        super().__init__("the entry is neither a directory nor a file nor a symlink")


def to_entry(name: bytes, node: Node) -> castore_pb2.Entry:
    """`node` under `name` (empty: none)."""
    match node:
        case DirectoryNode(digest, size):
            directory = castore_pb2.DirectoryEntry(name=name, digest=digest.raw, size=size)
            return castore_pb2.Entry(directory=directory)
        case FileNode(digest, size, executable):
            file = castore_pb2.FileEntry(name=name, digest=digest.raw, size=size, executable=executable)
            return castore_pb2.Entry(file=file)
        case SymlinkNode(target):
            return castore_pb2.Entry(symlink=castore_pb2.SymlinkEntry(name=name, target=target))


def from_entry(entry: castore_pb2.Entry) -> tuple[bytes, Node]:
    """Name and node. Raises EntryUnset, DigestLengthInvalid, TargetInvalid."""
    match entry.WhichOneof("entry"):
        case "directory":
            return entry.directory.name, DirectoryNode(Digest(entry.directory.digest), entry.directory.size)
        case "file":
            file = entry.file
            return file.name, FileNode(Digest(file.digest), file.size, file.executable)
        case "symlink":
            return entry.symlink.name, SymlinkNode(entry.symlink.target)
        case None:
            raise EntryUnset


def to_tvix_node(name: bytes, node: Node) -> tvix_castore_pb2.Node:
    """`node` under `name`, as `to_entry`."""
    return tvix_castore_pb2.Node.FromString(to_entry(name, node).SerializeToString())


def from_tvix_node(node: tvix_castore_pb2.Node) -> tuple[bytes, Node]:
    """Name and node, as `from_entry`."""
    return from_entry(castore_pb2.Entry.FromString(node.SerializeToString()))
