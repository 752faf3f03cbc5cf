import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    (top / "sub").mkdir(parents=True)
    (top / "sub" / "file").write_bytes(b"contents\n")
    (top / "run").write_bytes(b"#!/bin/sh\n")
    (top / "run").chmod(0o755)
    (top / "link").symlink_to("../../etc/passwd")
    return top


def test_what_goes_in_comes_out(kiln: Run, tree: Path, tmp_path: Path) -> None:
    node = kiln("store", "import", tree, "--json").text
    assert set(json.loads(node)) == {"directory"}
    assert kiln("store", "export", node, tmp_path / "out").code == 0
    assert (tmp_path / "out" / "sub" / "file").read_bytes() == b"contents\n"
    assert (tmp_path / "out" / "link").readlink() == Path("../../etc/passwd")
    assert stat.S_IMODE((tmp_path / "out" / "run").stat().st_mode) & 0o111
    assert kiln("store", "cat", node, "sub/file").out == b"contents\n"


def test_a_listing_names_everything_below(kiln: Run, tree: Path) -> None:
    node = kiln("store", "import", tree).text
    lines = kiln("store", "ls", "-R", node).text.splitlines()
    assert [line.split(maxsplit=3)[3] for line in lines] == ["link -> ../../etc/passwd", "run", "sub/", "sub/file"]
    entries = [json.loads(line) for line in kiln("store", "ls", node, "--json").text.splitlines()]
    assert [next(iter(entry)) for entry in entries] == ["symlink", "file", "directory"]


def test_a_digest_will_do_for_a_node(kiln: Run, tree: Path) -> None:
    node = kiln("store", "import", tree).text
    digest = kiln("store", "stat", node).text.split()[1]
    assert kiln("store", "ls", digest).text == kiln("store", "ls", node).text


def test_stat_says_what_is_missing(kiln: Run, tree: Path, store: Path) -> None:
    node = kiln("store", "import", tree).text
    assert kiln("store", "stat", node).code == 0
    digest = kiln("store", "stat", node, "sub/file").text.split()[1]
    (store / "blobs" / digest[:2] / digest[2:]).unlink()
    outcome = kiln("store", "stat", node, "--json")
    assert outcome.code == 4
    assert json.loads(outcome.text)["missing"] == {"blobs": [digest], "directories": []}


def test_names_are_never_raw(kiln: Run, tmp_path: Path) -> None:
    top = tmp_path / "evil"
    top.mkdir()
    (top / "a\nb\x1b[2J").write_bytes(b"")
    os.symlink(b"\x1b]0;title\x07", bytes(top / "link"))
    (top / os.fsdecode(b"\xff\xfe")).write_bytes(b"")
    node = kiln("store", "import", top).text
    shown = kiln("store", "ls", node)
    assert len(shown.text.splitlines()) == 3
    assert b"\x1b" not in shown.out
    assert b"\x1b" not in kiln("store", "cat", node, "a\nb\x1b[2J/x").err
    assert b"\x1b" not in kiln("store", "import", tmp_path / "no\x1b[2Jfile").err


def test_damage_is_found_and_repaired(kiln: Run, tree: Path, store: Path) -> None:
    node = kiln("store", "import", tree).text
    digest = kiln("store", "stat", node, "sub/file").text.split()[1]
    assert kiln("store", "fsck").code == 0
    blob = store / "blobs" / digest[:2] / digest[2:]
    blob.chmod(0o644)
    blob.write_bytes(b"CONTENTS\n")
    found = kiln("store", "fsck", "--json")
    assert found.code == 1
    assert digest[2:] in json.loads(found.text)[0]["what"]
    assert kiln("store", "fsck", "--repair").code == 1
    assert kiln("store", "fsck").code == 0


def test_du_counts(kiln: Run, tree: Path) -> None:
    kiln("store", "import", tree)
    assert json.loads(kiln("store", "du", "--json").text)["blobs"] >= 2
    assert "blobs" in kiln("store", "du").text


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["import", "absent"], 4, "absent"),
        (["import", "fifo"], 3, "fifo"),
        (["cat", "0" * 64], 4, "0" * 64),
        (["ls", '{"directory": {"digest": "AAAA"}}'], 3, "digest"),
        (["ls", '{"directory"'], 3, "line 1"),
        (["ls", "{}"], 3, "neither"),
        (["ls", "1m81p559ndz38fwc"], 3, '"1m81p559ndz38fwc" is no node'),
        (["ls", '{"file": {"digit": "AAAA"}}'], 3, "digit"),
        (["bogus"], 2, "bogus"),
        (["ls"], 2, "NODE"),
    ],
)
def test_bad_input_gets_its_exit_code_and_a_sentence(
    kiln: Run, tmp_path: Path, arguments: list[str], code: int, named: str
) -> None:
    os.mkfifo(tmp_path / "fifo")
    outcome = kiln("store", *arguments)
    assert outcome.code == code, outcome.said
    assert named in outcome.said
    assert outcome.out == b""


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("ftp://host/x", "ftp"),
        ("local:///tmp/x?colour=red", "colour"),
        ("local:///tmp/x?scheme=md5/plain", "md5/plain"),
        ("local://host/tmp/x", "absolute"),
        ("grpc+unix://", "socket"),
        ("grpc+http://nobody", "port"),
        ("memory:///path", "memory"),
    ],
)
def test_a_store_that_is_none_is_wrong_usage(kiln: Run, tmp_path: Path, url: str, named: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    outcome = kiln("--store", url, "store", "import", tmp_path / "file")
    assert outcome.code == 2, outcome.said
    assert named in outcome.said


def test_a_server_that_is_not_there_is_trouble(kiln: Run, tmp_path: Path) -> None:
    url = f"grpc+unix://{tmp_path}/nobody.sock"
    outcome = kiln("--store", url, "store", "cat", "0" * 64)
    assert outcome.code == 5, outcome.said
    assert "nobody.sock" in outcome.said


def test_a_store_elsewhere_takes_and_gives_too(kiln: Run, tree: Path) -> None:
    outcome = kiln("--store", "memory://", "store", "import", tree)
    assert set(json.loads(outcome.text)) == {"directory"}


def test_a_corrupt_database_is_trouble(kiln: Run, store: Path, tree: Path) -> None:
    kiln("store", "import", tree)
    (store / "db.sqlite").write_bytes(b"not a database at all" * 1000)
    for rest in store.glob("db.sqlite-*"):
        rest.unlink()
    outcome = kiln("store", "import", tree)
    assert outcome.code == 5, outcome.said
    assert "is damaged" in outcome.said


def test_a_directory_with_other_things_is_no_store(kiln: Run, store: Path, tree: Path) -> None:
    store.mkdir()
    (store / "thesis.txt").write_bytes(b"")
    outcome = kiln("store", "import", tree)
    assert outcome.code == 4, outcome.said
    assert list(store.iterdir()) == [store / "thesis.txt"]
