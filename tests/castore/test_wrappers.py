"""What each wrapper adds, seen with an inner service that misbehaves or is watched."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable

import pytest

from kiln.castore.blob_service import BlobService
from kiln.castore.blobs.measured import MeasuredBlobs
from kiln.castore.blobs.memory import MemoryBlobs
from kiln.castore.blobs.size_limited import SizeLimitedBlobs
from kiln.castore.blobs.verified import VerifiedBlobs
from kiln.castore.castore import Castore
from kiln.castore.directories.measured import MeasuredDirectories
from kiln.castore.directories.memory import MemoryDirectories
from kiln.castore.directories.size_limited import SizeLimitedDirectories
from kiln.castore.directories.verified import VerifiedDirectories
from kiln.castore.directory_service import DirectoryService
from kiln.castore.errors import (
    BlobTooLarge,
    DigestMismatch,
    DirectoryInvalid,
    DirectoryNotFound,
    DirectoryTooLarge,
    SchemeDiffers,
)
from kiln.castore.model import (
    BLAKE3_DOCUMENTED,
    BLAKE3_DOUBLED,
    Digest,
    Directory,
    DirectoryNode,
    Scheme,
    SymlinkNode,
)
from kiln.castore.wire import encode_directory

MIB = 1024 * 1024
SCHEME = BLAKE3_DOUBLED


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def take_all(reading: AsyncIterator[bytes], into: list[bytes]) -> None:
    """What comes before an error is kept, which a comprehension would lose."""
    async for chunk in reading:
        into.append(chunk)  # noqa: PERF401


class LyingBlobs(BlobService):
    """Answers every read with the same chunks, and every write with the same digest."""

    scheme = SCHEME

    def __init__(self, *parts: bytes) -> None:
        self._parts = parts

    async def has(self, digest: Digest) -> bool:  # noqa: ARG002
        return True

    async def missing(self, digests: Iterable[Digest]) -> frozenset[Digest]:  # noqa: ARG002
        return frozenset()

    async def read(self, digest: Digest) -> AsyncIterator[bytes]:  # noqa: ARG002
        for part in self._parts:
            yield part

    async def write(self, chunks: AsyncIterable[bytes]) -> Digest:
        async for _ in chunks:
            pass
        return SCHEME.digest_of(b"".join(self._parts))


class LyingDirectories(DirectoryService):
    """Answers everything with the same directories."""

    scheme = SCHEME

    def __init__(self, *directories: Directory) -> None:
        self._directories = directories

    async def missing(self, digests: Iterable[Digest]) -> frozenset[Digest]:  # noqa: ARG002
        return frozenset()

    async def get(self, digest: Digest) -> Directory:  # noqa: ARG002
        return self._directories[0]

    async def closure(self, root: Digest) -> AsyncIterator[tuple[Digest, Directory]]:
        for directory in self._directories:
            yield root, directory

    async def put(self, directories: Iterable[Directory]) -> Digest:  # noqa: ARG002
        return SCHEME.empty


def node_of(directory: Directory, scheme: Scheme = SCHEME) -> DirectoryNode:
    return DirectoryNode(scheme.digest_of(encode_directory(directory)), scheme.size_of(directory))


LEAF = Directory.of([(b"x", SymlinkNode(b"y"))])
ROOT = Directory.of([(b"leaf", node_of(LEAF))])


async def test_verified_hands_on_no_byte_of_a_small_wrong_blob() -> None:
    seen: list[bytes] = []
    reading = VerifiedBlobs(LyingBlobs(b"wr", b"ong")).read(SCHEME.digest_of(b"right"))
    with pytest.raises(DigestMismatch) as caught:
        await take_all(reading, seen)
    assert seen == []
    assert caught.value.found == SCHEME.digest_of(b"wrong")


async def test_verified_never_hands_on_the_end_of_a_large_wrong_blob() -> None:
    sent = [bytes([i]) * (300 * 1024) for i in range(10)]
    seen: list[bytes] = []
    with pytest.raises(DigestMismatch):
        await take_all(VerifiedBlobs(LyingBlobs(*sent)).read(SCHEME.digest_of(b"right")), seen)
    assert seen == sent[:7]  # The last three, 900 KiB, are held back.


async def test_verified_checks_what_a_write_answers() -> None:
    with pytest.raises(DigestMismatch):
        await VerifiedBlobs(LyingBlobs(b"other")).write(chunks(b"mine"))


async def test_verified_checks_a_directory() -> None:
    with pytest.raises(DigestMismatch):
        await VerifiedDirectories(LyingDirectories(LEAF)).get(node_of(ROOT).digest)
    with pytest.raises(DigestMismatch):
        await VerifiedDirectories(LyingDirectories(LEAF)).put([LEAF])


UNWANTED = Directory.of([(b"z", SymlinkNode(b"z"))])
WRONG_SIZE = Directory.of([(b"leaf", DirectoryNode(node_of(LEAF).digest, 77))])


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        ([LEAF, ROOT], DigestMismatch),
        ([ROOT, UNWANTED], DigestMismatch),
        ([ROOT, LEAF, LEAF], DigestMismatch),
        ([ROOT], DirectoryNotFound),
        ([], DirectoryNotFound),
    ],
    ids=["child-first", "unannounced", "twice", "incomplete", "nothing"],
)
async def test_verified_checks_the_order_of_a_closure(sent: list[Directory], error: type[Exception]) -> None:
    with pytest.raises(error):
        _ = [item async for item in VerifiedDirectories(LyingDirectories(*sent)).closure(node_of(ROOT).digest)]


async def test_verified_checks_the_sizes_in_a_closure() -> None:
    lying = VerifiedDirectories(LyingDirectories(WRONG_SIZE, LEAF))
    with pytest.raises(DirectoryInvalid, match="wrong size 77"):
        _ = [item async for item in lying.closure(node_of(WRONG_SIZE).digest)]


async def test_size_limited_stops_reading_at_the_limit() -> None:
    blobs = SizeLimitedBlobs(MemoryBlobs(SCHEME), bytes_max=10)
    assert await blobs.write(chunks(b"12345", b"67890"))
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"1234"

    with pytest.raises(BlobTooLarge):
        await blobs.write(endless())
    assert taken == 3


async def test_size_limited_names_the_directory() -> None:
    directories = SizeLimitedDirectories(MemoryDirectories(SCHEME), bytes_max=20)
    with pytest.raises(DirectoryTooLarge, match=str(node_of(ROOT).digest)):
        await directories.put([LEAF, ROOT])
    assert await directories.missing([node_of(LEAF).digest])


class Clock:
    """Time that passes only when it is read: a second each."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


async def test_measured_counts_calls_bytes_and_its_own_seconds() -> None:
    blobs = MeasuredBlobs(MemoryBlobs(SCHEME), clock=Clock())
    digest = await blobs.write(chunks(b"123", b"45"))
    assert (blobs.writes, blobs.write_bytes) == (1, 5)
    assert [chunk async for chunk in blobs.read(digest)] == [b"12345"]
    assert (blobs.reads, blobs.read_bytes) == (1, 5)
    assert await blobs.has(digest)
    await blobs.missing([digest, SCHEME.digest_of(b"absent")])
    assert (blobs.lookups, blobs.lookup_s) == (3, 2.0)
    # Began, ended: 1 s each way beyond what source (3 asked, 3 answered) and taker (1 chunk) took.
    assert (blobs.write_s, blobs.read_s) == (4.0, 2.0)


async def test_measured_counts_directories() -> None:
    directories = MeasuredDirectories(MemoryDirectories(SCHEME), clock=Clock())
    root = await directories.put([LEAF, ROOT])
    await directories.get(root)
    _ = [item async for item in directories.closure(root)]
    await directories.missing([root])
    assert (directories.writes, directories.reads, directories.lookups) == (2, 3, 1)
    assert directories.write_s == 1.0


def test_services_of_two_schemes_make_no_castore() -> None:
    with pytest.raises(SchemeDiffers, match="blake3/documented"):
        Castore(MemoryBlobs(BLAKE3_DOUBLED), MemoryDirectories(BLAKE3_DOCUMENTED))
