import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from kiln.castore.errors import ExportFailed
from kiln.castore.local.store import LocalStore
from kiln.castore.model import FileNode, Node, SymlinkNode


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    opened = LocalStore.open(str(tmp_path / "store"))
    yield opened
    opened.close()


async def planted(store: LocalStore, tmp_path: Path) -> Node:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "file").write_bytes(b"contents")
    (tree / "run").write_bytes(b"contents")
    (tree / "run").chmod(0o755)
    (tree / "link").symlink_to("/nowhere")
    return (await store.ingest(str(tree))).node


async def test_an_exported_directory_is_the_users_own(store: LocalStore, tmp_path: Path) -> None:
    node = await planted(store, tmp_path)
    out = tmp_path / "out"
    await store.export(node, str(out))
    modes = {
        str(p.relative_to(out)): stat.S_IMODE(p.stat().st_mode) for p in [out, *out.rglob("*")] if not p.is_symlink()
    }
    assert modes == {".": 0o755, "sub": 0o755, "sub/file": 0o644, "run": 0o755}
    assert os.readlink(out / "link") == "/nowhere"
    (out / "sub" / "file").write_bytes(b"changed")
    assert await store.fsck() == []
    await store.stage([node])  # type: ignore[list-item]
    assert (await store.ingest(str(tmp_path / "tree"))).node == node


@pytest.mark.parametrize("kind", ["nothing", "file", "link", "directory"])
async def test_what_stands_there_is_replaced(kind: str, store: LocalStore, tmp_path: Path) -> None:
    directory = await planted(store, tmp_path)
    file = await store.add_blob(b"data")
    (tmp_path / "kept").write_bytes(b"kept")
    for number, node in enumerate((directory, file, FileNode(file.digest, 4, executable=True), SymlinkNode(b"target"))):
        out = tmp_path / f"out{number}"
        match kind:
            case "file":
                out.write_bytes(b"old")
            case "link":
                out.symlink_to(tmp_path / "kept")
            case "directory":
                (out / "old").mkdir(parents=True)
        await store.export(node, str(out))
        assert (await store.ingest(str(out))).node == node
        assert not out.joinpath("old").exists()
    assert (tmp_path / "kept").read_bytes() == b"kept"
    assert [name for name in os.listdir(tmp_path) if name.startswith(".kiln")] == []


async def test_a_destination_that_cannot_be_written_is_named(store: LocalStore, tmp_path: Path) -> None:
    node = await planted(store, tmp_path)
    for destination in (tmp_path / "no" / "parent", tmp_path / ("n" * 256), Path("/")):
        with pytest.raises(ExportFailed):
            await store.export(node, str(destination))
    assert [name for name in os.listdir(tmp_path) if name.startswith(".kiln")] == []
