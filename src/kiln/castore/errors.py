"""What can go wrong with content: one class per cause, its kind from `kiln.errors`."""

from kiln.castore.model import Digest
from kiln.errors import Corrupt, Exhausted, Invalid, NotFound


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
        listed = [f"blob {digest}" for digest in sorted(blobs)] + [f"directory {digest}" for digest in sorted(directories)]
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
