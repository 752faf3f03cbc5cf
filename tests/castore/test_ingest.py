import asyncio
import hashlib
import json
import os
import socket
import stat
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from kiln.castore.dirfd import remove_tree
from kiln.castore.errors import (
    IngestChanged,
    IngestDenied,
    IngestNotFound,
    IngestRefused,
)
from kiln.castore.ingest import Ownership, Stopped, Walker
from kiln.castore.local.fsck import check
from kiln.castore.local.store import LocalStore
from kiln.castore.model import (
    BLAKE3_DOCUMENTED,
    BLAKE3_DOUBLED,
    SCHEMES,
    Digest,
    DirectoryNode,
    FileNode,
    Node,
    Scheme,
    SymlinkNode,
)

GOLDEN: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent.parent / "golden" / "castore.json").read_text(encoding="utf-8")
)["trees"]
MODES = [False, True]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    opened = LocalStore.open(str(tmp_path / "store"))
    yield opened
    opened.close()


def contents(spec: dict[str, Any]) -> bytes:
    match spec["kind"]:
        case "literal":
            return bytes.fromhex(spec["hex"])
        case "repeat":
            pattern = bytes.fromhex(spec["pattern_hex"])
            return bytes((pattern * (spec["length"] // len(pattern) + 1))[: spec["length"]])
        case "mod251":
            return bytes(index % 251 for index in range(spec["length"]))
        case "sha256-counter":
            seed, out, count = spec["seed"].encode(), bytearray(), 0
            while len(out) < spec["length"]:
                out += hashlib.sha256(seed + count.to_bytes(8, "little")).digest()
                count += 1
            return bytes(out[: spec["length"]])
        case other:
            raise AssertionError(other)


def write_golden(tree: dict[str, Any], where: Path) -> None:
    for entry in sorted(tree["entries"], key=lambda entry: bytes.fromhex(entry["path_hex"])):
        path = os.path.join(os.fsencode(where), bytes.fromhex(entry["path_hex"])).rstrip(b"/")
        match entry["type"]:
            case "directory":
                os.mkdir(path)
            case "symlink":
                os.symlink(bytes.fromhex(entry["target_hex"]), path)
            case "file":
                Path(os.fsdecode(path)).write_bytes(contents(entry["content"]))
                os.chmod(path, 0o755 if entry["executable"] else 0o644)


def golden_node(tree: dict[str, Any]) -> tuple[str, str | None, int | None]:
    root = tree["root"]
    return root["type"], root.get("digest"), root.get("size")


def described(node: Node) -> tuple[str, str | None, int | None]:
    match node:
        case DirectoryNode(digest, size):
            return "directory", str(digest), size
        case FileNode(digest, size, _):
            return "file", str(digest), size
        case SymlinkNode():
            return "symlink", None, None


@pytest.mark.parametrize("adopt", MODES, ids=["copied", "adopted"])
@pytest.mark.parametrize("tree", GOLDEN, ids=lambda tree: tree["name"])
async def test_trees_of_real_snix_get_its_digests(
    tree: dict[str, Any], adopt: bool, store: LocalStore, tmp_path: Path
) -> None:
    write_golden(tree, tmp_path / "tree")
    found = await store.ingest(str(tmp_path / "tree"), adopt=adopt)
    assert described(found.node) == golden_node(tree)
    assert os.path.lexists(tmp_path / "tree") is not adopt
    for blob in tree["blobs"]:
        assert await store.blobs.has(Digest(bytes.fromhex(blob["digest"])))
    assert await store.fsck() == []


@pytest.mark.parametrize("tree", [t for t in GOLDEN if "documented_size" in t], ids=lambda tree: tree["name"])
async def test_documented_sizes_count_once(tree: dict[str, Any], tmp_path: Path) -> None:
    write_golden(tree, tmp_path / "tree")
    store = LocalStore.open(str(tmp_path / "documented"), scheme=BLAKE3_DOCUMENTED)
    node = (await store.ingest(str(tmp_path / "tree"))).node
    store.close()
    assert isinstance(node, DirectoryNode)
    assert node.size == tree["documented_size"]


def plant(where: Path) -> Path:
    """A tree with everything in it that may be in one."""
    (where / "sub" / "deep").mkdir(parents=True)
    (where / "a").write_bytes(b"same")
    (where / "b").write_bytes(b"same")
    (where / "run").write_bytes(b"same")
    (where / "run").chmod(0o711)
    os.link(where / "a", where / "hard")
    (where / "sub" / "large").write_bytes(os.urandom(3 * 1024 * 1024 + 1))
    (where / "sub" / "deep" / "empty").write_bytes(b"")
    (where / "sub" / "link").symlink_to("/etc/passwd")
    Path(os.fsdecode(os.fsencode(where) + b"/new\nline\x1b[31m\xff")).write_bytes(b"odd")
    return where


def snapshot(where: Path) -> list[tuple[str, int, int, int, int]]:
    statuses = [(str(path), path.lstat()) for path in sorted([where, *where.rglob("*")])]
    return [(path, s.st_mode, s.st_ino, s.st_mtime_ns, s.st_nlink) for path, s in statuses]


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
async def test_copied_and_adopted_trees_are_equal(scheme: Scheme, tmp_path: Path) -> None:
    store = LocalStore.open(str(tmp_path / "s"), scheme=scheme)
    source = plant(tmp_path / "tree")
    before = snapshot(source)
    copied = await store.ingest(str(source))
    assert snapshot(source) == before
    assert not list(Path(store.path, "trees").glob("*/*"))
    adopted = await store.ingest(str(source), adopt=True)
    assert adopted == copied
    assert (copied.files, copied.bytes) == (7, 4 * 4 + 3 * 1024 * 1024 + 1 + 3)
    assert not source.exists()
    assert await store.fsck() == []
    store.close()


async def test_an_adopted_tree_is_sealed_and_shares_no_inode_within(tmp_path: Path, store: LocalStore) -> None:
    source = plant(tmp_path / "tree")
    large = (source / "sub" / "large").stat().st_ino
    os.setxattr(source / "a", "user.kiln", b"x")
    os.setxattr(source / "sub", "user.kiln", b"x")
    os.chown(source / "b", 70001, 70001)
    node = (await store.ingest(str(source), adopt=True)).node
    assert isinstance(node, DirectoryNode)
    [tree] = map(Path, await store.stage([node]))
    statuses = {str(path.relative_to(tree)): path.lstat() for path in [tree, *tree.rglob("*")]}
    for status in statuses.values():
        assert status.st_mtime_ns == 1_000_000_000
        assert (status.st_uid, status.st_gid) == (os.geteuid(), os.getegid())
        if stat.S_ISDIR(status.st_mode):
            assert stat.S_IMODE(status.st_mode) == 0o555
        elif stat.S_ISREG(status.st_mode):
            assert stat.S_IMODE(status.st_mode) in {0o444, 0o555}
    assert stat.S_IMODE(statuses["run"].st_mode) == 0o555
    assert len({status.st_ino for status in statuses.values()}) == len(statuses)
    assert statuses["sub/large"].st_ino == large  # Adopted, not copied.
    assert os.listxattr(tree / "a") == os.listxattr(tree / "sub") == []


async def test_a_second_equal_output_shares_the_first_ones_inodes(tmp_path: Path, store: LocalStore) -> None:
    inodes = []
    for name, other in (("one", b"1"), ("two", b"2")):
        source = tmp_path / name
        source.mkdir()
        (source / "shared").write_bytes(b"contents")
        (source / "other").write_bytes(other)
        node = (await store.ingest(str(source), adopt=True)).node
        assert isinstance(node, DirectoryNode)
        [tree] = await store.stage([node])
        inodes.append(os.stat(f"{tree}/shared").st_ino)
    assert inodes[0] == inodes[1]


async def test_a_file_with_a_name_outside_the_output_is_copied(tmp_path: Path, store: LocalStore) -> None:
    source = tmp_path / "tree"
    source.mkdir()
    (source / "file").write_bytes(b"contents")
    os.link(source / "file", tmp_path / "accomplice")
    node = (await store.ingest(str(source), adopt=True)).node
    assert isinstance(node, DirectoryNode)
    (tmp_path / "accomplice").write_bytes(b"poisoned")
    [tree] = await store.stage([node])
    assert Path(tree, "file").read_bytes() == b"contents"
    assert await store.fsck() == []


@pytest.mark.parametrize("adopt", MODES, ids=["copied", "adopted"])
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (os.mkfifo, "a fifo"),
        (lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)), "a character device"),
        (lambda path: os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(7, 99)), "a block device"),
        (lambda path: socket.socket(socket.AF_UNIX).bind(path), "a socket"),
    ],
    ids=["fifo", "char", "block", "socket"],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_special_files_are_refused_by_path(
    make: Any, why: str, adopt: bool, tmp_path: Path, store: LocalStore
) -> None:
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    make(str(tmp_path / "tree" / "sub" / "x\x1b"))
    with pytest.raises(IngestRefused) as caught:
        await store.ingest(str(tmp_path / "tree"), adopt=adopt)
    assert (caught.value.path, caught.value.why) == (b"sub/x\x1b", why)
    assert "\x1b" not in str(caught.value)
    with pytest.raises(IngestRefused):
        await store.ingest(str(tmp_path / "tree" / "sub" / "x\x1b"), adopt=adopt)


@pytest.mark.parametrize("bit", [stat.S_ISUID, stat.S_ISGID])
async def test_setuid_and_setgid_files_may_not_leave_a_build(bit: int, tmp_path: Path, store: LocalStore) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "su").write_bytes(b"")
    (tmp_path / "tree" / "su").chmod(0o755 | bit)
    assert (await store.ingest(str(tmp_path / "tree"))).files == 1
    for adopt in MODES:
        with pytest.raises(IngestRefused):
            await store.ingest(str(tmp_path / "tree"), adopt=adopt, take_over=True)


async def test_what_is_not_there_is_named(tmp_path: Path, store: LocalStore) -> None:
    for adopt in MODES:
        with pytest.raises(IngestNotFound):
            await store.ingest(str(tmp_path / "nothing"), adopt=adopt)
    with pytest.raises(IngestNotFound):
        await store.ingest(str(tmp_path / ("n" * 255) / "x"))
    with pytest.raises(IngestDenied):
        await store.ingest(str(tmp_path / ("n" * 256)))


async def test_a_file_that_changes_is_refused(
    tmp_path: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "tree" / "victim"
    victim.parent.mkdir()
    real_read = os.read
    for size in (10, 2 * 1024 * 1024):
        victim.write_bytes(b"x" * size)
        for change in (lambda: victim.write_bytes(b"y" * size), lambda: victim.write_bytes(b"")):  # noqa: B023 - Runs below.

            def read(descriptor: int, length: int, change: Any = change) -> bytes:
                monkeypatch.setattr(os, "read", real_read)
                data = real_read(descriptor, length)
                os.utime(victim, ns=(5, 5))
                change()
                return data

            monkeypatch.setattr(os, "read", read)
            with pytest.raises(IngestChanged) as caught:
                await store.ingest(str(victim.parent))
            assert caught.value.path == b"victim"
    assert list(Path(store.tmp_dir).iterdir()) == [Path(store.tmp_dir) / "since"]


async def test_needles_are_sought_in_contents_targets_and_names(tmp_path: Path, store: LocalStore) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "name-NAME").write_bytes(b"..CONTENT..")
    (tree / "directory-DIR").mkdir()
    (tree / "link").symlink_to("to/TARGET/x")
    (tree / "border").write_bytes(b"x" * (1024 * 1024 - 3) + b"BORDER" + b"y" * 1024 * 1024)
    (tree / "AB").write_bytes(b"")
    (tree / "C").write_bytes(b"")
    wanted = [b"NAME", b"CONTENT", b"DIR", b"TARGET", b"BORDER", b"absent", b"O", b"ABC", b"NAME"]
    for adopt in MODES:
        found = await store.ingest(str(tree), needles=wanted, adopt=adopt)
        assert found.needles == {0, 1, 2, 3, 4, 6, 8}


async def test_a_large_tree_is_the_same_by_one_process_or_several(tmp_path: Path, store: LocalStore) -> None:
    for top in range(12):
        directory = tmp_path / "tree" / f"d{top}" / "sub"
        directory.mkdir(parents=True)
        for number in range(400):
            (directory / f"f{number}").write_bytes(b"%d" % (number % 50 + top))
    (tmp_path / "tree" / "d9" / "ref").write_bytes(b"NEEDLE")
    one = await store.ingest(str(tmp_path / "tree"), needles=[b"NEEDLE", b"none"], processes=1)
    several = await store.ingest(str(tmp_path / "tree"), needles=[b"NEEDLE", b"none"], processes=3)
    assert several == one
    assert several.needles == {0}
    assert several.files == 4801
    adopted = await store.ingest(str(tmp_path / "tree"), needles=[b"NEEDLE", b"none"], processes=3, adopt=True)
    assert adopted == one
    assert isinstance(adopted.node, DirectoryNode)
    [tree] = await store.stage([adopted.node])
    inodes = [path.stat().st_ino for path in Path(tree).rglob("*")]
    assert len(set(inodes)) == len(inodes)
    assert await store.fsck() == []


async def test_trouble_in_a_worker_is_the_callers(tmp_path: Path, store: LocalStore) -> None:
    for top in range(8):
        directory = tmp_path / "tree" / f"d{top}"
        directory.mkdir(parents=True)
        for number in range(500):
            (directory / f"f{number}").write_bytes(b"")
        os.mkfifo(directory / "sub") if top == 7 else (directory / "sub").mkdir()
    with pytest.raises(IngestRefused) as caught:
        await store.ingest(str(tmp_path / "tree"), processes=3)
    assert caught.value.path == b"d7/sub"
    assert os.listdir(store.tmp_dir) == ["since"]


def deep_tree(where: Path, levels: int, name: bytes) -> None:
    where.mkdir()
    descriptor = os.open(where, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=descriptor)
        below = os.open(name, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(os.open(b"leaf", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
    os.close(descriptor)


@pytest.mark.parametrize(("levels", "name"), [(500, b"n" * 200), (3000, b"d")])
async def test_deep_trees_work_everywhere(levels: int, name: bytes, tmp_path: Path, store: LocalStore) -> None:
    deep_tree(tmp_path / "tree", levels, name)
    copied = (await store.ingest(str(tmp_path / "tree"))).node
    assert isinstance(copied, DirectoryNode)
    assert copied.size == 2 * (levels + 1)
    await store.stage([copied])
    assert await store.fsck() == []
    await store.export(copied, str(tmp_path / "exported"))
    assert (await store.ingest(str(tmp_path / "exported"), adopt=True)).node == copied
    assert not (tmp_path / "exported").exists()
    descriptor = os.open(tmp_path, os.O_RDONLY)
    remove_tree(b"tree", dir_fd=descriptor)
    [tree] = Path(store.path, "trees").glob("*/*")
    remove_tree(os.fsencode(tree), dir_fd=descriptor)
    os.close(descriptor)
    assert not (tmp_path / "tree").exists()
    assert BLAKE3_DOUBLED is store.scheme


async def test_a_wide_directory_works_everywhere(tmp_path: Path, store: LocalStore) -> None:
    wide = tmp_path / "wide"
    wide.mkdir()
    for number in range(100_000):
        os.symlink("t", wide / f"{number:06}")
    (wide / "file").write_bytes(b"x")
    node = (await store.ingest(str(wide))).node
    assert isinstance(node, DirectoryNode)
    assert node.size == 200_002
    [tree] = await store.stage([node])
    assert len(os.listdir(tree)) == 100_001


@pytest.fixture
def shared_path() -> Iterator[Path]:
    """Like tmp_path, but other users can reach it."""
    made = Path(tempfile.mkdtemp())
    made.chmod(0o755)
    yield made
    remove_tree(os.fsencode(made), dir_fd=-1)


def as_nobody(function: Callable[[], None]) -> None:
    """Run `function` in a child process, as an unprivileged user where we are root."""
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            function()
        except BaseException:  # noqa: BLE001 - The parent sees the status, the log the traceback.
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_unreadable_path_is_named_and_opened_only_when_taken_over(shared_path: Path) -> None:
    tree = shared_path / "tree"
    secret, shut = tree / "secret", tree / "shut"

    def scenario() -> None:
        shut.mkdir(parents=True)
        (shut / "file").write_bytes(b"x")
        secret.write_bytes(b"y")
        secret.chmod(0o100)
        shut.chmod(0)
        store = LocalStore.open(str(shared_path / "store"))
        for hidden in (secret, shut):
            with pytest.raises(IngestDenied) as caught:
                store._ingest(str(tree), (), Ownership(), 1, Event())
            assert caught.value.path == hidden.name.encode()
            hidden.chmod(0o700)
        secret.chmod(0o100)
        shut.chmod(0)
        adopted = store._ingest(str(tree), (), Ownership(take_over=True, adopt=True), 1, Event())
        assert adopted.files == 2
        [path] = Path(store.path, "trees").glob("*/*")
        assert stat.S_IMODE((path / "secret").stat().st_mode) == 0o555
        assert stat.S_IMODE(path.stat().st_mode) == 0o555
        assert check(store._files, store._database, store.scheme, repair=False) == []
        store.close()

    if os.geteuid() == 0:
        os.chown(shared_path, 65534, 65534)
    as_nobody(scenario)


def test_a_walk_can_be_stopped(tmp_path: Path, store: LocalStore) -> None:
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    with pytest.raises(Stopped):
        Walker(store._writer(), store.scheme, None, Ownership(), stop=lambda: True).walk(str(tmp_path / "tree"))


async def test_a_cancelled_import_has_ended_when_the_caller_goes_on(tmp_path: Path, store: LocalStore) -> None:
    for top in range(40):
        directory = tmp_path / "tree" / f"d{top}"
        directory.mkdir(parents=True)
        for number in range(100):
            (directory / f"f{number}").write_bytes(b"%d %d" % (top, number))
    task = asyncio.create_task(store.ingest(str(tmp_path / "tree"), processes=2))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert os.listdir(store.tmp_dir) == ["since"]
    before = (await store.du()).blobs
    await asyncio.sleep(0.1)
    assert (await store.du()).blobs == before
