"""The castore's values: digests, nodes, directories, and the schemes that decide how they hash and count (pure)."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

from blake3 import blake3

from kiln.errors import Invalid

NAME_BYTES_MAX = 255  # NAME_MAX of Linux; Snix refuses longer names.
TARGET_BYTES_MAX = 4095  # PATH_MAX less the final NUL.


class DigestLengthInvalid(Invalid):
    """A digest is not 32 bytes long."""

    def __init__(self, *, length: int) -> None:
        super().__init__(f"invalid digest length: {length}")
        self.length = length


class NameInvalid(Invalid):
    """A name no directory may hold."""

    def __init__(self, name: bytes, why: str) -> None:
        super().__init__(f"invalid name {printable(name)}: {why}")
        self.name = name
        self.why = why


class TargetInvalid(Invalid):
    """A symlink target no file system takes."""

    def __init__(self, target: bytes, why: str) -> None:
        super().__init__(f"invalid symlink target {printable(target)}: {why}")
        self.target = target
        self.why = why


class EntriesInvalid(Invalid):
    """A directory's entries are unsorted or repeated."""

    def __init__(self, name: bytes, why: str) -> None:
        super().__init__(f"entry {printable(name)} {why}")
        self.name = name
        self.why = why


def printable(raw: bytes) -> str:
    """`raw` quoted for a person: never a control character, and of more than 120 the middle left out."""
    text = raw.decode("utf-8", "backslashreplace")
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    # A path says most at its end, where the file's name is; a digest or a command at its beginning.
    return '"' + (shown if len(shown) <= 120 else f"{shown[:39]}…{shown[-80:]}") + '"'


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """The hash of a blob, or of a directory's canonical protobuf, under the store's scheme. As text: lower-case hex."""

    raw: bytes

    LENGTH: ClassVar[int] = 32

    def __post_init__(self) -> None:
        if len(self.raw) != self.LENGTH:
            raise DigestLengthInvalid(length=len(self.raw))

    def __str__(self) -> str:
        return self.raw.hex()


class Hasher(Protocol):
    """What `hashlib` and `blake3` objects share."""

    def update(self, data: bytes | memoryview, /) -> object: ...
    def digest(self) -> bytes: ...


@dataclass(frozen=True)
class Scheme:
    """How a store hashes, and how a directory's size counts.

    `blake3/doubled` is what Snix's server computes and demands: each entry below counts twice. `blake3/documented`
    counts once, as castore.proto's comment says and as tvix did. A directory's size is in its parent's bytes, so all
    digests above the leaves depend on it.
    """

    name: str
    hash_name: str
    new_hasher: Callable[[], Hasher]
    weight: int

    def digest_of(self, data: bytes | memoryview) -> Digest:
        """The digest of `data` in one go."""
        hasher = self.new_hasher()
        hasher.update(data)
        return Digest(hasher.digest())

    @cached_property
    def empty(self) -> Digest:
        """The digest of the empty blob, which every store has from the start."""
        return self.digest_of(b"")

    def size_of(self, directory: "Directory") -> int:
        """What a parent's entry for `directory` states as its size."""
        return self.sizes_of(directory)[-1]

    def sizes_of(self, directory: "Directory") -> range:
        """The sizes that a parent's entry for `directory` may state: from the documented count to this scheme's own.

        The two counts have long been at odds within Snix itself, so others' trees have either.
        """
        below = sum(node.size for _, node in directory.entries if isinstance(node, DirectoryNode))
        count = len(directory.entries)
        return range(below + count, below + self.weight * count + 1)


BLAKE3_DOUBLED = Scheme("blake3/doubled", "blake3", blake3, 2)
BLAKE3_DOCUMENTED = Scheme("blake3/documented", "blake3", blake3, 1)
SHA256_DOCUMENTED = Scheme("sha256/documented", "sha256", hashlib.sha256, 1)
SCHEMES: dict[str, Scheme] = {s.name: s for s in (BLAKE3_DOUBLED, BLAKE3_DOCUMENTED, SHA256_DOCUMENTED)}


@dataclass(frozen=True, slots=True)
class DirectoryNode:
    """A directory by digest; `size` counts what is below it, as the scheme says."""

    digest: Digest
    size: int


@dataclass(frozen=True, slots=True)
class FileNode:
    """A regular file; `size` in bytes."""

    digest: Digest
    size: int
    executable: bool = False


@dataclass(frozen=True, slots=True)
class SymlinkNode:
    """A symbolic link, its target kept verbatim and never followed."""

    target: bytes

    def __post_init__(self) -> None:
        if not self.target:
            raise TargetInvalid(self.target, "is empty")
        if len(self.target) > TARGET_BYTES_MAX:
            raise TargetInvalid(self.target, f"is longer than {TARGET_BYTES_MAX} bytes")
        if b"\0" in self.target:
            raise TargetInvalid(self.target, "contains a NUL byte")


Node = DirectoryNode | FileNode | SymlinkNode


def check_name(name: bytes) -> None:
    """Raise `NameInvalid` unless a directory may hold `name`."""
    if not name:
        raise NameInvalid(name, "is empty")
    if len(name) > NAME_BYTES_MAX:
        raise NameInvalid(name, f"is longer than {NAME_BYTES_MAX} bytes")
    if name in {b".", b".."}:
        raise NameInvalid(name, "is reserved")
    if b"/" in name or b"\0" in name:
        raise NameInvalid(name, "contains a slash or a NUL byte")


@dataclass(frozen=True, slots=True)
class Directory:
    """Names and nodes, strictly ascending by the names' bytes."""

    entries: tuple[tuple[bytes, Node], ...] = ()

    def __post_init__(self) -> None:
        last: bytes | None = None
        for name, _ in self.entries:
            check_name(name)
            if last is not None and name <= last:
                raise EntriesInvalid(name, "is a duplicate name" if name == last else "is not sorted")
            last = name

    @classmethod
    def of(cls, entries: Iterable[tuple[bytes, Node]]) -> "Directory":
        """A directory of `entries` in any order."""
        return cls(tuple(sorted(entries, key=lambda entry: entry[0])))

    def __iter__(self) -> Iterator[tuple[bytes, Node]]:
        return iter(self.entries)

    def get(self, name: bytes) -> Node | None:
        """The node called `name`, or None."""
        return next((node for found, node in self.entries if found == name), None)
