"""Stores and files that do not work as they should: what the person reads, and what is left."""

import io
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
FAILS = ("run", "--sh", "--", "/bin/sh", "-c", "echo its log; exit 1")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


@pytest.fixture
def read_only(store: Path) -> Iterator[Callable[[], None]]:
    """Makes the store read-only, also for root."""

    def make() -> None:
        store.chmod(0o500)
        if os.geteuid() == 0:
            subprocess.run(["mount", "--bind", store, store], check=True)
            subprocess.run(["mount", "-o", "remount,ro,bind", store], check=True)

    yield make
    if os.geteuid() == 0:
        subprocess.run(["umount", store], check=True)
    store.chmod(0o700)


def test_a_read_only_store_is_still_there_to_be_read(kiln: Run, store: Path, read_only: Callable[[], None]) -> None:
    assert kiln(*FAILS).code == 1
    read_only()
    build_id = kiln("builds").text.split()[0]
    assert kiln("log", build_id).text == "its log\n"
    assert "command_failed" in kiln("show", build_id).text
    assert kiln("watch", build_id).code == 1
    for refused in (FAILS, ("store", "import", "/etc/passwd"), ("shell", build_id), ("store", "fsck", "--repair")):
        outcome = kiln(*refused)
        assert outcome.code == 5, outcome.said
        assert len(outcome.said.splitlines()) == 1
        assert f'the store at "{store}" cannot be written' in outcome.said
    doctor = kiln("doctor")
    assert doctor.code == 1
    assert "cannot be written" in doctor.text


def fill(file: io.FileIO) -> None:
    while file.write(bytes(4096)):
        pass


@needs_root
def test_a_full_disk_is_called_full(kiln: Run, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True)
    try:
        store = ("--store", disk / "store")
        assert kiln(*store, "run", "--sh", "--", "/bin/sh", "-c", ":").code == 0
        with (disk / "rest").open("wb", buffering=0) as rest, pytest.raises(OSError, match="No space"):
            fill(rest)
        outcome = kiln(*store, *FAILS)
        assert outcome.code == 5, outcome.said
        assert "no room for the store" in outcome.said
        assert "damaged" not in outcome.said
        (disk / "rest").unlink()
        assert kiln(*store, *FAILS).code == 1
        assert kiln(*store, "store", "fsck").code == 0
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_events_that_find_no_room_are_an_error_that_names_their_file(kiln: Run) -> None:
    outcome = kiln("--events", "/dev/full", *FAILS)
    assert outcome.code == 4, outcome.said
    assert outcome.said.splitlines()[-1] == "kiln: cannot write events to /dev/full: No space left on device"
    assert "kiln watch" not in outcome.said


def test_a_damaged_blob_is_not_exported_and_the_remedy_is_named(kiln: Run, store: Path, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(b"right")
    node = kiln("store", "import", "tree").text
    digest = kiln("store", "stat", node, "file").text.split()[1]
    blob = store / "blobs" / digest[:2] / digest[2:]
    blob.chmod(0o644)
    blob.write_bytes(b"wrong")
    for refused in (("export", node, "out"), ("cat", node, "file")):
        outcome = kiln("store", *refused)
        assert outcome.code == 5, outcome.said
        assert digest in outcome.said
        assert "fsck --repair" in outcome.said
        assert outcome.out == b""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "tree"]
    found = kiln("store", "fsck")
    assert found.code == 1
    assert found.said.splitlines()[-1].endswith(f"kiln --store {store} store fsck --repair")


def test_the_file_at_the_end_of_a_long_path_is_named(kiln: Run, tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["directory"] * 30)
    deep.mkdir(parents=True)
    os.mkfifo(deep / "the-fifo")
    outcome = kiln("store", "import", tmp_path / "directory")
    assert outcome.code == 3, outcome.said
    assert "directory/the-fifo" in outcome.said


@pytest.mark.parametrize("typed", ["tree", "tree/", "./tree/same"])
def test_what_cannot_be_imported_is_named_by_its_whole_path(kiln: Run, tmp_path: Path, typed: str) -> None:
    (tmp_path / "tree").mkdir()
    os.mkfifo(tmp_path / "tree" / "same")
    outcome = kiln("store", "import", typed)
    assert outcome.code == 3, outcome.said
    assert "tree/same" in outcome.said
    assert kiln("run", "-i", f"x={typed}", "--", "/x").said == outcome.said


def test_nothing_is_not_the_working_directory(kiln: Run) -> None:
    assert kiln("store", "import", "").code == 4


def test_a_host_without_bubblewrap_can_build_nothing(
    kiln: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = kiln(*FAILS)
    assert outcome.code == 4, outcome.said
    assert "install bubblewrap" in outcome.said
    assert kiln("doctor").code == 1


def test_what_never_ran_has_no_log_to_go_on_with(kiln: Run) -> None:
    outcome = kiln("run", "--net", "--", "/bin/true")
    assert outcome.code == 4
    assert "to go on" not in outcome.said
