import os
from collections.abc import Iterator
from errno import EMLINK
from pathlib import Path
from typing import Any

import pytest

from kiln.castore.checkout import check_out
from kiln.castore.errors import DigestMismatch, EntriesTooMany
from kiln.castore.local.files import blob_name
from kiln.castore.local.store import LocalStore
from kiln.castore.model import Directory, DirectoryNode, FileNode


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    opened = LocalStore.open(str(tmp_path / "store"))
    yield opened
    opened.close()


async def planted(store: LocalStore) -> DirectoryNode:
    blob = await store.add_blob(b"contents")
    directory = Directory.of([(b"a", blob), (b"b", FileNode(blob.digest, blob.size, executable=True))])
    return DirectoryNode(await store.directories.put([directory]), store.scheme.size_of(directory))


async def test_an_inode_that_takes_no_more_links_is_copied(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await planted(store)

    def link(*_: Any, **__: Any) -> None:
        raise OSError(EMLINK, os.strerror(EMLINK))

    monkeypatch.setattr(os, "link", link)  # A real inode takes 65,000 links on ext4, and any number on tmpfs.
    [tree] = await store.stage([node])
    monkeypatch.undo()
    assert {os.stat(f"{tree}/{name}").st_nlink for name in "ab"} == {1}
    assert await store.fsck() == []


async def test_whoever_comes_second_drops_its_own_tree(store: LocalStore) -> None:
    node = await planted(store)
    files = store._writer()
    overtaken: list[Any] = []

    def read(digest: Any) -> Directory:
        if not overtaken:  # Somebody else begins later, and finishes first.
            overtaken.append(digest)
            check_out(node.digest, store.directories.read, store._writer(), store.scheme)
        return store.directories.read(digest)

    check_out(node.digest, read, files, store.scheme)
    assert overtaken
    assert os.listdir(store.tmp_dir) == ["since"]
    assert await store.fsck() == []


async def test_a_staged_tree_is_made_once(store: LocalStore) -> None:
    node = await planted(store)
    [first] = await store.stage([node])
    inode = os.stat(first).st_ino
    assert await store.stage([node] * 500) == [first] * 500
    assert os.stat(first).st_ino == inode


async def test_a_damaged_blob_gets_into_no_tree(store: LocalStore) -> None:
    node = await planted(store)
    blob = store.directories.read(node.digest).get(b"a")
    assert isinstance(blob, FileNode)
    path = Path(store.path, "blobs", blob_name(blob.digest.raw))
    path.chmod(0o644)
    path.write_bytes(b"CONTENTS")
    with pytest.raises(DigestMismatch, match=str(blob.digest)):
        await store.stage([node])
    with pytest.raises(DigestMismatch, match=str(blob.digest)):  # An executable twin is made from it first.
        await store.stage([FileNode(blob.digest, blob.size, executable=True)])
    assert os.listdir(store.tmp_dir) == ["since"]


async def test_a_few_directories_do_not_fill_the_disk(store: LocalStore) -> None:
    directory = Directory()
    for _ in range(40):  # 2^41 directories, written out.
        digest = await store.directories.put([directory])
        below = DirectoryNode(digest, store.scheme.size_of(directory))
        directory = Directory.of([(b"a", below), (b"b", below)])
    with pytest.raises(EntriesTooMany, match=str(below.digest)):
        await store.stage([below])
    assert os.listdir(store.tmp_dir) == ["since"]
