import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiln.cli.sanitize import LINE_BYTES_MAX, Lines, log_line, one_line

SGR = re.compile(r"\x1b\[[0-9;:]*m")


@given(st.text(alphabet=st.characters(exclude_categories=[])))
def test_nothing_leaves_the_line(text: str) -> None:
    shown = one_line(text)
    assert shown.replace("\t", "").isprintable() or not re.search(
        r"[\x00-\x1f\x7f-\x9f\u202a-\u202e]", shown.replace("\t", "")
    )
    assert len(shown.splitlines()) <= 1


@given(st.binary())
def test_a_log_line_moves_no_cursor(line: bytes) -> None:
    assert "\x1b" not in log_line(line, colour=False)
    assert "\x1b" not in SGR.sub("", log_line(line, colour=True))


@pytest.mark.parametrize(
    ("line", "plain", "coloured"),
    [
        (b"plain \xc3\xa9", "plain é", "plain é"),
        (b"\x1b[31mred\x1b[0m", "red", "\x1b[31mred\x1b[0m\x1b[0m"),
        (b"\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        (b"10%\r20%\r", r"10%\r20%", r"10%\r20%"),
        (b"\xff\x00", r"\xff\x00", r"\xff\x00"),
        ("a\u202eb".encode(), r"a\u202eb", r"a\u202eb"),
        (b"\x9b31m", r"\x9b31m", r"\x9b31m"),
    ],
)
def test_what_a_line_becomes(line: bytes, plain: str, coloured: str) -> None:
    assert log_line(line, colour=False) == plain
    shown = log_line(line, colour=True)
    assert shown in {coloured, coloured + "\x1b[0m"}


@given(st.lists(st.binary(max_size=40).map(lambda data: data.replace(b"a", b"\n"))))
def test_lines_are_those_of_the_whole(chunks: list[bytes]) -> None:
    lines = Lines()
    found = [line for chunk in chunks for line in lines.feed(chunk)] + lines.end()
    whole = b"".join(chunks).split(b"\n")
    assert found == (whole if whole[-1] else whole[:-1])


def test_a_line_without_end_is_shown_in_pieces() -> None:
    lines = Lines()
    found = [piece for _ in range(100) for piece in lines.feed(b"x" * 4096)]
    assert max(map(len, found)) <= LINE_BYTES_MAX
    assert b"".join(found + lines.end()) == b"x" * 409600
