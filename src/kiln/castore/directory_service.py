"""The interface of everything that keeps directories."""

from collections.abc import AsyncIterator, Iterable
from typing import Protocol

from kiln.castore.model import Digest, Directory, Scheme


class DirectoryService(Protocol):
    """Directories under the digest of their canonical protobuf. Putting one twice is no error."""

    @property
    def scheme(self) -> Scheme:
        """How this service hashes and counts."""

    async def missing(self, digests: Iterable[Digest]) -> frozenset[Digest]:
        """Those of `digests` that are not there."""

    async def get(self, digest: Digest) -> Directory:
        """One directory. Raises DirectoryNotFound."""

    def closure(self, root: Digest) -> AsyncIterator[tuple[Digest, Directory]]:
        """`root` and all directories below it, breadth first, each digest once, parents before children.

        Raises DirectoryNotFound where one is missing, the root before anything is yielded.
        """

    async def put(self, directories: Iterable[Directory]) -> Digest:
        """Store a tree, children before parents, the root last; returns the root's digest.

        What a directory refers to has to come before it or be stored already, with the size the scheme computes;
        otherwise DirectoryInvalid is raised and nothing of this call is visible.
        """
