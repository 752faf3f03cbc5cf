"""Directories in this process's memory, gone with it."""

from collections.abc import AsyncIterator, Iterable

from kiln.castore.closure import batch_of, breadth_first, check_size
from kiln.castore.directory_service import DirectoryService
from kiln.castore.errors import DirectoryNotFound
from kiln.castore.model import Digest, Directory, Scheme


class MemoryDirectories(DirectoryService):
    """A dictionary of directories."""

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme
        self._directories: dict[Digest, Directory] = {}

    @property
    def scheme(self) -> Scheme:
        return self._scheme

    async def missing(self, digests: Iterable[Digest]) -> frozenset[Digest]:
        return frozenset(digest for digest in digests if digest not in self._directories)

    async def get(self, digest: Digest) -> Directory:
        if (directory := self._directories.get(digest)) is None:
            raise DirectoryNotFound(digest)
        return directory

    def closure(self, root: Digest) -> AsyncIterator[tuple[Digest, Directory]]:
        return breadth_first(root, self.get)

    async def put(self, directories: Iterable[Directory]) -> Digest:
        batch = batch_of(directories, self._scheme)
        for digest, stated in batch.relied_on.items():
            stored = self._directories.get(digest)
            check_size(digest, stated=stated, sizes=None if stored is None else self._scheme.sizes_of(stored))
        self._directories.update(batch.directories)
        return batch.root
