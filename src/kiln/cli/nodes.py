"""Nodes as people write and read them: the JSON of a castore Entry, a digest, a path in the store."""

import json
import os
import re

from kiln.build.wire_json import entry_from_json, entry_to_json
from kiln.castore.castore import Castore
from kiln.castore.errors import DirectoryNotFound
from kiln.castore.model import Digest, DirectoryNode, FileNode, Node, SymlinkNode, printable
from kiln.errors import Invalid, NotFound

_DIGEST = re.compile(r"[0-9a-fA-F]{64}")


class NotANode(Invalid):
    """What stands where a node is wanted is neither an Entry nor a digest."""

    def __init__(self, text: str) -> None:
        super().__init__(
            f"{printable(os.fsencode(text))} is no node: write the JSON of an Entry, or 64 digits of a digest"
        )
        self.text = text


class PathNotFound(NotFound):
    """A tree has nothing at a path."""

    def __init__(self, path: str) -> None:
        super().__init__(f"there is nothing at {printable(os.fsencode(path))}")
        self.path = path


def is_node_text(text: str) -> bool:
    """Whether `text` is meant as a node, not as a path: an object of JSON, or 64 hexadecimal digits."""
    return text.lstrip().startswith("{") or _DIGEST.fullmatch(text) is not None


async def parse_node(text: str, castore: Castore) -> Node:
    """The node that `text` names.

    Raises NotANode, Malformed and its like, or BlobNotFound for a digest that is not stored.
    """
    if not is_node_text(text):
        raise NotANode(text)
    if _DIGEST.fullmatch(text) is None:
        return entry_from_json(text)[1]
    digest = Digest(bytes.fromhex(text))
    try:
        directory = await castore.directories.get(digest)
    except DirectoryNotFound:
        size = 0
        async for chunk in castore.blobs.read(digest):  # Only its Entry says how large a file is.
            size += len(chunk)
        return FileNode(digest, size)
    return DirectoryNode(digest, castore.scheme.size_of(directory))


async def descend(node: Node, path: str, castore: Castore) -> Node:
    """What stands at `path`, separated by slashes, below `node`. No link is followed. Raises PathNotFound."""
    for name in filter(None, os.fsencode(path).split(b"/")):
        found = None
        if isinstance(node, DirectoryNode):
            found = (await castore.directories.get(node.digest)).get(name)
        if found is None:
            raise PathNotFound(path)
        node = found
    return node


def node_text(node: Node, name: bytes = b"") -> str:
    """`node` as one line of JSON."""
    return json.dumps(entry_to_json(name, node))


def node_line(name: bytes, node: Node) -> str:
    """`node` as a line of a listing; nothing in `name` or a target gets out of it."""
    match node:
        case DirectoryNode(digest, size):
            return f"dir   {digest} {size:>12}  {shown_name(name)}/"
        case FileNode(digest, size, executable):
            return f"{'exec ' if executable else 'file '} {digest} {size:>12}  {shown_name(name)}"
        case SymlinkNode(target):
            return f"link  {'-' * 64} {len(target):>12}  {shown_name(name)} -> {shown_name(target)}"


def shown_name(name: bytes) -> str:
    """`name` as it is where it is plain, else quoted with its bytes written out."""
    text = name.decode("utf-8", "backslashreplace")
    quoted = printable(name)
    return text if quoted[1:-1] == text and not text.startswith('"') and not text.endswith(" ") else quoted
