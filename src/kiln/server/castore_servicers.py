"""castore.v1 over any castore: decode, call, encode; errors become statuses in `kiln.rpc.status.KilnErrors`."""

from collections.abc import AsyncIterator

import grpc
import grpc.aio

from kiln.aio import closing
from kiln.castore.blob_service import BlobService
from kiln.castore.castore import Castore
from kiln.castore.directory_service import DirectoryService
from kiln.castore.errors import BlobNotFound, DirectoryNotFound
from kiln.castore.model import Digest
from kiln.castore.protocol import PACKAGES, pieces
from kiln.castore.wire import decode_directory, encode_directory
from kiln.errors import Exhausted, Invalid
from kiln.protos.snix.castore.protos.rpc_blobstore_pb2 import (
    BlobChunk,
    PutBlobResponse,
    ReadBlobRequest,
    StatBlobRequest,
    StatBlobResponse,
)
from kiln.protos.snix.castore.protos.rpc_directory_pb2 import GetDirectoryRequest, PutDirectoryResponse
from kiln.rpc.requests import whole

# Peers take up to 4 MiB. Over a unix socket, in MiB a second: 4 KiB 30, 64 KiB 320-470, 128 KiB and 1 MiB 380-650,
# 2 MiB 360-400.
_ANSWERED_CHUNK_BYTES = 1024 * 1024

# A tree is stored at once, so its messages are kept until the last has come: a million entries take about 100 MB.
_PUT_BYTES_MAX = 256 * 1024 * 1024


class LookupUnknown(Invalid):
    """A Get that does not say by what."""

    def __init__(self) -> None:
        super().__init__("invalid by_what: a digest is needed")


class TreeTooLarge(Exhausted):
    """More directories in one Put than the server keeps."""

    def __init__(self, *, bytes_max: int) -> None:
        super().__init__(f"the directories of one Put take more than {bytes_max} bytes: send subtrees first")
        self.bytes_max = bytes_max


def castore_handlers(castore: Castore) -> tuple[grpc.GenericRpcHandler, ...]:
    """The services of the package that speaks the castore's scheme; none where no package does.

    Directories come and go as their bytes, see `kiln.castore.protocol`.
    """
    if (package := PACKAGES.get(castore.scheme.name)) is None:
        return ()
    blobs, directories = BlobServicer(castore.blobs), DirectoryServicer(castore.directories)
    return (
        grpc.method_handlers_generic_handler(
            f"{package}.BlobService",
            {
                "Stat": grpc.unary_unary_rpc_method_handler(
                    blobs.stat, StatBlobRequest.FromString, StatBlobResponse.SerializeToString
                ),
                "Read": grpc.unary_stream_rpc_method_handler(
                    blobs.read, ReadBlobRequest.FromString, BlobChunk.SerializeToString
                ),
                "Put": grpc.stream_unary_rpc_method_handler(
                    blobs.put, BlobChunk.FromString, PutBlobResponse.SerializeToString
                ),
            },
        ),
        grpc.method_handlers_generic_handler(
            f"{package}.DirectoryService",
            {
                "Get": grpc.unary_stream_rpc_method_handler(directories.get, GetDirectoryRequest.FromString, bytes),
                "Put": grpc.stream_unary_rpc_method_handler(
                    directories.put, bytes, PutDirectoryResponse.SerializeToString
                ),
            },
        ),
    )


class BlobServicer:
    """BlobService. No chunk lists and no bao: a client then reads the blob in one stream."""

    def __init__(self, blobs: BlobService) -> None:
        self._blobs = blobs

    async def stat(
        self, request: StatBlobRequest, _context: grpc.aio.ServicerContext[StatBlobRequest, StatBlobResponse]
    ) -> StatBlobResponse:
        """Whether the blob is there: an answer, or NOT_FOUND."""
        digest = Digest(request.digest)
        if not await self._blobs.has(digest):
            raise BlobNotFound(digest)
        return StatBlobResponse()

    async def read(
        self, request: ReadBlobRequest, _context: grpc.aio.ServicerContext[ReadBlobRequest, BlobChunk]
    ) -> AsyncIterator[BlobChunk]:
        """The blob in messages of at most 1 MiB; none for the empty one."""
        async with closing(self._blobs.read(Digest(request.digest))) as chunks:
            async for chunk in chunks:
                for piece in pieces(chunk, _ANSWERED_CHUNK_BYTES):
                    yield BlobChunk(data=piece)

    async def put(
        self, requests: AsyncIterator[BlobChunk], context: grpc.aio.ServicerContext[BlobChunk, PutBlobResponse]
    ) -> PutBlobResponse:
        """The blob that the messages make up, however they are cut."""
        digest = await self._blobs.write(request.data async for request in whole(requests, context))
        return PutBlobResponse(digest=digest.raw)


class DirectoryServicer:
    """DirectoryService."""

    def __init__(self, directories: DirectoryService) -> None:
        self._directories = directories

    async def get(
        self, request: GetDirectoryRequest, context: grpc.aio.ServicerContext[GetDirectoryRequest, bytes]
    ) -> AsyncIterator[bytes]:
        """One directory, or its closure from the root on.

        Where one directory is missing: NOT_FOUND, after headers, without which Snix takes it for a broken call. Where
        a closure's root is: no message, and OK, as Snix has it.
        """
        if request.WhichOneof("by_what") is None:
            raise LookupUnknown
        digest = Digest(request.digest)
        if not request.recursive:
            try:
                directory = await self._directories.get(digest)
            except DirectoryNotFound:
                await context.send_initial_metadata(())
                raise
            yield encode_directory(directory)
            return
        begun = False
        try:
            async with closing(self._directories.closure(digest)) as directories:
                async for _, directory in directories:
                    begun = True
                    yield encode_directory(directory)
        except DirectoryNotFound as error:
            if begun:  # Not NOT_FOUND: a client that asked for the root may take that for the root's absence.
                await context.abort(grpc.StatusCode.INTERNAL, str(error))

    async def put(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, PutDirectoryResponse]
    ) -> PutDirectoryResponse:
        """A tree, children before parents; what was stored before need not come again."""
        messages: list[bytes] = []
        bytes_seen = 0
        async for message in whole(requests, context):
            bytes_seen += len(message)
            if bytes_seen > _PUT_BYTES_MAX:
                raise TreeTooLarge(bytes_max=_PUT_BYTES_MAX)
            messages.append(message)
        digest = await self._directories.put(decode_directory(message) for message in messages)
        return PutDirectoryResponse(root_digest=digest.raw)
