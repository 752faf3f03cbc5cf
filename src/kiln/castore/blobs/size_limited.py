"""A limit on the size of what is written."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable

from kiln.castore.blob_service import BlobService
from kiln.castore.errors import BlobTooLarge
from kiln.castore.model import Digest, Scheme


class SizeLimitedBlobs(BlobService):
    """Refuses a write beyond `bytes_max` without reading the rest of it; leaves reads alone."""

    def __init__(self, inner: BlobService, *, bytes_max: int) -> None:
        self._inner = inner
        self._bytes_max = bytes_max

    @property
    def scheme(self) -> Scheme:
        return self._inner.scheme

    async def has(self, digest: Digest) -> bool:
        return await self._inner.has(digest)

    async def missing(self, digests: Iterable[Digest]) -> frozenset[Digest]:
        return await self._inner.missing(digests)

    def read(self, digest: Digest) -> AsyncIterator[bytes]:
        return self._inner.read(digest)

    async def write(self, chunks: AsyncIterable[bytes]) -> Digest:
        return await self._inner.write(self._counted(chunks))

    async def _counted(self, chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
        bytes_seen = 0
        async for chunk in chunks:
            bytes_seen += len(chunk)
            if bytes_seen > self._bytes_max:
                raise BlobTooLarge(bytes_max=self._bytes_max)
            yield chunk
