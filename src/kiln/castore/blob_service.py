"""The interface of everything that keeps blobs."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import Protocol

from kiln.castore.model import Digest, Scheme


class BlobService(Protocol):
    """Byte strings under their digest. Writing the same blob twice is no error; the empty blob is always there."""

    @property
    def scheme(self) -> Scheme:
        """How this service hashes."""

    async def has(self, digest: Digest) -> bool:
        """Whether `read` would find the blob."""

    async def missing(self, digests: Iterable[Digest]) -> frozenset[Digest]:
        """Those of `digests` that are not there."""

    def read(self, digest: Digest) -> AsyncIterator[bytes]:
        """The blob's bytes in order, in chunks of any size but 0. Raises BlobNotFound before the first chunk."""

    async def write(self, chunks: AsyncIterable[bytes]) -> Digest:
        """Store the concatenation of `chunks`; visible to `read` only once this returns."""
