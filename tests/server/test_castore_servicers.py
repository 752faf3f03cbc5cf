"""What real peers of castore.v1 depend on, seen on the wire by generated stubs of both packages."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import grpc
import grpc.aio
import pytest

from kiln.castore.blobs.memory import MemoryBlobs
from kiln.castore.castore import Castore
from kiln.castore.closure import children_first
from kiln.castore.directories.memory import MemoryDirectories
from kiln.castore.model import BLAKE3_DOCUMENTED, BLAKE3_DOUBLED, SHA256_DOCUMENTED, Digest, Scheme
from kiln.castore.wire import decode_directory, encode_directory
from kiln.protos.snix.castore.protos import castore_pb2, rpc_blobstore_pb2, rpc_directory_pb2
from kiln.protos.snix.castore.protos.rpc_blobstore_pb2_grpc import BlobServiceStub
from kiln.protos.snix.castore.protos.rpc_directory_pb2_grpc import DirectoryServiceStub
from kiln.protos.tvix.castore.protos import castore_pb2 as tvix_castore_pb2
from kiln.protos.tvix.castore.protos import rpc_blobstore_pb2 as tvix_rpc_blobstore_pb2
from kiln.protos.tvix.castore.protos.rpc_blobstore_pb2_grpc import BlobServiceStub as TvixBlobServiceStub
from kiln.protos.tvix.castore.protos.rpc_directory_pb2_grpc import DirectoryServiceStub as TvixDirectoryServiceStub
from kiln.server.castore_servicers import castore_handlers

Serve = Callable[..., AbstractAsyncContextManager[str]]

MIB = 1024 * 1024
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "castore.json").read_text())["trees"]


def store(scheme: Scheme = BLAKE3_DOUBLED) -> Castore:
    return Castore(MemoryBlobs(scheme), MemoryDirectories(scheme))


@pytest.fixture
async def channel(serve: Serve) -> AsyncIterator[grpc.aio.Channel]:
    """To an empty snix.castore.v1, with the limits of a client that sets none."""
    async with (
        serve(castore_handlers(store())) as url,
        grpc.aio.insecure_channel("unix:" + url.removeprefix("grpc+unix://")) as channel,
    ):
        yield channel


def chunk(data: bytes) -> rpc_blobstore_pb2.BlobChunk:
    return rpc_blobstore_pb2.BlobChunk(data=data)


async def status_of(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc] # Any of gRPC's calls.
    return caught.value.code(), caught.value.details() or ""


async def put(channel: grpc.aio.Channel, *directories: bytes) -> bytes:
    messages = [castore_pb2.Directory.FromString(data) for data in directories]
    return (await DirectoryServiceStub(channel).Put(iter(messages))).root_digest


async def get(channel: grpc.aio.Channel, digest: bytes) -> list[bytes]:
    request = rpc_directory_pb2.GetDirectoryRequest(digest=digest, recursive=True)
    return [message.SerializeToString() async for message in DirectoryServiceStub(channel).Get(request)]


async def header_frames(socket: str, path: str, message: bytes) -> list[bool]:
    """One call in bare HTTP/2 (RFC 9113): for each HEADERS frame of the answer, whether it ends the stream."""

    def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
        return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body

    def field(name: bytes, value: bytes) -> bytes:  # HPACK: a literal without indexing, RFC 7541 6.2.2.
        return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value

    headers = {b":method": b"POST", b":scheme": b"http", b":path": path.encode(), b":authority": b"localhost"}
    headers |= {b"te": b"trailers", b"content-type": b"application/grpc"}
    reader, writer = await asyncio.open_unix_connection(socket)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
    writer.write(frame(1, 4, 1, b"".join(field(name, value) for name, value in headers.items())))
    writer.write(frame(0, 1, 1, b"\0" + len(message).to_bytes(4, "big") + message))
    ends: list[bool] = []
    while not any(ends):
        head = await reader.readexactly(9)
        await reader.readexactly(int.from_bytes(head[:3], "big"))
        if head[3] == 1:
            ends.append(bool(head[4] & 1))
    writer.close()
    await writer.wait_closed()
    return ends


async def test_a_missing_directory_is_told_after_headers(serve: Serve) -> None:
    # Snix takes a NOT_FOUND that comes without headers for a failed call.
    message = rpc_directory_pb2.GetDirectoryRequest(digest=bytes(32)).SerializeToString()
    async with serve(castore_handlers(store())) as url:
        socket = url.removeprefix("grpc+unix://")
        assert await header_frames(socket, "/snix.castore.v1.DirectoryService/Get", message) == [False, True]


async def test_a_missing_directory_is_not_found(channel: grpc.aio.Channel) -> None:
    call = DirectoryServiceStub(channel).Get(rpc_directory_pb2.GetDirectoryRequest(digest=bytes(32)))
    code, text = await status_of(call.read())
    assert code is grpc.StatusCode.NOT_FOUND
    assert bytes(32).hex() in text


async def test_a_missing_root_of_a_closure_is_an_empty_answer(channel: grpc.aio.Channel) -> None:
    assert await get(channel, bytes(32)) == []


@pytest.mark.parametrize("tree", [tree for tree in GOLDEN if tree["directories"]], ids=lambda tree: tree["name"])
async def test_snix_trees_are_taken_and_given_back_in_its_order(channel: grpc.aio.Channel, tree: dict) -> None:  # type: ignore[type-arg]
    sent = [bytes.fromhex(directory["hex"]) for directory in tree["directories"]]
    root = Digest(bytes.fromhex(tree["root"]["digest"]))
    by_digest = {BLAKE3_DOUBLED.digest_of(data): decode_directory(data) for data in sent}
    leaves_first = [encode_directory(directory) for directory in children_first(by_digest, [root]).values()]
    assert await put(channel, *leaves_first) == root.raw
    assert await get(channel, root.raw) == sent


@pytest.mark.parametrize(
    ("hexes", "says"),
    [
        ([], "none"),
        (["1a060a012e120178"], "reserved"),
        (["1a060a01621201781a060a0161120178"], "canonical"),
        (["1a060a01611201781a060a0161120178"], "duplicate"),
        (["0a0312012a"], "digest length"),
        (["1a030a0161"], "target"),
    ],
)
async def test_a_bad_directory_is_refused_with_its_reason(
    channel: grpc.aio.Channel, hexes: list[str], says: str
) -> None:
    method: grpc.aio.StreamUnaryMultiCallable[bytes, bytes]
    method = channel.stream_unary("/snix.castore.v1.DirectoryService/Put")  # Bytes: no protobuf class writes these.
    code, text = await status_of(method(iter([bytes.fromhex(text) for text in hexes])))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert says in text


async def test_a_get_that_says_nothing_and_a_bad_digest(channel: grpc.aio.Channel) -> None:
    directories, blobs = DirectoryServiceStub(channel), BlobServiceStub(channel)
    no_digest = directories.Get(rpc_directory_pb2.GetDirectoryRequest()).read()
    assert (await status_of(no_digest))[1].startswith("invalid by_what")
    short = directories.Get(rpc_directory_pb2.GetDirectoryRequest(digest=b"short")).read()
    assert await status_of(short) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid digest length: 5")
    stat = blobs.Stat(rpc_blobstore_pb2.StatBlobRequest(digest=b"short"))
    assert await status_of(stat) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid digest length: 5")


async def test_blobs_come_in_messages_any_client_takes(channel: grpc.aio.Channel) -> None:
    blobs = BlobServiceStub(channel)
    data = bytes(range(256)) * 40_000
    digest = (
        await blobs.Put(
            iter(
                [
                    chunk(data[:3_000_000]),
                    chunk(b""),
                    chunk(data[3_000_000:6_000_000]),
                    chunk(data[6_000_000:9_000_000]),
                    chunk(data[9_000_000:]),
                ]
            )
        )
    ).digest
    got = [message.data async for message in blobs.Read(rpc_blobstore_pb2.ReadBlobRequest(digest=digest))]
    assert b"".join(got) == data
    assert max(map(len, got)) <= MIB
    stat = await blobs.Stat(rpc_blobstore_pb2.StatBlobRequest(digest=digest, send_chunks=True, send_bao=True))
    assert (list(stat.chunks), stat.bao) == ([], b"")


async def test_the_empty_blob_is_there_and_has_no_message(channel: grpc.aio.Channel) -> None:
    blobs = BlobServiceStub(channel)
    digest = BLAKE3_DOUBLED.empty.raw
    await blobs.Stat(rpc_blobstore_pb2.StatBlobRequest(digest=digest))
    read = blobs.Read(rpc_blobstore_pb2.ReadBlobRequest(digest=digest))
    assert [message async for message in read] == []
    assert (await blobs.Put(iter([]))).digest == digest


async def test_a_missing_blob_is_not_found(channel: grpc.aio.Channel) -> None:
    blobs = BlobServiceStub(channel)
    stat = blobs.Stat(rpc_blobstore_pb2.StatBlobRequest(digest=bytes(32)))
    assert (await status_of(stat))[0] is grpc.StatusCode.NOT_FOUND
    read = blobs.Read(rpc_blobstore_pb2.ReadBlobRequest(digest=bytes(32))).read()
    assert (await status_of(read))[0] is grpc.StatusCode.NOT_FOUND


async def test_tvix_clients_are_served_from_a_documented_store(serve: Serve) -> None:
    async with (
        serve(castore_handlers(store(BLAKE3_DOCUMENTED))) as url,
        grpc.aio.insecure_channel("unix:" + url.removeprefix("grpc+unix://")) as channel,
    ):
        answer = await TvixBlobServiceStub(channel).Put(iter([tvix_rpc_blobstore_pb2.BlobChunk(data=b"x")]))
        assert answer.digest == BLAKE3_DOCUMENTED.digest_of(b"x").raw
        link = tvix_castore_pb2.SymlinkNode(name=b"a", target=b"b")
        root = await TvixDirectoryServiceStub(channel).Put(iter([tvix_castore_pb2.Directory(symlinks=[link])]))
        assert len(root.root_digest) == 32
        snix = BlobServiceStub(channel).Stat(rpc_blobstore_pb2.StatBlobRequest(digest=bytes(32)))
        assert (await status_of(snix))[0] is grpc.StatusCode.UNIMPLEMENTED


def test_sha256_has_no_wire() -> None:
    assert castore_handlers(store(SHA256_DOCUMENTED)) == ()
