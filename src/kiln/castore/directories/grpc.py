"""Directories of a server that speaks castore.v1."""

import re
from collections.abc import AsyncIterator, Iterable

from kiln.aio import closing, each
from kiln.castore.closure import Arrivals, Batch, batch_of, check_size, children_first
from kiln.castore.directory_service import DirectoryService
from kiln.castore.errors import DigestMismatch, DirectoryInvalid, DirectoryNotFound, DirectoryTooLarge
from kiln.castore.model import Digest, Directory, Scheme
from kiln.castore.protocol import package_of
from kiln.castore.wire import decode_directory, encode_directory
from kiln.errors import Exhausted, Invalid, NotFound, OutOfRange
from kiln.protos.snix.castore.protos.rpc_directory_pb2 import GetDirectoryRequest, PutDirectoryResponse
from kiln.rpc.calls import receive, send
from kiln.rpc.channel import Peer
from kiln.rpc.status import PeerFailed

_ASKED_AT_ONCE = 16

_USUAL_LIMIT = 4 * 1024 * 1024  # Of tonic and of gRPC's core, where nothing else is set.
_LIMIT_IN_TEXT = re.compile(r"(?:limit is: |vs\. )(\d+)")  # As tonic and gRPC's core put it.


class GrpcDirectories(DirectoryService):
    """Takes nothing on trust: each directory is what its digest says, and a closure whole and in order."""

    def __init__(self, peer: Peer, scheme: Scheme) -> None:
        self._peer = peer
        self._scheme = scheme
        service = f"/{package_of(scheme)}.DirectoryService"
        self._get = peer.channel.unary_stream(
            f"{service}/Get", request_serializer=GetDirectoryRequest.SerializeToString, response_deserializer=bytes
        )
        self._put = peer.channel.stream_unary(
            f"{service}/Put", request_serializer=bytes, response_deserializer=PutDirectoryResponse.FromString
        )

    @property
    def scheme(self) -> Scheme:
        return self._scheme

    async def missing(self, digests: Iterable[Digest]) -> frozenset[Digest]:
        asked = list(dict.fromkeys(digests))
        there = await each(self._has, asked, at_once=_ASKED_AT_ONCE)
        return frozenset(digest for digest, has in zip(asked, there, strict=True) if not has)

    async def _has(self, digest: Digest) -> bool:
        """castore.v1 has no other way to ask than to get."""
        try:
            await self.get(digest)
        except DirectoryNotFound:
            return False
        return True

    async def get(self, digest: Digest) -> Directory:
        try:
            async with closing(receive(self._peer, self._get, GetDirectoryRequest(digest=digest.raw))) as messages:
                async for message in messages:
                    found = self._scheme.digest_of(message)
                    if found != digest:
                        raise DigestMismatch(wanted=digest, found=found, what="directory")
                    return decode_directory(message)
        except NotFound as error:
            raise DirectoryNotFound(digest) from error
        raise DirectoryNotFound(digest)

    async def closure(self, root: Digest) -> AsyncIterator[tuple[Digest, Directory]]:
        arrivals = Arrivals(self._scheme, root)
        request = GetDirectoryRequest(digest=root.raw, recursive=True)
        try:
            async with closing(receive(self._peer, self._get, request)) as messages:
                async for message in messages:
                    digest = self._scheme.digest_of(message)
                    # The digest first: what nobody asked for is not even parsed.
                    arrivals.expect(digest)
                    directory = decode_directory(message)
                    arrivals.take(digest, directory)
                    yield digest, directory
        except (NotFound, PeerFailed):
            # A missing child: Snix breaks the stream with INTERNAL, without saying which.
            for digest in sorted(await self.missing(arrivals.outstanding)):
                raise DirectoryNotFound(digest) from None
            raise
        arrivals.check_complete()

    async def put(self, directories: Iterable[Directory]) -> Digest:
        batch = batch_of(directories, self._scheme)
        try:
            return await self._send(batch)
        except (Invalid, PeerFailed) as error:
            # A kiln takes references to what it has; Snix demands that all of a tree comes in one stream, and answers
            # INTERNAL. So the rest is sent with it, which the server itself has to have.
            if batch.relied_on:
                return await self._send(await self._completed(batch))
            if isinstance(error, Invalid):
                raise DirectoryInvalid(str(error)) from error
            raise

    async def _send(self, batch: Batch) -> Digest:

        async def messages() -> AsyncIterator[bytes]:
            for directory in batch.given:
                yield encode_directory(directory)

        try:
            answer = await send(self._peer, self._put, messages())
        except (Exhausted, OutOfRange) as error:
            # What gRPC's core and tonic say of a message over the limit; only they know which it is.
            stated = _LIMIT_IN_TEXT.search(str(error))
            bytes_max = int(stated[1]) if stated else _USUAL_LIMIT
            for digest, directory in batch.directories.items():
                if (size := len(encode_directory(directory))) > bytes_max:
                    entries = len(directory.entries)
                    raise DirectoryTooLarge(digest, size=size, entries=entries, bytes_max=bytes_max) from error
            raise
        found = Digest(answer.root_digest)
        if found != batch.root:
            raise DigestMismatch(wanted=batch.root, found=found, what="directory")
        return found

    async def _completed(self, batch: Batch) -> Batch:
        """`batch` with all that it relies on, got from the server. Raises DirectoryInvalid where that is not there."""
        below: dict[Digest, Directory] = {}
        for digest, stated in batch.relied_on.items():
            try:
                async with closing(self.closure(digest)) as directories:
                    below.update([found async for found in directories])
            except DirectoryNotFound:
                check_size(digest, stated=stated, sizes=None)
            check_size(digest, stated=stated, sizes=self._scheme.sizes_of(below[digest]))
        brought = children_first(below, batch.relied_on)
        return Batch(batch.root, (*brought.values(), *batch.given), {**brought, **batch.directories}, {})
