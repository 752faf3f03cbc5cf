"""Copies between stores, and what of a closure is missing."""

from collections.abc import AsyncIterator, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiln.castore.blobs.measured import MeasuredBlobs
from kiln.castore.blobs.memory import MemoryBlobs
from kiln.castore.castore import Castore
from kiln.castore.closure import Copied, Missing, children, children_first, copy_closure, missing_of_closure
from kiln.castore.directories.memory import MemoryDirectories
from kiln.castore.errors import ContentMissing, DigestMismatch, SchemeDiffers
from kiln.castore.model import BLAKE3_DOCUMENTED, Digest, Directory, DirectoryNode, FileNode, Node, Scheme, SymlinkNode
from kiln.castore.wire import encode_directory


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def empty(scheme: Scheme) -> Castore:
    return Castore(MemoryBlobs(scheme), MemoryDirectories(scheme))


def node_of(scheme: Scheme, directory: Directory) -> DirectoryNode:
    return DirectoryNode(scheme.digest_of(encode_directory(directory)), scheme.size_of(directory))


async def filled(store: Castore) -> list[Node]:
    """root -> (sub -> (f, link), g) and a file of its own: the nodes to ask for."""
    f, g, own = [await store.blobs.write(chunks(data)) for data in (b"f", b"g" * 3_000_000, b"own")]
    sub = Directory.of([(b"f", FileNode(f, 1)), (b"link", SymlinkNode(b"nowhere"))])
    root = Directory.of([(b"sub", node_of(store.scheme, sub)), (b"g", FileNode(g, 3_000_000))])
    await store.directories.put([sub, root])
    return [node_of(store.scheme, root), FileNode(own, 3), SymlinkNode(b"x")]


async def test_a_closure_arrives_whole(castore: Castore) -> None:
    source = empty(castore.scheme)
    nodes = await filled(source)
    assert await copy_closure(nodes, source, castore) == Copied(blobs=3, directories=2)
    assert not await missing_of_closure(nodes, castore)
    assert await copy_closure(nodes, source, castore) == Copied()


async def test_a_closure_is_fetched_whole(castore: Castore) -> None:
    nodes = await filled(castore)
    target = empty(castore.scheme)
    assert await copy_closure(nodes, castore, target) == Copied(blobs=3, directories=2)
    assert not await missing_of_closure(nodes, target)


async def test_only_what_is_missing_moves(scheme: Scheme) -> None:
    source, target = empty(scheme), empty(scheme)
    nodes = await filled(source)
    await target.blobs.write(chunks(b"own"))
    sub = await source.directories.get(nodes[0].digest)  # type: ignore[union-attr] # The root, a DirectoryNode.
    await target.directories.put([await source.directories.get(next(iter(children(sub))))])
    watched = Castore(MeasuredBlobs(source.blobs), source.directories)
    assert await copy_closure(nodes, watched, target) == Copied(blobs=2, directories=1)


async def test_a_directory_that_is_there_does_not_hide_a_lost_blob(scheme: Scheme) -> None:
    source = empty(scheme)
    nodes = await filled(source)
    target = Castore(MemoryBlobs(scheme), source.directories)
    assert await copy_closure(nodes, source, target) == Copied(blobs=3)


async def test_the_target_may_have_what_the_source_has_not(scheme: Scheme) -> None:
    target = empty(scheme)
    nodes = await filled(target)
    assert await copy_closure(nodes, empty(scheme), target) == Copied()


async def test_all_that_neither_has_is_named_and_nothing_copied(scheme: Scheme) -> None:
    source = empty(scheme)
    nodes = await filled(source)
    absent_blob, absent_directory = scheme.digest_of(b"absent"), scheme.digest_of(b"no directory")
    target = empty(scheme)
    with pytest.raises(ContentMissing) as caught:
        await copy_closure([*nodes, FileNode(absent_blob, 6), DirectoryNode(absent_directory, 1)], source, target)
    assert caught.value.blobs == {absent_blob}
    assert caught.value.directories == {absent_directory}
    assert (await missing_of_closure(nodes, target)).directories == {nodes[0].digest}  # type: ignore[union-attr] # As above.


async def test_missing_of_a_closure_is_everything_at_once(scheme: Scheme) -> None:
    store = empty(scheme)
    nodes = await filled(store)
    bare = Castore(MemoryBlobs(scheme), store.directories)
    assert len((await missing_of_closure(nodes, bare)).blobs) == 3
    assert await missing_of_closure([FileNode(scheme.empty, 0)], bare) == Missing()


async def test_a_source_that_lies_is_caught(scheme: Scheme) -> None:
    source = empty(scheme)
    nodes = await filled(source)

    class Lying(MemoryBlobs):
        async def missing(self, digests: Iterable[Digest]) -> frozenset[Digest]:  # noqa: ARG002
            return frozenset()

        async def read(self, digest: Digest) -> AsyncIterator[bytes]:  # noqa: ARG002
            yield b"a lie"

    target = empty(scheme)
    with pytest.raises(DigestMismatch):
        await copy_closure(nodes, Castore(Lying(scheme), source.directories), target)
    assert (await missing_of_closure(nodes, target)).directories


async def test_stores_of_two_schemes_do_not_mix(castore: Castore) -> None:
    other = empty(BLAKE3_DOCUMENTED)
    if castore.scheme is not BLAKE3_DOCUMENTED:
        with pytest.raises(SchemeDiffers):
            await copy_closure([], castore, other)


@given(links=st.lists(st.sets(st.integers(0, 40), max_size=4), min_size=1, max_size=20))
def test_children_come_first(links: list[set[int]]) -> None:
    scheme = BLAKE3_DOCUMENTED
    made: list[Directory] = []
    for number, below in enumerate(links):
        named: list[tuple[bytes, Node]] = [(b"%d" % i, node_of(scheme, made[i])) for i in below if i < number]
        made.append(Directory.of([*named, (b"self", SymlinkNode(b"%d" % number))]))
    by_digest = {node_of(scheme, directory).digest: directory for directory in reversed(made)}
    ordered = list(children_first(by_digest, by_digest))
    assert sorted(ordered) == sorted(by_digest)
    for place, digest in enumerate(ordered):
        assert children(by_digest[digest]).keys() <= set(ordered[:place])
