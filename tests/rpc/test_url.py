"""Service URLs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiln.rpc.url import UrlInvalid, parse_url

KNOWN = {"local": frozenset({"scheme", "durability"}), "grpc+unix": frozenset[str](), "memory": frozenset[str]()}


@pytest.mark.parametrize("text", ["local:///a/b", "local:/a/b", "LOCAL:///a/b"])
def test_an_empty_authority_may_be_left_out(text: str) -> None:
    url = parse_url(text, KNOWN)
    assert (url.scheme, url.authority, url.path, dict(url.options)) == ("local", "", "/a/b", {})


def test_path_and_options_are_decoded() -> None:
    url = parse_url("local:///a%20b%ff%3F?scheme=blake3/doubled&durability=a%26b", KNOWN)
    assert url.path == "/a b\udcff?"
    assert url.options == {"scheme": "blake3/doubled", "durability": "a&b"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("locl:///a", "unknown scheme 'locl'; known are grpc+unix, local, memory"),
        ("/a/b", "it has no scheme; known are"),
        ("", "it has no scheme"),
        ("local:///a?sheme=x", "unknown option 'sheme'; known for local are: durability, scheme"),
        ("memory://?x=1", "known for memory are: none"),
        ("local:///a?scheme=x&scheme=y", "'scheme' is given twice"),
        ("local:///a?scheme", "bad query field"),
        ("local:///a#b", "%23"),
        ("local://[a", "cannot use the URL"),
    ],
)
def test_what_is_unknown_is_refused_with_what_is_known(text: str, says: str) -> None:
    with pytest.raises(UrlInvalid) as caught:
        parse_url(text, KNOWN)
    assert says in str(caught.value)
    assert repr(text) in str(caught.value)


@given(st.text())
def test_no_text_breaks_it(text: str) -> None:
    for candidate in (text, "local:" + text):
        try:
            assert parse_url(candidate, KNOWN).scheme in KNOWN
        except UrlInvalid as error:
            assert error.url == candidate  # noqa: PT017  Both outcomes are fine; no third is.
