import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiln.castore.errors import DirectoryInvalid
from kiln.castore.model import BLAKE3_DOUBLED, Digest, Directory, DirectoryNode, FileNode, Node, SymlinkNode
from kiln.castore.wire import decode_directory, encode_directory, file_entry, symlink_entry

GOLDEN: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent.parent / "golden" / "castore.json").read_text(encoding="utf-8")
)["trees"]
DIRECTORIES = [directory for tree in GOLDEN for directory in tree["directories"]]

names = st.binary(min_size=1, max_size=255).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in {b".", b".."}
)
digests = st.binary(min_size=32, max_size=32).map(Digest)
sizes = st.integers(0, 2**64 - 1)
nodes: st.SearchStrategy[Node] = st.one_of(
    st.builds(DirectoryNode, digests, sizes),
    st.builds(FileNode, digests, sizes, st.booleans()),
    st.builds(SymlinkNode, st.binary(min_size=1, max_size=4095).filter(lambda target: b"\0" not in target)),
)
directories = st.dictionaries(names, nodes, max_size=8).map(lambda entries: Directory.of(entries.items()))


@pytest.mark.parametrize("golden", DIRECTORIES, ids=lambda golden: golden["digest"][:12])
def test_directories_of_real_snix_are_reproduced(golden: dict[str, str]) -> None:
    data = bytes.fromhex(golden["hex"])
    assert encode_directory(decode_directory(data)) == data
    assert str(BLAKE3_DOUBLED.digest_of(data)) == golden["digest"]


@given(directory=directories)
def test_every_directory_survives_the_round_trip(directory: Directory) -> None:
    assert decode_directory(encode_directory(directory)) == directory


@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_are_a_directory_or_refused(data: bytes) -> None:
    try:
        directory = decode_directory(data)
    except DirectoryInvalid:
        return
    assert encode_directory(directory) == data


@given(directory=directories, at=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_changed_byte_never_gives_the_same_directory(directory: Directory, at: int, value: int) -> None:
    data = bytearray(encode_directory(directory))
    if not data or data[at % len(data)] == value:
        return
    data[at % len(data)] = value
    with suppress(DirectoryInvalid):
        assert decode_directory(bytes(data)) != directory


A = file_entry(b"a", bytes(32), 1, executable=False)
B = file_entry(b"b", bytes(32), 1, executable=False)


@pytest.mark.parametrize(
    "data",
    [
        B + A,
        A + A,
        A + symlink_entry(b"a", b"target"),
        symlink_entry(b"b", b"target") + A,
        A + b"\x28\x01",
        A[:-1],
        b"\x12\x80\x00",
        b"\x12\x28" + A[2:] + b"\x20\x00",
        file_entry(b"x/y", bytes(32), 1, executable=False),
        file_entry(b"..", bytes(32), 1, executable=False),
        file_entry(b"", bytes(32), 1, executable=False),
        file_entry(b"n" * 256, bytes(32), 1, executable=False),
        file_entry(b"a", bytes(31) + b"\0", 0, executable=False)[:-1],
        symlink_entry(b"a", b""),
        b"\x08\x01",
        b"\xff" * 12,
    ],
    ids=[
        "unsorted",
        "repeated",
        "repeated over kinds",
        "kinds out of order",
        "unknown field",
        "cut short",
        "long varint",
        "explicit default",
        "slash",
        "dot dot",
        "no name",
        "long name",
        "short digest",
        "empty target",
        "number where a message belongs",
        "endless varint",
    ],
)
def test_what_is_not_canonical_is_refused(data: bytes) -> None:
    with pytest.raises(DirectoryInvalid):
        decode_directory(data)
