"""A limit on the size of each directory that is written."""

from collections.abc import AsyncIterator, Iterable

from kiln.castore.directory_service import DirectoryService
from kiln.castore.errors import DirectoryTooLarge
from kiln.castore.model import Digest, Directory, Scheme
from kiln.castore.wire import encode_directory


class SizeLimitedDirectories(DirectoryService):
    """Refuses a put with a directory whose message has more than `bytes_max` bytes; leaves reads alone."""

    def __init__(self, inner: DirectoryService, *, bytes_max: int) -> None:
        self._inner = inner
        self._bytes_max = bytes_max

    @property
    def scheme(self) -> Scheme:
        return self._inner.scheme

    async def missing(self, digests: Iterable[Digest]) -> frozenset[Digest]:
        return await self._inner.missing(digests)

    async def get(self, digest: Digest) -> Directory:
        return await self._inner.get(digest)

    def closure(self, root: Digest) -> AsyncIterator[tuple[Digest, Directory]]:
        return self._inner.closure(root)

    async def put(self, directories: Iterable[Directory]) -> Digest:
        return await self._inner.put(self._checked(directory) for directory in directories)

    def _checked(self, directory: Directory) -> Directory:
        encoded = encode_directory(directory)
        if len(encoded) > self._bytes_max:
            raise DirectoryTooLarge(
                self.scheme.digest_of(encoded),
                size=len(encoded),
                entries=len(directory.entries),
                bytes_max=self._bytes_max,
            )
        return directory
