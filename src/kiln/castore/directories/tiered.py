"""A near store in front of a far one."""

from collections.abc import AsyncIterator, Iterable

from kiln.aio import closing
from kiln.castore.closure import batch_of, children_first
from kiln.castore.directory_service import DirectoryService
from kiln.castore.errors import DirectoryInvalid, DirectoryNotFound, SchemeDiffers
from kiln.castore.model import Digest, Directory, Scheme


class TieredDirectories(DirectoryService):
    """Has what either has; reads near first, and keeps near what it had to read from far.

    A store takes a directory only with all that is below it, so one that is read from far brings its whole closure
    near. Writes go near only, as `kiln.castore.blobs.tiered` has it; what they refer to and only far has is brought
    near with them.
    """

    def __init__(self, near: DirectoryService, far: DirectoryService) -> None:
        if near.scheme is not far.scheme:
            raise SchemeDiffers(has=far.scheme, wanted=near.scheme)
        self._near = near
        self._far = far

    @property
    def scheme(self) -> Scheme:
        return self._near.scheme

    async def missing(self, digests: Iterable[Digest]) -> frozenset[Digest]:
        missing = await self._near.missing(digests)
        return await self._far.missing(missing) if missing else missing

    async def get(self, digest: Digest) -> Directory:
        try:
            return await self._near.get(digest)
        except DirectoryNotFound:
            return (await self._bring_near(digest))[digest]

    async def closure(self, root: Digest) -> AsyncIterator[tuple[Digest, Directory]]:
        if await self._near.missing([root]):
            # Only once it is complete can the near store take it, so it is brought whole before it is handed on.
            for digest, directory in (await self._bring_near(root)).items():
                yield digest, directory
            return
        async with closing(self._near.closure(root)) as directories:
            async for digest, directory in directories:
                yield digest, directory

    async def put(self, directories: Iterable[Directory]) -> Digest:
        batch = batch_of(directories, self.scheme)
        for digest in await self._near.missing(batch.relied_on):
            try:
                await self._bring_near(digest)
            except DirectoryNotFound as error:
                raise DirectoryInvalid(f"it refers to {digest}: {error}") from error
        return await self._near.put(batch.given)

    async def _bring_near(self, root: Digest) -> dict[Digest, Directory]:
        async with closing(self._far.closure(root)) as directories:
            found = {digest: directory async for digest, directory in directories}
        await self._near.put(children_first(found, [root]).values())
        return found
