"""A near store in front of a far one."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable

from kiln.aio import Emit, closing, streaming
from kiln.castore.blob_service import BlobService
from kiln.castore.errors import BlobNotFound, DigestMismatch, SchemeDiffers
from kiln.castore.model import Digest, Scheme


class TieredBlobs(BlobService):
    """Has what either has; reads near first, and keeps near what it had to read from far.

    Writes go near only: the far store is somebody else's, or filled on purpose (`kiln.castore.closure.copy_closure`).
    The near store gets a blob while the reader does, chunk by chunk, at the pace of the slower of the two, and
    commits it only when all has come with the right digest; a reader that leaves early leaves nothing there. If the
    near store cannot take it (a full disk), the read fails with its error.
    """

    def __init__(self, near: BlobService, far: BlobService) -> None:
        if near.scheme is not far.scheme:
            raise SchemeDiffers(has=far.scheme, wanted=near.scheme)
        self._near = near
        self._far = far

    @property
    def scheme(self) -> Scheme:
        return self._near.scheme

    async def has(self, digest: Digest) -> bool:
        return await self._near.has(digest) or await self._far.has(digest)

    async def missing(self, digests: Iterable[Digest]) -> frozenset[Digest]:
        missing = await self._near.missing(digests)
        return await self._far.missing(missing) if missing else missing

    async def read(self, digest: Digest) -> AsyncIterator[bytes]:
        began = False
        try:
            async with closing(self._near.read(digest)) as chunks:
                async for chunk in chunks:
                    began = True
                    yield chunk
        except BlobNotFound:
            if began:
                raise
        else:
            return

        async def fill(emit: Emit[bytes]) -> None:
            found = await self._near.write(self._shared(digest, emit))
            if found != digest:
                raise DigestMismatch(wanted=digest, found=found, what="blob")

        async with streaming(fill, capacity=1) as filled:
            async for chunk in filled:
                yield chunk

    async def _shared(self, digest: Digest, emit: Emit[bytes]) -> AsyncIterator[bytes]:
        async with closing(self._far.read(digest)) as chunks:
            async for chunk in chunks:
                await emit(chunk)
                yield chunk

    async def write(self, chunks: AsyncIterable[bytes]) -> Digest:
        return await self._near.write(chunks)
