"""Counts what goes through a directory service."""

import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from kiln.aio import closing
from kiln.castore.directory_service import DirectoryService
from kiln.castore.model import Digest, Directory, Scheme


class MeasuredDirectories(DirectoryService):
    """Keeps running totals in plain attributes: directories asked for, read and written, and seconds spent inside."""

    def __init__(self, inner: DirectoryService, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._inner = inner
        self._clock = clock
        self.lookups = 0
        self.lookup_s = 0.0
        self.reads = 0
        self.read_s = 0.0
        self.writes = 0
        self.write_s = 0.0

    @property
    def scheme(self) -> Scheme:
        return self._inner.scheme

    async def missing(self, digests: Iterable[Digest]) -> frozenset[Digest]:
        asked = tuple(digests)
        self.lookups += len(asked)
        began = self._clock()
        try:
            return await self._inner.missing(asked)
        finally:
            self.lookup_s += self._clock() - began

    async def get(self, digest: Digest) -> Directory:
        began = self._clock()
        try:
            directory = await self._inner.get(digest)
            self.reads += 1
            return directory
        finally:
            self.read_s += self._clock() - began

    async def closure(self, root: Digest) -> AsyncIterator[tuple[Digest, Directory]]:
        began = self._clock()
        try:
            async with closing(self._inner.closure(root)) as directories:
                async for digest, directory in directories:
                    self.reads += 1
                    handed = self._clock()
                    try:
                        yield digest, directory
                    finally:  # The taker's time is not the inner service's.
                        self.read_s -= self._clock() - handed
        finally:
            self.read_s += self._clock() - began

    async def put(self, directories: Iterable[Directory]) -> Digest:
        began = self._clock()
        try:
            return await self._inner.put(self._counted(directories))
        finally:
            self.write_s += self._clock() - began

    def _counted(self, directories: Iterable[Directory]) -> Iterator[Directory]:
        for directory in directories:
            self.writes += 1
            yield directory
