"""Blobs in this process's memory, gone with it."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable

from kiln.castore.blob_service import BlobService
from kiln.castore.errors import BlobNotFound
from kiln.castore.model import Digest, Scheme

_CHUNK_BYTES = 1024 * 1024


class MemoryBlobs(BlobService):
    """A dictionary of blobs."""

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme
        self._blobs = {scheme.empty: b""}

    @property
    def scheme(self) -> Scheme:
        return self._scheme

    async def has(self, digest: Digest) -> bool:
        return digest in self._blobs

    async def missing(self, digests: Iterable[Digest]) -> frozenset[Digest]:
        return frozenset(digest for digest in digests if digest not in self._blobs)

    async def read(self, digest: Digest) -> AsyncIterator[bytes]:
        if (blob := self._blobs.get(digest)) is None:
            raise BlobNotFound(digest)
        for start in range(0, len(blob), _CHUNK_BYTES):
            yield blob[start : start + _CHUNK_BYTES]

    async def write(self, chunks: AsyncIterable[bytes]) -> Digest:
        blob = b"".join([chunk async for chunk in chunks])
        digest = self._scheme.digest_of(blob)
        self._blobs.setdefault(digest, blob)
        return digest
