"""The canonical protobuf of a Directory, written and read by hand (pure).

Canonical means: entries sorted by name within their kind, fields in ascending order, proto3 defaults left out, varints
as short as they can be. A directory's digest is the hash of exactly these bytes. Source: castore.proto of
snix.castore.v1 (tvix.castore.v1 has the same bytes). No protobuf import: this is ingest's hot path, and its worker
processes must start fast.
"""

from collections.abc import Iterator

from kiln.castore.errors import DirectoryInvalid
from kiln.castore.model import Digest, Directory, DirectoryNode, FileNode, Node, SymlinkNode
from kiln.errors import Invalid

_VARINT = 0
_LENGTH_DELIMITED = 2
_DIGEST = b"\x12\x20"  # Field 2, 32 bytes.
_VARINTS_SHORT = tuple(bytes((value,)) for value in range(0x80))


def _varint(value: int) -> bytes:
    if value < 0x80:
        return _VARINTS_SHORT[value]
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def directory_entry(name: bytes, digest: bytes, size: int) -> bytes:
    """`Directory.directories`: one entry, with its tag and length."""
    body = b"\x0a" + _varint(len(name)) + name + _DIGEST + digest
    if size:
        body += b"\x18" + _varint(size)
    return b"\x0a" + _varint(len(body)) + body


def file_entry(name: bytes, digest: bytes, size: int, executable: bool) -> bytes:
    """`Directory.files`: one entry, with its tag and length."""
    body = b"\x0a" + _varint(len(name)) + name + _DIGEST + digest
    if size:
        body += b"\x18" + _varint(size)
    if executable:
        body += b"\x20\x01"
    return b"\x12" + _varint(len(body)) + body


def symlink_entry(name: bytes, target: bytes) -> bytes:
    """`Directory.symlinks`: one entry, with its tag and length."""
    body = b"\x0a" + _varint(len(name)) + name + b"\x12" + _varint(len(target)) + target
    return b"\x1a" + _varint(len(body)) + body


def encode_directory(directory: Directory) -> bytes:
    """`directory` in canonical protobuf."""
    directories, files, symlinks = [], [], []
    for name, node in directory.entries:
        match node:
            case DirectoryNode(digest, size):
                directories.append(directory_entry(name, digest.raw, size))
            case FileNode(digest, size, executable):
                files.append(file_entry(name, digest.raw, size, executable))
            case SymlinkNode(target):
                symlinks.append(symlink_entry(name, target))
    return b"".join(directories + files + symlinks)


def decode_directory(data: bytes) -> Directory:
    """The directory whose canonical protobuf is `data`; anything else raises DirectoryInvalid.

    Strict without a rule for each way to deviate: what is read is written again and has to give the same bytes.
    """
    try:
        directory = Directory.of(_entries(data))
    except (Invalid, IndexError, ValueError) as error:
        raise DirectoryInvalid(str(error) if isinstance(error, Invalid) else "it is not a Directory message") from error
    if encode_directory(directory) != data:
        raise DirectoryInvalid("it is not in canonical form")
    return directory


def _entries(data: bytes) -> Iterator[tuple[bytes, Node]]:
    for number, body in _fields(data):
        fields = dict(_fields(_bytes(body)))
        name = _bytes(fields.get(1))
        match number:
            case 1:
                yield name, DirectoryNode(Digest(_bytes(fields.get(2))), _int(fields.get(3)))
            case 2:
                executable = bool(_int(fields.get(4)))
                yield name, FileNode(Digest(_bytes(fields.get(2))), _int(fields.get(3)), executable)
            case 3:
                yield name, SymlinkNode(_bytes(fields.get(2)))
            case _:
                raise ValueError(number)


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Field numbers and values. Raises IndexError or ValueError where `data` is no message."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _read_varint(data, at)
        value, at = _read_varint(data, at)
        if tag & 7 == _VARINT:
            yield tag >> 3, value
        elif tag & 7 == _LENGTH_DELIMITED and at + value <= end:
            yield tag >> 3, data[at : at + value]
            at += value
        else:
            raise ValueError(tag)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                raise ValueError(value)
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(shift)


def _bytes(value: bytes | int | None) -> bytes:
    if isinstance(value, int):
        raise ValueError(value)  # noqa: TRY004 - One error for every malformed message.
    return value or b""


def _int(value: bytes | int | None) -> int:
    if isinstance(value, bytes):
        raise ValueError(value)  # noqa: TRY004 - One error for every malformed message.
    return value or 0
