from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kiln.castore import refscan
from kiln.castore.refscan import HyperscanMatcher, Matcher, PlainMatcher, RefScanner

Make = Callable[[list[bytes]], Matcher]
MATCHERS: dict[str, Make] = {"hyperscan": HyperscanMatcher, "plain": PlainMatcher}

few_letters = st.binary(min_size=1, max_size=6).map(lambda raw: bytes(b"ab"[byte % 2] for byte in raw))
needle = st.one_of(st.binary(min_size=1, max_size=40), few_letters)
needles = st.lists(needle, min_size=1, max_size=12)


def scan(make: Make, needles: list[bytes], chunks: list[bytes]) -> set[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refscan, "matcher_of", make)
        scanner = RefScanner(needles)
    stream = scanner.stream()
    for chunk in chunks:
        stream.feed(chunk)
    return set(scanner.found)


@st.composite
def haystacks(draw: st.DrawFn) -> tuple[list[bytes], list[bytes]]:
    """Needles, and chunks in which pieces of them are frequent and lie across borders."""
    wanted = draw(needles)
    piece = st.one_of(st.sampled_from(wanted), st.binary(max_size=20), st.sampled_from(wanted).map(lambda n: n[:-1]))
    data = b"".join(draw(st.lists(piece, max_size=8)))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=5)))
    edges = [0, *cuts, len(data)]
    return wanted, [data[start:end] for start, end in pairwise(edges)]


@pytest.mark.parametrize("make", MATCHERS.values(), ids=MATCHERS)
@given(haystack=haystacks())
@settings(max_examples=300, deadline=None)
def test_exactly_the_needles_that_occur_are_found(make: Make, haystack: tuple[list[bytes], list[bytes]]) -> None:
    wanted, chunks = haystack
    data = b"".join(chunks)
    assert scan(make, wanted, chunks) == {index for index, needle in enumerate(wanted) if needle in data}


@pytest.mark.parametrize("make", MATCHERS.values(), ids=MATCHERS)
def test_every_byte_value_is_literal(make: Make) -> None:
    matcher = make([bytes([value]) for value in range(256)])
    for value in range(256):
        found: set[bytes] = set()
        matcher.scan(bytes([value]), found)
        assert found == {bytes([value])}
    assert scan(make, [b".*", b"a\nb", b"(?i)x"], [b"a\nb X yy"]) == {1}


def test_repeated_needles_are_all_reported() -> None:
    scanner = RefScanner([b"x", b"yy", b"x"])
    scanner.scan(b"...x...")
    assert scanner.found == {0, 2}
    scanner.scan(b"yy")
    assert scanner.found == {0, 1, 2}


def test_streams_do_not_flow_into_each_other() -> None:
    scanner = RefScanner([b"ab"])
    for part in (b"a", b"b"):
        scanner.scan(part)
    assert scanner.found == set()


def test_needles_beyond_what_hyperscan_takes_are_found() -> None:
    long = bytes(range(1, 256)) * 100
    scanner = RefScanner([long, b"short"])
    stream = scanner.stream()
    for start in range(0, len(long), 1000):
        stream.feed(long[start : start + 1000])
    assert scanner.found == {0}
