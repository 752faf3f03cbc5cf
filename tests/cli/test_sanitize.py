import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiln.cli.sanitize import LINE_BYTES_MAX, Lines, log_text, one_line

COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
MOVES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@given(st.text(alphabet=st.characters(exclude_categories=[])))
def test_nothing_leaves_the_line(text: str) -> None:
    shown = one_line(text)
    assert not MOVES.search(shown)
    assert len(shown.splitlines()) <= 1
    shown.encode()


@given(st.lists(st.sampled_from([b"\x1b[31m", b"\x1b[", b"\x1b[2J", b"\n", b"\r", b"a", b"\xff", b"\x9b", b"m"])))
def test_a_log_moves_no_cursor_and_colours_end_with_their_line(parts: list[bytes]) -> None:
    lines = b"".join(parts) + b"\n"
    plain, coloured = log_text(lines, colour=False), log_text(lines, colour=True)
    assert not MOVES.search(plain)
    assert not MOVES.search(COLOUR.sub("", coloured))
    assert plain.count("\n") == coloured.count("\n") == lines.count(b"\n")
    for line in coloured.split("\n"):
        assert line.endswith("\x1b[0m") or "\x1b" not in line


@pytest.mark.parametrize(
    ("line", "plain", "coloured"),
    [
        (b"plain \xc3\xa9\t.", "plain é\t.", "plain é\t."),
        (b"\x1b[31mred", "red", "\x1b[31mred\x1b[0m"),
        (b"\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        (b"10%\r20%\r", r"10%\r20%", r"10%\r20%"),
        (b"\xff\x00", r"\xff\x00", r"\xff\x00"),
        ("a\u202eb".encode(), r"a\u202eb", r"a\u202eb"),
        ("\x9b31m".encode(), r"\x9b31m", r"\x9b31m"),
    ],
)
def test_what_a_line_becomes(line: bytes, plain: str, coloured: str) -> None:
    assert log_text(line + b"\n", colour=False) == plain + "\n"
    assert log_text(line + b"\n", colour=True) == coloured + "\n"


@given(st.lists(st.binary(max_size=40).map(lambda data: data.replace(b"a", b"\n"))))
def test_lines_are_those_of_the_whole(chunks: list[bytes]) -> None:
    lines = Lines()
    found = [lines.feed(chunk) for chunk in chunks]
    assert all(not block or block.endswith(b"\n") for block in found)
    whole = b"".join(chunks)
    assert b"".join([*found, lines.end()]) == (whole + b"\n" if whole and not whole.endswith(b"\n") else whole)


def test_a_line_without_end_is_cut() -> None:
    lines = Lines()
    found = [lines.feed(b"x" * 4096) for _ in range(100)]
    assert max(map(len, found)) <= LINE_BYTES_MAX + 4096 + 1
    assert b"".join([*found, lines.end()]).replace(b"\n", b"") == b"x" * 409600
