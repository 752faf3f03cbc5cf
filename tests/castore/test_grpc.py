"""The gRPC castore against peers that lie, die, stall, or are stricter than kiln."""

import asyncio
import sys
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from kiln.aio import closing
from kiln.castore.backends import BACKENDS
from kiln.castore.blob_service import BlobService
from kiln.castore.blobs.grpc import GrpcBlobs
from kiln.castore.blobs.measured import MeasuredBlobs
from kiln.castore.blobs.memory import MemoryBlobs
from kiln.castore.blobs.size_limited import SizeLimitedBlobs
from kiln.castore.castore import Castore
from kiln.castore.closure import batch_of
from kiln.castore.directories.memory import MemoryDirectories
from kiln.castore.errors import (
    DigestMismatch,
    DirectoryInvalid,
    DirectoryNotFound,
    DirectoryTooLarge,
    SchemeWithoutWire,
)
from kiln.castore.model import (
    BLAKE3_DOCUMENTED,
    BLAKE3_DOUBLED,
    SHA256_DOCUMENTED,
    Digest,
    Directory,
    DirectoryNode,
    FileNode,
    SymlinkNode,
)
from kiln.castore.registry import CastoreRegistry
from kiln.castore.wire import encode_directory
from kiln.errors import Exhausted, KilnError, Unavailable
from kiln.rpc.channel import connected
from kiln.rpc.status import PeerFailed, PeerLacksMethod, PeerStalled
from kiln.rpc.url import CHANNEL_OPTIONS, parse_url
from kiln.server.castore_servicers import castore_handlers

Serve = Callable[..., AbstractAsyncContextManager[str]]

MIB = 1024 * 1024
SCHEME = BLAKE3_DOUBLED


def node_of(directory: Directory) -> DirectoryNode:
    return DirectoryNode(SCHEME.digest_of(encode_directory(directory)), SCHEME.size_of(directory))


LEAF = Directory.of([(b"x", SymlinkNode(b"y"))])
MIDDLE = Directory.of([(b"leaf", node_of(LEAF))])
ROOT = Directory.of([(b"leaf", node_of(LEAF)), (b"middle", node_of(MIDDLE))])


def opened(url: str) -> AbstractAsyncContextManager[Castore]:
    return CastoreRegistry(BACKENDS).open(url)


def store(blobs: BlobService | None = None, directories: MemoryDirectories | None = None) -> Castore:
    return Castore(blobs or MemoryBlobs(SCHEME), directories or MemoryDirectories(SCHEME))


class EndlessBlobs(BlobService):
    """Every blob is 256 MiB of the same byte, made as it is read."""

    scheme = SCHEME

    async def has(self, digest: Digest) -> bool:  # noqa: ARG002
        return True

    async def missing(self, digests: Iterable[Digest]) -> frozenset[Digest]:  # noqa: ARG002
        return frozenset()

    async def read(self, digest: Digest) -> AsyncIterator[bytes]:  # noqa: ARG002
        for _ in range(256):
            yield b"x" * MIB

    async def write(self, chunks: AsyncIterable[bytes]) -> Digest:
        async for _ in chunks:
            pass
        return SCHEME.empty


class StrictDirectories(MemoryDirectories):
    """As Snix: takes a tree only whole, and breaks with INTERNAL (any error without a kind) otherwise."""

    async def put(self, directories: Iterable[Directory]) -> Digest:
        batch = batch_of(directories, self.scheme)
        if batch.relied_on:
            raise KilnError("unknown digest referenced")
        return await super().put(batch.given)


class WrongDirectories(MemoryDirectories):
    """Answers with another directory than was asked for."""

    async def get(self, digest: Digest) -> Directory:  # noqa: ARG002
        return LEAF


class HoledDirectories(MemoryDirectories):
    """Has lost one directory, and nothing above it."""

    async def get(self, digest: Digest) -> Directory:
        if digest == node_of(LEAF).digest:
            raise DirectoryNotFound(digest)
        return await super().get(digest)


async def test_wrong_bytes_of_a_blob_are_caught(serve: Serve) -> None:
    async with serve(castore_handlers(store(EndlessBlobs()))) as url, opened(url) as castore:
        seen = 0

        async def count() -> None:
            nonlocal seen
            async for chunk in castore.blobs.read(SCHEME.digest_of(b"right")):
                seen += len(chunk)

        with pytest.raises(DigestMismatch):
            await count()
        assert seen < 256 * MIB
        with pytest.raises(DigestMismatch):
            await castore.blobs.write(chunk async for chunk in EndlessBlobs().read(SCHEME.empty))


async def test_wrong_directories_are_caught(serve: Serve) -> None:
    wrong = store(directories=WrongDirectories(SCHEME))
    async with serve(castore_handlers(wrong)) as url, opened(url) as castore:
        with pytest.raises(DigestMismatch):
            await castore.directories.get(node_of(ROOT).digest)
        with pytest.raises(DigestMismatch):
            _ = [item async for item in castore.directories.closure(node_of(ROOT).digest)]


async def test_a_hole_in_a_closure_is_named(serve: Serve) -> None:
    holed = store(directories=HoledDirectories(SCHEME))
    root = await holed.directories.put([LEAF, MIDDLE, ROOT])
    async with serve(castore_handlers(holed)) as url, opened(url) as castore:
        with pytest.raises(DirectoryNotFound) as caught:
            _ = [item async for item in castore.directories.closure(root)]
    assert caught.value.digest == node_of(LEAF).digest


async def test_a_strict_peer_gets_the_whole_tree(serve: Serve) -> None:
    strict = store(directories=StrictDirectories(SCHEME))
    async with serve(castore_handlers(strict)) as url, opened(url) as castore:
        await castore.directories.put([LEAF, MIDDLE])
        root = await castore.directories.put([ROOT])
        assert await strict.directories.get(root) == ROOT
        with pytest.raises(DirectoryInvalid, match="neither brought"):
            await castore.directories.put([Directory.of([(b"no", DirectoryNode(SCHEME.digest_of(b"no"), 2))])])


async def test_a_peers_own_trouble_in_a_put_is_its_own(serve: Serve) -> None:
    class Broken(MemoryDirectories):
        async def put(self, directories: Iterable[Directory]) -> Digest:  # noqa: ARG002
            raise KilnError("disk on fire")

    async with serve(castore_handlers(store(directories=Broken(SCHEME)))) as url, opened(url) as castore:
        with pytest.raises(PeerFailed, match="disk on fire"):
            await castore.directories.put([LEAF])


async def test_a_peer_with_smaller_messages_is_told_by_name(serve: Serve) -> None:
    wide = Directory.of((b"%0100d" % i, FileNode(SCHEME.empty, 0)) for i in range(40_000))
    # A server without kiln's options takes 4 MiB, as Snix does.
    async with serve(castore_handlers(store()), options=()) as url, opened(url) as castore:
        with pytest.raises(DirectoryTooLarge) as caught:
            await castore.directories.put([LEAF, wide, Directory.of([(b"wide", node_of(wide))])])
        assert await castore.directories.put([LEAF]) == node_of(LEAF).digest
    assert str(node_of(wide).digest) in str(caught.value)
    assert caught.value.bytes_max == 4 * MIB


async def test_a_slow_reader_holds_the_server_back(serve: Serve) -> None:
    inner = MeasuredBlobs(EndlessBlobs())
    async with serve(castore_handlers(store(inner))) as url, opened(url) as castore:
        async with closing(castore.blobs.read(SCHEME.digest_of(b"any"))) as reading:
            await anext(reading)
            await asyncio.sleep(0.5)
            assert inner.read_bytes <= 32 * MIB
        for _ in range(100):  # A reader that left ends the server's work soon.
            before = inner.read_bytes
            await asyncio.sleep(0.02)
            if inner.read_bytes == before:
                break
        assert inner.read_bytes <= 64 * MIB


async def test_a_refusal_in_mid_stream_keeps_its_kind(serve: Serve) -> None:
    limited = store(SizeLimitedBlobs(MemoryBlobs(SCHEME), bytes_max=10 * MIB))
    async with serve(castore_handlers(limited)) as url, opened(url) as castore:
        for _ in range(5):
            with pytest.raises(Exhausted, match="limit of 10485760 bytes"):
                await castore.blobs.write(chunk async for chunk in EndlessBlobs().read(SCHEME.empty))


async def test_a_slow_store_holds_the_writer_back(serve: Serve) -> None:
    class Stuck(EndlessBlobs):
        async def write(self, chunks: AsyncIterable[bytes]) -> Digest:
            async for _ in chunks:
                await asyncio.Event().wait()
            return SCHEME.empty

    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield b"x" * MIB

    async with serve(castore_handlers(store(Stuck()))) as url, opened(url) as castore:
        writing = asyncio.create_task(castore.blobs.write(endless()))
        await asyncio.sleep(0.5)
        assert sent <= 32
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing


async def test_a_peer_that_says_nothing_is_given_up(serve: Serve) -> None:
    class Silent(EndlessBlobs):
        async def has(self, digest: Digest) -> bool:  # noqa: ARG002
            await asyncio.Event().wait()
            return True

        async def read(self, digest: Digest) -> AsyncIterator[bytes]:  # noqa: ARG002
            await asyncio.Event().wait()
            yield b""

        async def write(self, chunks: AsyncIterable[bytes]) -> Digest:  # noqa: ARG002
            await asyncio.Event().wait()
            return SCHEME.empty

    async with serve(castore_handlers(store(Silent()))) as url, connected(parse_url(url, CHANNEL_OPTIONS)) as peer:
        blobs = GrpcBlobs(replace(peer, stall_s=0.2), SCHEME)
        digest = SCHEME.digest_of(b"any")
        with pytest.raises(PeerStalled):
            await blobs.has(digest)
        with pytest.raises(PeerStalled):
            await anext(blobs.read(digest))
        with pytest.raises(PeerStalled):
            await blobs.write(chunk async for chunk in EndlessBlobs().read(digest))


_SERVER = """
import asyncio, sys, grpc.aio
from kiln.castore.blobs.memory import MemoryBlobs
from kiln.castore.castore import Castore
from kiln.castore.directories.memory import MemoryDirectories
from kiln.castore.model import BLAKE3_DOUBLED
from kiln.server.castore_servicers import castore_handlers

class Slow(MemoryBlobs):
    async def read(self, digest):
        while True:
            yield b"x" * 100_000
            await asyncio.sleep(0.01)

async def main():
    castore = Castore(Slow(BLAKE3_DOUBLED), MemoryDirectories(BLAKE3_DOUBLED))
    server = grpc.aio.server(handlers=castore_handlers(castore))
    server.add_insecure_port("unix:" + sys.argv[1])
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()

asyncio.run(main())
"""


@pytest.mark.parametrize("while_reading", [True, False])
async def test_a_peer_that_dies_in_mid_stream_is_unavailable(tmp_path: Path, while_reading: bool) -> None:
    socket = str(tmp_path / "s")
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _SERVER, socket, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert server.stdout
    assert await server.stdout.readline() == b"ready\n"

    async def killing() -> AsyncIterator[bytes]:
        yield b"first"
        server.kill()
        await server.wait()
        while True:
            yield b"more"
            await asyncio.sleep(0)

    async def killed_reading(blobs: BlobService) -> None:
        chunks = 0
        async for _ in blobs.read(SCHEME.digest_of(b"any")):
            chunks += 1
            if chunks == 20:
                server.kill()

    try:
        async with opened(f"grpc+unix://{socket}") as castore:
            with pytest.raises(Unavailable) as caught:
                await (killed_reading(castore.blobs) if while_reading else castore.blobs.write(killing()))
    finally:
        if server.returncode is None:
            server.kill()
        await server.wait()
    assert socket in str(caught.value)


async def test_a_store_of_another_scheme_does_not_offer_the_service(serve: Serve) -> None:
    async with serve(castore_handlers(store())) as url, opened(f"{url}?scheme={BLAKE3_DOCUMENTED.name}") as castore:
        with pytest.raises(PeerLacksMethod):
            await castore.blobs.has(castore.scheme.digest_of(b"any"))
        with pytest.raises(PeerLacksMethod):
            await castore.directories.get(castore.scheme.digest_of(b"any"))


async def test_sha256_has_no_wire(tmp_path: Path) -> None:
    with pytest.raises(SchemeWithoutWire):
        await opened(f"grpc+unix://{tmp_path}/s?scheme=sha256/documented").__aenter__()


def test_sha256_has_no_servicers() -> None:
    assert castore_handlers(Castore(MemoryBlobs(SHA256_DOCUMENTED), MemoryDirectories(SHA256_DOCUMENTED))) == ()
