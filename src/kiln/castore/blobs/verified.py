"""Blobs whose bytes are checked against their digest as they are read."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable

from kiln.aio import closing
from kiln.castore.blob_service import BlobService
from kiln.castore.errors import DigestMismatch
from kiln.castore.model import Digest, Scheme

# What is held back of a blob. Most blobs are smaller than this and are checked before a byte of them is handed on.
_HELD_BYTES = 1024 * 1024


class VerifiedBlobs(BlobService):
    """Never hands on a whole blob whose digest does not match, nor a byte of one of up to 1 MiB.

    The end of a larger one is held back until it is checked, and DigestMismatch raised in its place; so whoever reads
    must not commit anything before the end of the stream. A write whose answer has another digest than the bytes sent
    raises DigestMismatch too.
    """

    def __init__(self, inner: BlobService) -> None:
        self._inner = inner

    @property
    def scheme(self) -> Scheme:
        return self._inner.scheme

    async def has(self, digest: Digest) -> bool:
        return await self._inner.has(digest)

    async def missing(self, digests: Iterable[Digest]) -> frozenset[Digest]:
        return await self._inner.missing(digests)

    async def read(self, digest: Digest) -> AsyncIterator[bytes]:
        hasher = self.scheme.new_hasher()
        held: list[bytes] = []
        held_bytes = 0
        async with closing(self._inner.read(digest)) as chunks:
            async for chunk in chunks:
                while held and held_bytes + len(chunk) > _HELD_BYTES:
                    held_bytes -= len(held[0])
                    yield held.pop(0)
                hasher.update(chunk)
                held.append(chunk)
                held_bytes += len(chunk)
        found = Digest(hasher.digest())
        if found != digest:
            raise DigestMismatch(wanted=digest, found=found, what="blob")
        for chunk in held:
            yield chunk

    async def write(self, chunks: AsyncIterable[bytes]) -> Digest:
        hasher = self.scheme.new_hasher()

        async def hashed() -> AsyncIterator[bytes]:
            async for chunk in chunks:
                hasher.update(chunk)
                yield chunk

        found = await self._inner.write(hashed())
        wanted = Digest(hasher.digest())
        if found != wanted:
            raise DigestMismatch(wanted=wanted, found=found, what="written blob")
        return found
