"""What the local store promises beyond the suites of its services."""

# ruff: noqa: ASYNC221 - A test keeps nobody waiting.

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kiln.castore.errors import (
    BlobNotFound,
    ContentMissing,
    DigestMismatch,
    StoreCorrupt,
    StoreFull,
    StoreNotFound,
    StoreReadOnly,
    StoreSchemeDiffers,
)
from kiln.castore.local.database import BuildRow
from kiln.castore.local.session import Unflushed, boot_id
from kiln.castore.local.store import LocalStore
from kiln.castore.model import (
    BLAKE3_DOCUMENTED,
    BLAKE3_DOUBLED,
    SCHEMES,
    Digest,
    Directory,
    DirectoryNode,
    FileNode,
    Scheme,
    SymlinkNode,
)

MIB = 1024 * 1024


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    opened = LocalStore.open(str(tmp_path / "store"))
    yield opened
    opened.close()


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def read(store: LocalStore, digest: Digest) -> bytes:
    return b"".join([chunk async for chunk in store.blobs.read(digest)])


def blob_path(store: LocalStore, digest: Digest, *, executable: bool = False) -> Path:
    text = str(digest)
    return Path(store.path, "blobs", text[:2], text[2:] + (".x" if executable else ""))


def overwrite(path: Path, data: bytes) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(0o600)
    path.write_bytes(data)
    path.chmod(mode)
    os.utime(path, ns=(10**9, 10**9))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
async def test_a_scheme_is_chosen_once(scheme: Scheme, tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    LocalStore.open(path, scheme=scheme).close()
    again = LocalStore.open(path)
    assert again.scheme is scheme
    assert await again.blobs.has(scheme.empty)
    again.close()
    other = BLAKE3_DOCUMENTED if scheme is BLAKE3_DOUBLED else BLAKE3_DOUBLED
    with pytest.raises(StoreSchemeDiffers) as caught:
        LocalStore.open(path, scheme=other)
    assert scheme.name in str(caught.value)
    assert other.name in str(caught.value)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound):
        LocalStore.open(str(tmp_path / "no" / "parent"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreNotFound):
        LocalStore.open(str(tmp_path / "file"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_bytes(b"")
    with pytest.raises(StoreNotFound):
        LocalStore.open(str(tmp_path / "full"))
    assert os.listdir(tmp_path / "full") == ["thesis.tex"]


@pytest.mark.parametrize("damage", [b"no database at all" * 100, None], ids=["overwritten", "torn"])
async def test_a_corrupt_database_is_named(damage: bytes | None, tmp_path: Path) -> None:
    store = LocalStore.open(str(tmp_path / "store"))
    for number in range(500):
        await store.directories.put([Directory.of([(b"n%d" % number, SymlinkNode(b"t" * 500))])])
    store.close()
    database = tmp_path / "store" / "db.sqlite"
    whole = database.read_bytes()
    database.write_bytes(damage if damage is not None else whole[:4096] + os.urandom(len(whole) - 4096))

    async def check() -> None:
        with closing(LocalStore.open(str(tmp_path / "store"))) as reopened:
            await reopened.fsck()

    with pytest.raises(StoreCorrupt) as caught:
        await check()
    assert str(database) in str(caught.value)
    assert caught.value.remedy


async def test_blobs_of_any_size_survive(store: LocalStore) -> None:
    for size in (0, 1, 65536, 65537, MIB - 1, MIB, MIB + 1, 3 * MIB):
        data = os.urandom(size)
        digest = await store.blobs.write(chunks(*[data[i : i + 100_000] for i in range(0, size, 100_000)]))
        assert digest == store.scheme.digest_of(data)
        assert await read(store, digest) == data
        status = blob_path(store, digest).stat()
        assert stat.S_IMODE(status.st_mode) == 0o444
        assert status.st_mtime_ns == 10**9
    assert os.listdir(store.tmp_dir) == ["since"]


@pytest.mark.parametrize("size", [100, 3 * MIB])
async def test_a_damaged_blob_is_never_handed_on(size: int, store: LocalStore) -> None:
    data = os.urandom(size)
    digest = await store.blobs.write(chunks(data))
    overwrite(blob_path(store, digest), data[:-1] + bytes([data[-1] ^ 1]))
    seen: list[bytes] = []

    async def receive() -> None:
        async for chunk in store.blobs.read(digest):
            seen.append(chunk)  # noqa: PERF401 - What came before the error counts.

    with pytest.raises(DigestMismatch):
        await receive()
    assert sum(map(len, seen)) < size
    [damage] = await store.fsck()
    assert str(digest)[2:] in damage.what
    await store.fsck(repair=True)
    assert await store.fsck() == []
    with pytest.raises(BlobNotFound):
        await read(store, digest)


async def test_a_damaged_directory_is_never_handed_on(store: LocalStore) -> None:
    child = Directory.of([(b"a", SymlinkNode(b"b"))])
    child_digest = await store.directories.put([child])
    parent = await store.directories.put([Directory.of([(b"c", DirectoryNode(child_digest, 2))])])
    store._database.write("update directories set body = ? where digest = ?", [(b"", child_digest.raw)])
    with pytest.raises(DigestMismatch):
        await store.directories.get(child_digest)
    assert len(await store.fsck(repair=True)) == 2
    assert await store.directories.missing([parent, child_digest]) == {parent, child_digest}
    assert await store.fsck() == []


async def planted(store: LocalStore, tmp_path: Path) -> DirectoryNode:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    for name in ("a", "b", "sub/c"):
        (tree / name).write_bytes(b"same")
    (tree / "run").write_bytes(b"same")
    (tree / "run").chmod(0o755)
    (tree / "sub" / "link").symlink_to("../a")
    node = (await store.ingest(str(tree))).node
    assert isinstance(node, DirectoryNode)
    return node


async def test_staged_trees_are_sealed_and_share_no_inode_within(store: LocalStore, tmp_path: Path) -> None:
    node = await planted(store, tmp_path)
    [path] = await store.stage([node])
    tree = Path(path)
    everything = [tree, *tree.rglob("*")]
    statuses = [entry.lstat() for entry in everything]
    assert {status.st_mtime_ns for status in statuses} == {10**9}
    assert len({status.st_ino for status in statuses}) == len(statuses) == 7
    modes = {entry.name: stat.S_IMODE(entry.lstat().st_mode) for entry in everything if not entry.is_symlink()}
    assert {modes[name] for name in ("a", "b", "c")} == {0o444}
    assert modes["run"] == modes["sub"] == 0o555
    assert os.readlink(tree / "sub" / "link") == "../a"
    blobs = {blob_path(store, store.scheme.digest_of(b"same"), executable=x).stat().st_ino for x in (False, True)}
    assert blobs <= {status.st_ino for status in statuses}


async def test_files_are_staged_as_the_wanted_twin(store: LocalStore) -> None:
    plain = await store.add_blob(b"tool")
    [a, b] = await store.stage([plain, FileNode(plain.digest, plain.size, executable=True)])
    assert (stat.S_IMODE(os.stat(a).st_mode), stat.S_IMODE(os.stat(b).st_mode)) == (0o444, 0o555)
    assert os.stat(a).st_ino != os.stat(b).st_ino
    assert Path(b).read_bytes() == b"tool"
    blob_path(store, plain.digest).unlink()
    assert await read(store, plain.digest) == b"tool"  # From the twin.


async def test_all_that_is_missing_is_in_one_error(store: LocalStore, tmp_path: Path) -> None:
    node = await planted(store, tmp_path)
    gone = store.scheme.digest_of(b"same")
    for executable in (False, True):
        blob_path(store, gone, executable=executable).unlink()
    absent = DirectoryNode(Digest(bytes(32)), 7)
    lone = FileNode(Digest(b"\1" * 32), 1)
    with pytest.raises(ContentMissing) as caught:
        await store.stage([absent, node, lone])
    assert caught.value.blobs == {gone, lone.digest}
    assert caught.value.directories == {absent.digest}
    with pytest.raises(ContentMissing):
        await store.export(node, str(tmp_path / "exported"))
    assert not (tmp_path / "exported").exists()
    assert os.listdir(store.tmp_dir) == ["since"]
    assert not list(Path(store.path, "trees").glob("*/*"))


async def test_damaged_trees_are_found_and_dropped(store: LocalStore, tmp_path: Path) -> None:
    node = await planted(store, tmp_path)

    def rewrite(tree: Path) -> None:
        overwrite(max((tree / "a", tree / "b"), key=lambda path: path.stat().st_nlink == 1), b"evil")

    for damage in (
        rewrite,
        lambda tree: (tree / "sub" / "new").write_bytes(b""),
        lambda tree: (tree / "run").unlink(),
        lambda tree: (tree / "sub").chmod(0o755),
        lambda tree: os.utime(tree / "b", ns=(0, 0)),
    ):
        [tree] = await store.stage([node])
        damage(Path(tree))
        assert [found.what for found in await store.fsck() if found.what.startswith("trees/")] == [
            tree[len(store.path) + 1 :]
        ]
        await store.fsck(repair=True)
        assert await store.fsck() == []
        assert not os.path.exists(tree)


def run(program: str, *args: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", program, *args], stdout=subprocess.PIPE, text=True)


RACER = """
import asyncio, sys
from kiln.castore.local.store import LocalStore
async def main():
    store = LocalStore.open(sys.argv[1])
    found = await store.ingest(sys.argv[2])
    [path] = await store.stage([found.node])
    print(path)
    store.close()
asyncio.run(main())
"""


async def test_processes_that_make_open_fill_and_stage_one_store_do_not_disturb_each_other(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for top in range(5):
        (source / f"d{top}").mkdir(parents=True)
        for number in range(60):
            (source / f"d{top}" / f"f{number}").write_bytes(b"%d" % (number // 2))
    racers = [run(RACER, str(tmp_path / "store"), str(source)) for _ in range(4)]
    paths = {racer.communicate()[0] for racer in racers}
    assert [racer.returncode for racer in racers] == [0] * 4
    assert len(paths) == 1
    store = LocalStore.open(str(tmp_path / "store"))
    assert await store.fsck() == []
    assert os.listdir(tmp_path / "store" / "tmp") == []
    store.close()


async def test_opening_a_store_leaves_the_sessions_of_the_living_alone(store: LocalStore, tmp_path: Path) -> None:
    await store.add_blob(b"first")
    other = LocalStore.open(store.path)
    await other.add_blob(b"second")
    other.close()
    assert await store.blobs.has((await store.add_blob(b"third")).digest)
    await planted(store, tmp_path)
    assert os.listdir(tmp_path / "store" / "tmp") == [os.path.basename(store.tmp_dir)]


VICTIM = """
import asyncio, itertools, os, sys
from kiln.castore.local.store import LocalStore
async def main():
    store = LocalStore.open(sys.argv[1])
    print("open", flush=True)
    for turn in itertools.count():
        with open(sys.argv[2] + "/d0/turn", "w") as file:
            file.write(str(turn))
        found = await store.ingest(sys.argv[2])
        await store.stage([found.node])
        os.system(f"rm -rf {sys.argv[2]}-out; cp -r {sys.argv[2]} {sys.argv[2]}-out")
        await store.ingest(sys.argv[2] + "-out", adopt=True)
asyncio.run(main())
"""


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.15, 0.4])
async def test_a_kill_leaves_a_store_that_is_clean_when_next_opened(delay_s: float, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for top in range(4):
        (source / f"d{top}").mkdir(parents=True)
        for number in range(100):
            (source / f"d{top}" / f"f{number}").write_bytes(os.urandom(100))
    victim = run(VICTIM, str(tmp_path / "store"), str(source))
    assert victim.stdout is not None
    victim.stdout.readline()
    await asyncio.sleep(delay_s)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    victim.stdout.close()
    store = LocalStore.open(str(tmp_path / "store"))
    assert await store.fsck() == []
    mine = store._open_session().name
    assert os.listdir(tmp_path / "store" / "tmp") == [mine]
    store.close()
    assert os.listdir(tmp_path / "store" / "tmp") == []


async def crashed(tmp_path: Path, boot: str, since: float) -> tuple[LocalStore, DirectoryNode, Digest]:
    """A store whose last user was not able to flush; one blob in it is torn, and a tree is checked out."""
    store = LocalStore.open(str(tmp_path / "store"))
    node = await planted(store, tmp_path)
    await store.stage([node])
    torn = await store.blobs.write(chunks(b"torn"))
    overwrite(blob_path(store, torn), b"")
    store.close()
    left = tmp_path / "store" / "tmp" / "1-dead"
    left.mkdir()
    (left / "since").write_bytes(Unflushed(boot, since).encode())
    return LocalStore.open(str(tmp_path / "store")), node, torn


async def test_after_a_crash_of_the_machine_torn_blobs_are_dropped(tmp_path: Path) -> None:
    store, node, torn = await crashed(tmp_path, "another-boot", 0.0)
    assert await store.blobs.missing([torn, store.scheme.digest_of(b"same")]) == {torn}
    assert not list(Path(store.path, "trees").glob("*/*"))
    await store.stage([node])
    assert await store.fsck() == []
    store.close()


async def test_only_what_was_written_since_the_last_flush_is_checked(tmp_path: Path) -> None:
    store, _, torn = await crashed(tmp_path, "another-boot", (tmp_path.stat().st_ctime) + 3600)
    assert await store.blobs.has(torn)
    assert len(list(Path(store.path, "trees").glob("*/*"))) == 1
    store.close()


async def test_after_a_kill_nothing_is_checked_but_the_date_is_taken_over(tmp_path: Path) -> None:
    store, _, torn = await crashed(tmp_path, boot_id(), 12.5)
    assert await store.blobs.has(torn)
    assert store._open_session().since == 12.5
    assert Unflushed.decode(Path(store.tmp_dir, "since").read_bytes()) == Unflushed(boot_id(), 12.5)
    store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


@needs_root
@pytest.mark.parametrize("files", [1, 8000], ids=["one large file", "many small files"])
async def test_a_full_disk_leaves_nothing_half_done(files: int, small_disk: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(files):
        (source / f"f{number}").write_bytes(os.urandom(8 * MIB // files))
    store = LocalStore.open(str(small_disk / "store"))
    with pytest.raises(StoreFull) as caught:
        await store.ingest(str(source))
    assert store.path in str(caught.value)
    with pytest.raises(StoreFull):
        await store.blobs.write(chunks(*[os.urandom(MIB) for _ in range(8)]))
    assert os.listdir(store.tmp_dir) == ["since"]
    assert await store.fsck() == []
    store.close()


@needs_root
async def test_adopting_from_another_file_system_copies_and_removes(
    small_disk: Path, tmp_path: Path, store: LocalStore
) -> None:
    (small_disk / "out" / "sub").mkdir(parents=True)
    (small_disk / "out" / "sub" / "file").write_bytes(b"contents")
    node = (await store.ingest(str(small_disk / "out"), adopt=True)).node
    assert not (small_disk / "out").exists()
    await store.export(node, str(tmp_path / "exported"))
    assert (tmp_path / "exported" / "sub" / "file").read_bytes() == b"contents"


@needs_root
async def test_a_read_only_store_opens_for_reading(small_disk: Path, tmp_path: Path) -> None:
    path = str(small_disk / "store")
    store = LocalStore.open(path)
    node = await planted(store, tmp_path)
    digest = await store.blobs.write(chunks(b"kept"))
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    store = LocalStore.open(path)
    assert await read(store, digest) == b"kept"
    assert len([entry async for entry in store.directories.closure(node.digest)]) == 2
    assert await store.fsck() == []
    await store.export(node, str(tmp_path / "exported"))
    for write in (
        store.blobs.write(chunks(b"new")),
        store.add_blob(b"new"),
        store.directories.put([Directory()]),
        store.ingest(str(tmp_path / "exported")),
        store.stage([node]),
        store.fsck(repair=True),
    ):
        with pytest.raises(StoreReadOnly):
            await write
    store.close()


def test_results_and_builds(store: LocalStore) -> None:
    assert store.results.get(b"key") is None
    store.results.put(b"key", b"one")
    store.results.put(b"key", b"two")
    assert store.results.get(b"key") == b"two"
    store.results.delete(b"key")
    assert store.results.get(b"key") is None
    rows = [BuildRow(f"ab{n}", float(n // 2), b"d", None if n == 3 else 9.0, "l", b"r%d" % n) for n in range(5)]
    for row in rows:
        store.builds.put(row)
    assert store.builds.get("ab2") == rows[2]
    assert store.builds.with_prefix("ab") == rows
    assert store.builds.with_prefix("a%") == []
    assert store.builds.running() == [rows[3]]
    page = store.builds.newest(limit=2)
    assert page + store.builds.newest(limit=9, before=page[-1]) == rows[::-1]
    store.builds.delete("ab2")
    assert store.builds.get("ab2") is None


async def test_a_strict_store_works_the_same(tmp_path: Path) -> None:
    store = LocalStore.open(str(tmp_path / "store"), durability="strict")
    node = await planted(store, tmp_path)
    await store.stage([node])
    await store.blobs.write(chunks(b"x" * 2 * MIB))
    await store.add_blob(b"y")
    assert store._database.row("pragma synchronous") == (2,)
    assert await store.fsck() == []
    store.close()


async def test_disk_usage_counts_each_inode_once(store: LocalStore, tmp_path: Path) -> None:
    await store.blobs.write(chunks(b"x" * 8 * MIB))
    node = (await store.ingest(str(tmp_path / "store" / "blobs"))).node
    assert isinstance(node, DirectoryNode)
    await store.stage([node])
    usage = await store.du()
    assert (usage.blobs, usage.trees) == (2, 1)
    assert 8 * MIB <= usage.blob_bytes < 9 * MIB
    assert usage.tree_bytes < MIB
    assert usage.database_bytes > 0


def test_the_database_waits_for_other_writers(store: LocalStore) -> None:
    with sqlite3.connect(f"{store.path}/db.sqlite") as other:
        assert other.execute("pragma journal_mode").fetchone() == ("wal",)
