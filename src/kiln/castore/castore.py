"""A store for content: blobs and directories of one scheme."""

from dataclasses import dataclass

from kiln.aio import closing
from kiln.castore.blob_service import BlobService
from kiln.castore.directory_service import DirectoryService
from kiln.castore.errors import BlobTooLarge, SchemeDiffers
from kiln.castore.model import Digest, Scheme


@dataclass(frozen=True, slots=True)
class Castore:
    """The two services of one store."""

    blobs: BlobService
    directories: DirectoryService

    def __post_init__(self) -> None:
        if self.blobs.scheme is not self.directories.scheme:
            raise SchemeDiffers(has=self.directories.scheme, wanted=self.blobs.scheme)

    @property
    def scheme(self) -> Scheme:
        """How both hash and count."""
        return self.blobs.scheme


async def read_whole(blobs: BlobService, digest: Digest, *, bytes_max: int) -> bytes:
    """A small blob in one piece. Raises BlobNotFound, or BlobTooLarge without reading much more than `bytes_max`."""
    data = bytearray()
    async with closing(blobs.read(digest)) as chunks:
        async for chunk in chunks:
            data += chunk
            if len(data) > bytes_max:
                raise BlobTooLarge(bytes_max=bytes_max)
    return bytes(data)
