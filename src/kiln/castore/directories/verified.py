"""Directories that are checked against their digests as they are read."""

from collections.abc import AsyncIterator, Iterable

from kiln.aio import closing
from kiln.castore.closure import Arrivals, batch_of
from kiln.castore.directory_service import DirectoryService
from kiln.castore.errors import DigestMismatch
from kiln.castore.model import Digest, Directory, Scheme
from kiln.castore.wire import encode_directory


class VerifiedDirectories(DirectoryService):
    """Hands on no directory whose digest, order, or place and size in its closure is wrong."""

    def __init__(self, inner: DirectoryService) -> None:
        self._inner = inner

    @property
    def scheme(self) -> Scheme:
        return self._inner.scheme

    async def missing(self, digests: Iterable[Digest]) -> frozenset[Digest]:
        return await self._inner.missing(digests)

    async def get(self, digest: Digest) -> Directory:
        directory = await self._inner.get(digest)
        found = self._digest_of(directory)
        if found != digest:
            raise DigestMismatch(wanted=digest, found=found, what="directory")
        return directory

    async def closure(self, root: Digest) -> AsyncIterator[tuple[Digest, Directory]]:
        arrivals = Arrivals(self.scheme, root)
        async with closing(self._inner.closure(root)) as directories:
            async for _, directory in directories:
                digest = self._digest_of(directory)
                arrivals.take(digest, directory)
                yield digest, directory
        arrivals.check_complete()

    async def put(self, directories: Iterable[Directory]) -> Digest:
        batch = batch_of(directories, self.scheme)
        found = await self._inner.put(batch.given)
        if found != batch.root:
            raise DigestMismatch(wanted=batch.root, found=found, what="directory")
        return found

    def _digest_of(self, directory: Directory) -> Digest:
        return self.scheme.digest_of(encode_directory(directory))
