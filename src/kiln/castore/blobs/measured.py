"""Counts what goes through a blob service."""

import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable

from kiln.aio import closing
from kiln.castore.blob_service import BlobService
from kiln.castore.model import Digest, Scheme


class MeasuredBlobs(BlobService):
    """Keeps running totals in plain attributes.

    Seconds are those spent inside the inner service: not in whoever takes what is read, nor in the source of what is
    written. A read or write that ends early or raises is counted with what it moved.
    """

    def __init__(self, inner: BlobService, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._inner = inner
        self._clock = clock
        self.lookups = 0
        self.lookup_s = 0.0
        self.reads = 0
        self.read_bytes = 0
        self.read_s = 0.0
        self.writes = 0
        self.write_bytes = 0
        self.write_s = 0.0

    @property
    def scheme(self) -> Scheme:
        return self._inner.scheme

    async def has(self, digest: Digest) -> bool:
        return not await self.missing((digest,))

    async def missing(self, digests: Iterable[Digest]) -> frozenset[Digest]:
        asked = tuple(digests)
        self.lookups += len(asked)
        began = self._clock()
        try:
            return await self._inner.missing(asked)
        finally:
            self.lookup_s += self._clock() - began

    async def read(self, digest: Digest) -> AsyncIterator[bytes]:
        self.reads += 1
        began = self._clock()
        try:
            async with closing(self._inner.read(digest)) as chunks:
                async for chunk in chunks:
                    self.read_bytes += len(chunk)
                    handed = self._clock()
                    try:
                        yield chunk
                    finally:  # The taker's time is not the inner service's.
                        self.read_s -= self._clock() - handed
        finally:
            self.read_s += self._clock() - began

    async def write(self, chunks: AsyncIterable[bytes]) -> Digest:
        self.writes += 1
        began = self._clock()

        async def counted() -> AsyncIterator[bytes]:
            asked = self._clock()
            async for chunk in chunks:
                self.write_s -= self._clock() - asked  # The source's time is not the inner service's.
                self.write_bytes += len(chunk)
                yield chunk
                asked = self._clock()
            self.write_s -= self._clock() - asked

        try:
            return await self._inner.write(counted())
        finally:
            self.write_s += self._clock() - began
