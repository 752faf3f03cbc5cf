"""Blobs of a server that speaks castore.v1."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable

from kiln.aio import closing, each
from kiln.castore.blob_service import BlobService
from kiln.castore.errors import BlobNotFound
from kiln.castore.model import Digest, Scheme
from kiln.castore.protocol import SENT_CHUNK_BYTES, package_of, pieces
from kiln.errors import NotFound
from kiln.protos.snix.castore.protos.rpc_blobstore_pb2 import (
    BlobChunk,
    PutBlobResponse,
    ReadBlobRequest,
    StatBlobRequest,
    StatBlobResponse,
)
from kiln.rpc.calls import ask, receive, send
from kiln.rpc.channel import Peer

_ASKED_AT_ONCE = 16  # castore.v1 asks for one blob a call; more calls at once gain nothing (measurements: 8,700/s).


class GrpcBlobs(BlobService):
    """Says what the server says: `VerifiedBlobs` has to stand around it.

    The empty blob is there without asking, for not every server has it.
    """

    def __init__(self, peer: Peer, scheme: Scheme) -> None:
        self._peer = peer
        self._scheme = scheme
        service = f"/{package_of(scheme)}.BlobService"
        self._stat = peer.channel.unary_unary(
            f"{service}/Stat",
            request_serializer=StatBlobRequest.SerializeToString,
            response_deserializer=StatBlobResponse.FromString,
        )
        self._read = peer.channel.unary_stream(
            f"{service}/Read",
            request_serializer=ReadBlobRequest.SerializeToString,
            response_deserializer=BlobChunk.FromString,
        )
        self._put = peer.channel.stream_unary(
            f"{service}/Put",
            request_serializer=BlobChunk.SerializeToString,
            response_deserializer=PutBlobResponse.FromString,
        )

    @property
    def scheme(self) -> Scheme:
        return self._scheme

    async def has(self, digest: Digest) -> bool:
        if digest == self._scheme.empty:
            return True
        try:
            await ask(self._peer, self._stat, StatBlobRequest(digest=digest.raw))
        except NotFound:
            return False
        return True

    async def missing(self, digests: Iterable[Digest]) -> frozenset[Digest]:
        asked = list(dict.fromkeys(digests))
        there = await each(self.has, asked, at_once=_ASKED_AT_ONCE)
        return frozenset(digest for digest, has in zip(asked, there, strict=True) if not has)

    async def read(self, digest: Digest) -> AsyncIterator[bytes]:
        if digest == self._scheme.empty:
            return
        try:
            async with closing(receive(self._peer, self._read, ReadBlobRequest(digest=digest.raw))) as messages:
                async for message in messages:
                    if message.data:
                        yield message.data
        except NotFound as error:
            raise BlobNotFound(digest) from error

    async def write(self, chunks: AsyncIterable[bytes]) -> Digest:
        async def messages() -> AsyncIterator[BlobChunk]:
            async for chunk in chunks:
                for piece in pieces(chunk, SENT_CHUNK_BYTES):
                    yield BlobChunk(data=piece)

        return Digest((await send(self._peer, self._put, messages())).digest)
