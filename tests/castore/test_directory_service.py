"""What every directory service promises."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kiln.castore.castore import Castore
from kiln.castore.directory_service import DirectoryService
from kiln.castore.errors import DirectoryInvalid, DirectoryNotFound
from kiln.castore.model import Digest, Directory, DirectoryNode, FileNode, Node, Scheme, SymlinkNode
from kiln.castore.wire import encode_directory


@pytest.fixture
def directories(castore: Castore) -> DirectoryService:
    return castore.directories


def digest_of(scheme: Scheme, directory: Directory) -> Digest:
    return scheme.digest_of(encode_directory(directory))


def node_of(scheme: Scheme, directory: Directory) -> DirectoryNode:
    return DirectoryNode(digest_of(scheme, directory), scheme.size_of(directory))


def tree(scheme: Scheme) -> list[Directory]:
    """root -> (a -> shared, b -> shared -> leaf): children first."""
    leaf = Directory.of([(b"file", FileNode(scheme.digest_of(b"1"), 1, executable=True))])
    shared = Directory.of([(b"leaf", node_of(scheme, leaf)), (b"\xff\n", SymlinkNode(b"../..\xfe"))])
    a = Directory.of([(b"s", node_of(scheme, shared))])
    b = Directory.of([(b"s", node_of(scheme, shared)), (b"l", node_of(scheme, leaf))])
    root = Directory.of([(b"a", node_of(scheme, a)), (b"b", node_of(scheme, b)), (b"l", node_of(scheme, leaf))])
    return [leaf, shared, a, b, root]


async def test_a_tree_is_got_back_directory_by_directory(directories: DirectoryService) -> None:
    given_tree = tree(directories.scheme)
    root = await directories.put(given_tree)
    assert root == digest_of(directories.scheme, given_tree[-1])
    for directory in given_tree:
        assert await directories.get(digest_of(directories.scheme, directory)) == directory


async def test_a_closure_is_breadth_first_each_once(directories: DirectoryService) -> None:
    leaf, shared, a, b, root = tree(directories.scheme)
    digest = await directories.put([leaf, shared, a, b, root])
    found = [item async for item in directories.closure(digest)]
    assert [directory for _, directory in found] == [root, a, b, leaf, shared]
    assert all(digest == digest_of(directories.scheme, directory) for digest, directory in found)


async def test_an_absent_directory_is_not_found(directories: DirectoryService) -> None:
    absent = directories.scheme.digest_of(b"absent")
    with pytest.raises(DirectoryNotFound) as of_get:
        await directories.get(absent)
    with pytest.raises(DirectoryNotFound) as of_closure:
        await anext(directories.closure(absent))
    assert of_get.value.digest == of_closure.value.digest == absent


async def test_missing_are_just_those_that_are_not_there(directories: DirectoryService) -> None:
    given_tree = tree(directories.scheme)
    root = await directories.put(given_tree)
    absent = [directories.scheme.digest_of(b"%d" % i) for i in range(50)]
    assert await directories.missing(iter([*absent, root, *absent])) == frozenset(absent)
    assert await directories.missing([]) == frozenset()


async def test_the_empty_directory(directories: DirectoryService) -> None:
    root = await directories.put([Directory()])
    assert root == directories.scheme.empty
    assert await directories.get(root) == Directory()


async def test_putting_twice_and_repeating_are_no_errors(directories: DirectoryService) -> None:
    leaf, *rest = tree(directories.scheme)
    first = await directories.put([leaf, leaf, *rest])
    assert await directories.put([leaf, *rest, rest[-1]]) == first


async def test_what_is_stored_need_not_come_again(directories: DirectoryService) -> None:
    leaf, shared, a, b, root = tree(directories.scheme)
    await directories.put([leaf, shared])
    await directories.put([a])
    digest = await directories.put([b, root])
    assert len([item async for item in directories.closure(digest)]) == 5


async def test_a_reference_to_what_is_not_there_is_refused_and_nothing_kept(directories: DirectoryService) -> None:
    leaf, shared, a, _, _ = tree(directories.scheme)
    with pytest.raises(DirectoryInvalid, match=str(digest_of(directories.scheme, leaf))):
        await directories.put([shared, a])
    with pytest.raises(DirectoryInvalid):
        await directories.put([shared, leaf, a])  # Children come first.
    all_three = [digest_of(directories.scheme, directory) for directory in (leaf, shared, a)]
    assert await directories.missing(all_three) == frozenset(all_three)


@pytest.mark.parametrize("stored", [False, True])
async def test_a_wrong_size_is_refused(directories: DirectoryService, stored: bool) -> None:
    scheme = directories.scheme
    leaf = Directory.of((name, SymlinkNode(b"target")) for name in (b"a", b"b", b"c"))
    if stored:
        await directories.put([leaf])
    for size in (2, scheme.size_of(leaf) + 1):  # Below the documented count, above the scheme's own.
        parent = Directory.of([(b"leaf", DirectoryNode(digest_of(scheme, leaf), size))])
        with pytest.raises(DirectoryInvalid, match="size"):
            await directories.put([parent] if stored else [leaf, parent])
        assert await directories.missing([digest_of(scheme, parent)])


@pytest.mark.parametrize("stored", [False, True])
async def test_the_documented_count_is_not_too_small(directories: DirectoryService, stored: bool) -> None:
    scheme = directories.scheme
    leaf = Directory.of((name, SymlinkNode(b"target")) for name in (b"a", b"b", b"c"))
    parent = Directory.of([(b"leaf", DirectoryNode(digest_of(scheme, leaf), 3))])
    root = Directory.of([(b"parent", DirectoryNode(digest_of(scheme, parent), 4))])
    if stored:
        await directories.put([leaf])
    digest = await directories.put([parent, root] if stored else [leaf, parent, root])
    assert [directory async for _, directory in directories.closure(digest)] == [root, parent, leaf]


async def test_a_size_beyond_64_bits_is_refused(directories: DirectoryService) -> None:
    chain = [Directory()]
    for _ in range(64):  # Each holds the last one twice.
        below = node_of(directories.scheme, chain[-1])
        chain.append(Directory.of([(b"a", below), (b"b", below)]))
    with pytest.raises(DirectoryInvalid, match="64 bits"):
        await directories.put(chain)
    assert await directories.missing([digest_of(directories.scheme, Directory())])


async def test_a_put_of_nothing_is_refused(directories: DirectoryService) -> None:
    with pytest.raises(DirectoryInvalid):
        await directories.put([])


async def test_a_directory_of_100_000_entries(directories: DirectoryService) -> None:
    file = FileNode(directories.scheme.digest_of(b""), 0)
    wide = Directory.of((b"%099d" % i, file) for i in range(100_000))
    assert await directories.get(await directories.put([wide])) == wide


async def test_a_tree_500_deep(directories: DirectoryService) -> None:
    chain = [Directory()]
    for _ in range(500):
        chain.append(Directory.of([(b"d", node_of(directories.scheme, chain[-1]))]))
    root = await directories.put(chain)
    assert [directory async for _, directory in directories.closure(root)] == chain[::-1]


names = st.binary(min_size=1, max_size=255).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in {b".", b".."}
)
targets = st.binary(min_size=1, max_size=60).filter(lambda target: b"\0" not in target)
entries = st.one_of(
    st.builds(SymlinkNode, targets),
    st.tuples(st.binary(max_size=4), st.integers(0, 2**64 - 1), st.booleans()),  # A file: contents, size, executable.
    st.integers(0, 5),  # One of the directories before this one.
)
# Any directed acyclic graph of directories, whatever the scheme: children first.
graphs = st.lists(st.dictionaries(names, entries, max_size=5), min_size=1, max_size=6)


def directories_of(graph: list[dict[bytes, Node | tuple[bytes, int, bool] | int]], scheme: Scheme) -> list[Directory]:
    made: list[Directory] = []

    def node(entry: Node | tuple[bytes, int, bool] | int) -> Node:
        if isinstance(entry, int):
            return node_of(scheme, made[entry % len(made)]) if made else SymlinkNode(b"none")
        if isinstance(entry, tuple):
            contents, size, executable = entry
            return FileNode(scheme.digest_of(contents), size, executable)
        return entry

    for named in graph:
        made += [Directory.of((name, node(entry)) for name, entry in named.items())]
    return made


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(graph=graphs)
async def test_any_tree_survives(
    directories: DirectoryService, graph: list[dict[bytes, Node | tuple[bytes, int, bool] | int]]
) -> None:
    made = directories_of(graph, directories.scheme)
    root = await directories.put(made)
    brought = {digest_of(directories.scheme, directory): directory for directory in made}
    found = {digest: directory async for digest, directory in directories.closure(root)}
    assert found[root] == made[-1]
    assert found.items() <= brought.items()
