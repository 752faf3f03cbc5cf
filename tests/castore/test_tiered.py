"""A near store in front of a far one: what is read, what is kept, what is written where."""

from collections.abc import AsyncIterator

import pytest

from kiln.aio import closing
from kiln.castore.blobs.measured import MeasuredBlobs
from kiln.castore.blobs.memory import MemoryBlobs
from kiln.castore.blobs.size_limited import SizeLimitedBlobs
from kiln.castore.blobs.tiered import TieredBlobs
from kiln.castore.directories.measured import MeasuredDirectories
from kiln.castore.directories.memory import MemoryDirectories
from kiln.castore.directories.tiered import TieredDirectories
from kiln.castore.errors import BlobTooLarge, DirectoryNotFound, SchemeDiffers
from kiln.castore.model import (
    BLAKE3_DOCUMENTED,
    BLAKE3_DOUBLED,
    Digest,
    Directory,
    DirectoryNode,
    SymlinkNode,
)
from kiln.castore.wire import encode_directory

MIB = 1024 * 1024
SCHEME = BLAKE3_DOUBLED


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def read_all(blobs: TieredBlobs, digest: Digest) -> bytes:
    return b"".join([chunk async for chunk in blobs.read(digest)])


def node_of(directory: Directory) -> DirectoryNode:
    return DirectoryNode(SCHEME.digest_of(encode_directory(directory)), SCHEME.size_of(directory))


LEAF = Directory.of([(b"x", SymlinkNode(b"y"))])
MIDDLE = Directory.of([(b"leaf", node_of(LEAF))])
ROOT = Directory.of([(b"leaf", node_of(LEAF)), (b"middle", node_of(MIDDLE))])


async def test_a_blob_is_read_from_far_once() -> None:
    near, far = MemoryBlobs(SCHEME), MeasuredBlobs(MemoryBlobs(SCHEME))
    blobs = TieredBlobs(near, far)
    data = b"x" * (5 * MIB)
    digest = await far.write(chunks(data))
    for _ in range(2):
        assert await read_all(blobs, digest) == data
    assert far.reads == 1
    assert await near.has(digest)


async def test_writes_go_near_only() -> None:
    near, far = MemoryBlobs(SCHEME), MemoryBlobs(SCHEME)
    digest = await TieredBlobs(near, far).write(chunks(b"mine"))
    assert await near.has(digest)
    assert not await far.has(digest)


async def test_missing_is_missing_in_both() -> None:
    near, far = MemoryBlobs(SCHEME), MemoryBlobs(SCHEME)
    here, there = await near.write(chunks(b"here")), await far.write(chunks(b"there"))
    nowhere = SCHEME.digest_of(b"nowhere")
    assert await TieredBlobs(near, far).missing([here, there, nowhere]) == {nowhere}


async def test_a_reader_who_leaves_early_leaves_nothing_near() -> None:
    near, far = MemoryBlobs(SCHEME), MemoryBlobs(SCHEME)
    digest = await far.write(chunks(b"x" * (5 * MIB)))
    async with closing(TieredBlobs(near, far).read(digest)) as reading:
        await anext(reading)
    assert not await near.has(digest)
    assert not await near.has(SCHEME.digest_of(b"x" * MIB))


async def test_far_is_read_at_the_readers_pace() -> None:
    near, far = MemoryBlobs(SCHEME), MeasuredBlobs(MemoryBlobs(SCHEME))
    digest = await far.write(chunks(b"x" * (64 * MIB)))
    async with closing(TieredBlobs(near, far).read(digest)) as reading:
        await anext(reading)
        assert far.read_bytes <= 4 * MIB


async def test_a_near_store_that_cannot_take_it_fails_the_read() -> None:
    far = MemoryBlobs(SCHEME)
    digest = await far.write(chunks(b"x" * (5 * MIB)))
    with pytest.raises(BlobTooLarge):
        await read_all(TieredBlobs(SizeLimitedBlobs(MemoryBlobs(SCHEME), bytes_max=MIB), far), digest)


@pytest.mark.parametrize("way", ["get", "closure"])
async def test_a_closure_is_read_from_far_once(way: str) -> None:
    near, far = MemoryDirectories(SCHEME), MeasuredDirectories(MemoryDirectories(SCHEME))
    directories = TieredDirectories(near, far)
    root = await far.put([LEAF, MIDDLE, ROOT])
    if way == "get":
        assert await directories.get(root) == ROOT
    else:
        assert [directory async for _, directory in directories.closure(root)] == [ROOT, LEAF, MIDDLE]
    assert far.reads == 3
    assert [directory async for _, directory in directories.closure(root)] == [ROOT, LEAF, MIDDLE]
    assert await directories.get(node_of(LEAF).digest) == LEAF
    assert far.reads == 3


async def test_what_a_put_relies_on_is_brought_near() -> None:
    near, far = MemoryDirectories(SCHEME), MemoryDirectories(SCHEME)
    await far.put([LEAF, MIDDLE])
    root = await TieredDirectories(near, far).put([ROOT])
    assert len([item async for item in near.closure(root)]) == 3
    assert await far.missing([root])


async def test_an_incomplete_far_store_leaves_nothing_near() -> None:
    near = MemoryDirectories(SCHEME)

    class Incomplete(MemoryDirectories):
        async def get(self, digest: Digest) -> Directory:
            if digest == node_of(LEAF).digest:
                raise DirectoryNotFound(digest)
            return await super().get(digest)

    far = Incomplete(SCHEME)
    root = await far.put([LEAF, MIDDLE, ROOT])
    with pytest.raises(DirectoryNotFound):
        await TieredDirectories(near, far).get(root)
    assert await near.missing([root, node_of(MIDDLE).digest]) == {root, node_of(MIDDLE).digest}


def test_two_schemes_make_no_tiers() -> None:
    with pytest.raises(SchemeDiffers):
        TieredBlobs(MemoryBlobs(BLAKE3_DOUBLED), MemoryBlobs(BLAKE3_DOCUMENTED))
    with pytest.raises(SchemeDiffers):
        TieredDirectories(MemoryDirectories(BLAKE3_DOUBLED), MemoryDirectories(BLAKE3_DOCUMENTED))
