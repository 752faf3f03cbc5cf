"""What every blob service promises."""

import asyncio
from collections.abc import AsyncIterator, Iterable

import pytest

from kiln.aio import closing
from kiln.castore.blob_service import BlobService
from kiln.castore.castore import Castore, read_whole
from kiln.castore.errors import BlobNotFound, BlobTooLarge
from kiln.castore.model import Digest

MIB = 1024 * 1024


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def chunks_then(error: Exception, *parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
    raise error


@pytest.fixture
def blobs(castore: Castore) -> BlobService:
    return castore.blobs


async def read_all(blobs: BlobService, digest: Digest) -> bytes:
    return b"".join([chunk async for chunk in blobs.read(digest)])


@pytest.mark.parametrize(
    "parts",
    [
        [b"hello"],
        [b"he", b"", b"llo", b""],
        [b"x" * MIB, b"y" * 7, b"z" * 3 * MIB],
        [bytes([i % 251]) for i in range(3000)],
        [b"q" * (9 * MIB)],
    ],
    ids=["one", "empty-chunks", "large", "tiny-chunks", "one-chunk-over-message-limits"],
)
async def test_what_is_written_is_read_under_its_digest(blobs: BlobService, parts: list[bytes]) -> None:
    whole = b"".join(parts)
    digest = await blobs.write(chunks(*parts))
    assert digest == blobs.scheme.digest_of(whole)
    assert await read_all(blobs, digest) == whole
    assert await blobs.has(digest)


async def test_no_chunk_is_empty(blobs: BlobService) -> None:
    digest = await blobs.write(chunks(b"", b"x" * (3 * MIB), b"", b"y"))
    assert all([chunk async for chunk in blobs.read(digest)])


async def test_the_empty_blob_is_there_from_the_start(blobs: BlobService) -> None:
    empty = blobs.scheme.empty
    assert await blobs.has(empty)
    assert not await blobs.missing([empty])
    assert await read_all(blobs, empty) == b""


@pytest.mark.parametrize("parts", [[], [b""]])
async def test_nothing_written_is_the_empty_blob(blobs: BlobService, parts: list[bytes]) -> None:
    assert await blobs.write(chunks(*parts)) == blobs.scheme.empty


async def test_writing_twice_is_no_error(blobs: BlobService) -> None:
    assert await blobs.write(chunks(b"again")) == await blobs.write(chunks(b"ag", b"ain"))


async def test_an_absent_blob_is_not_found_before_the_first_chunk(blobs: BlobService) -> None:
    absent = blobs.scheme.digest_of(b"absent")
    assert not await blobs.has(absent)
    with pytest.raises(BlobNotFound) as caught:
        await anext(blobs.read(absent))
    assert caught.value.digest == absent


async def test_missing_are_just_those_that_are_not_there(blobs: BlobService) -> None:
    there = [await blobs.write(chunks(b"%d" % i)) for i in range(40)]
    absent = [blobs.scheme.digest_of(b"absent %d" % i) for i in range(40)]
    asked: Iterable[Digest] = (digest for pair in zip(there, absent, strict=True) for digest in pair)
    assert await blobs.missing(asked) == frozenset(absent)
    assert await blobs.missing([]) == frozenset()
    assert await blobs.missing([absent[0], absent[0]]) == {absent[0]}


async def test_a_write_whose_source_fails_leaves_nothing_behind(blobs: BlobService) -> None:
    with pytest.raises(ConnectionResetError):
        await blobs.write(chunks_then(ConnectionResetError(), b"half", b"x" * MIB))
    assert await blobs.missing([blobs.scheme.digest_of(b"half"), blobs.scheme.digest_of(b"half" + b"x" * MIB)])
    assert not await blobs.has(blobs.scheme.digest_of(b"half"))
    assert not await blobs.has(blobs.scheme.digest_of(b"half" + b"x" * MIB))


async def test_a_cancelled_write_leaves_nothing_behind(blobs: BlobService) -> None:
    sent = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield b"half"
        sent.set()
        await asyncio.Event().wait()

    writing = asyncio.create_task(blobs.write(endless()))
    await sent.wait()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    await asyncio.sleep(0.05)  # A server hears of it a little later.
    assert not await blobs.has(blobs.scheme.digest_of(b"half"))


async def test_a_reader_may_leave_early(blobs: BlobService) -> None:
    data = bytes(range(256)) * (16 * MIB // 256)
    digest = await blobs.write(chunks(data))
    async with closing(blobs.read(digest)) as reading:
        first = await anext(reading)
    assert data.startswith(first)
    assert await read_all(blobs, digest) == data


async def test_many_reads_and_writes_at_once(blobs: BlobService) -> None:
    whole = [bytes([i]) * (50_000 * i + 1) for i in range(20)]
    digests = await asyncio.gather(*(blobs.write(chunks(data)) for data in whole))
    assert await asyncio.gather(*(read_all(blobs, digest) for digest in digests)) == whole


async def test_a_small_blob_is_read_whole_up_to_a_limit(blobs: BlobService) -> None:
    digest = await blobs.write(chunks(b"12345"))
    assert await read_whole(blobs, digest, bytes_max=5) == b"12345"
    with pytest.raises(BlobTooLarge):
        await read_whole(blobs, digest, bytes_max=4)
