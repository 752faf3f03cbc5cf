"""What can go wrong with content: one class per cause, its kind from `kiln.errors`."""

import os

from kiln.castore.model import Digest, Scheme, printable
from kiln.errors import Corrupt, Denied, Exhausted, Invalid, NotFound, Precondition, Unavailable


class BlobNotFound(NotFound):
    """No blob of that digest is stored."""

    def __init__(self, digest: Digest) -> None:
        super().__init__(f"no blob {digest}")
        self.digest = digest


class DirectoryNotFound(NotFound):
    """No directory of that digest is stored."""

    def __init__(self, digest: Digest) -> None:
        super().__init__(f"no directory {digest}")
        self.digest = digest


class ContentMissing(NotFound):
    """A closure is incomplete: all that is missing from it, in one error."""

    def __init__(self, *, blobs: frozenset[Digest], directories: frozenset[Digest]) -> None:
        listed = [f"blob {digest}" for digest in sorted(blobs)] + [
            f"directory {digest}" for digest in sorted(directories)
        ]
        more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
        super().__init__("not in the store: " + ", ".join(listed[:8]) + more)
        self.blobs = blobs
        self.directories = directories


class DigestMismatch(Corrupt):
    """Bytes do not have the digest under which they were asked for."""

    def __init__(self, *, wanted: Digest, found: Digest, what: str) -> None:
        super().__init__(f"{what} {wanted} has the contents of {found}")
        self.wanted = wanted
        self.found = found


class BlobTooLarge(Exhausted):
    """A write went beyond the store's size limit."""

    def __init__(self, *, bytes_max: int) -> None:
        super().__init__(f"the blob is larger than the limit of {bytes_max} bytes")
        self.bytes_max = bytes_max


class DirectoryInvalid(Invalid):
    """A Directory message breaks a rule of the castore model."""

    def __init__(self, rule: str) -> None:
        super().__init__(f"invalid directory: {rule}")
        self.rule = rule


class IngestRefused(Invalid):
    """A tree holds something that no castore node can express, or that may not leave a build."""

    def __init__(self, path: bytes, why: str) -> None:
        super().__init__(f"cannot import {printable(path)}: it is {why}")
        self.path = path
        self.why = why


class IngestChanged(Precondition):
    """A file or directory changed while it was being imported."""

    def __init__(self, path: bytes) -> None:
        super().__init__(f"{printable(path)} changed while it was being imported")
        self.path = path


class IngestDenied(Denied):
    """The operating system does not let us read a path."""

    def __init__(self, path: bytes, why: str) -> None:
        super().__init__(f"cannot read {printable(path)}: {why}")
        self.path = path
        self.why = why


class IngestNotFound(NotFound):
    """The path to import is not there."""

    def __init__(self, path: bytes) -> None:
        super().__init__(f"there is no {printable(path)} to import")
        self.path = path


class ExportFailed(Denied):
    """A destination cannot be written."""

    def __init__(self, path: bytes, why: str) -> None:
        super().__init__(f"cannot write {printable(path)}: {why}")
        self.path = path
        self.why = why


class ExportFull(Exhausted):
    """A destination's file system has no room left."""

    def __init__(self, path: bytes, why: str) -> None:
        super().__init__(f"no room for {printable(path)}: {why}")
        self.path = path
        self.why = why


class StoreNotFound(NotFound):
    """There is no store, and none can be made, at a path."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"no store at {printable(os.fsencode(path))}: {why}")
        self.path = path
        self.why = why


class StoreSchemeDiffers(Precondition):
    """A store was made with another castore scheme than the one asked for."""

    def __init__(self, path: str, *, recorded: str, wanted: str) -> None:
        super().__init__(f"the store at {printable(os.fsencode(path))} has the scheme {recorded}, not {wanted}")
        self.path = path
        self.recorded = recorded
        self.wanted = wanted


class StoreCorrupt(Corrupt):
    """A file of the store's own is damaged; `remedy` is the way out."""

    def __init__(self, path: str, why: str, remedy: str) -> None:
        super().__init__(f"{printable(os.fsencode(path))} is damaged ({why}); {remedy}")
        self.path = path
        self.why = why
        self.remedy = remedy


class StoreReadOnly(Denied):
    """The store cannot be written: its file system or its permissions forbid it."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"the store at {printable(os.fsencode(path))} cannot be written: {why}")
        self.path = path
        self.why = why


class StoreFull(Exhausted):
    """The store's file system has no room left."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"no room for the store at {printable(os.fsencode(path))}: {why}")
        self.path = path
        self.why = why


class StoreBusy(Unavailable):
    """Another process keeps the store's database locked."""

    def __init__(self, path: str) -> None:
        super().__init__(f"the store at {printable(os.fsencode(path))} is kept busy by another process")
        self.path = path


class SchemeDiffers(Precondition):
    """Two stores that must hash and count alike do not."""

    def __init__(self, *, has: Scheme, wanted: Scheme) -> None:
        super().__init__(f"a store of scheme {has.name} cannot stand where {wanted.name} is wanted")
        self.has = has
        self.wanted = wanted


class EntriesTooMany(Exhausted):
    """A tree has more entries than are written out: directories may share what is below them, files on disk do not."""

    def __init__(self, digest: Digest, *, entries: int, entries_max: int) -> None:
        super().__init__(f"the tree of directory {digest} has {entries} entries; the limit is {entries_max}")
        self.digest = digest
        self.entries = entries
        self.entries_max = entries_max


class DirectoryTooLarge(Exhausted):
    """A directory's message is larger than who should take it accepts."""

    def __init__(self, digest: Digest, *, size: int, entries: int, bytes_max: int) -> None:
        super().__init__(
            f"directory {digest} ({entries} entries) takes {size} bytes in one message; the limit is {bytes_max}"
        )
        self.digest = digest
        self.size = size
        self.bytes_max = bytes_max


class SchemeWithoutWire(Precondition):
    """No castore protocol speaks a scheme."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(f"a store of scheme {scheme.name} cannot be reached by gRPC: no protocol speaks it")
        self.scheme = scheme
