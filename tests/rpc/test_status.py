"""KilnErrors and gRPC statuses."""

import importlib
import pkgutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from urllib.parse import quote

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kiln
from kiln.errors import (
    Corrupt,
    Denied,
    Exhausted,
    Invalid,
    KilnError,
    NotFound,
    OutOfRange,
    Precondition,
    Unavailable,
    Usage,
)
from kiln.rpc.calls import ask, receive
from kiln.rpc.channel import connected
from kiln.rpc.status import TEXT_BYTES_MAX, PeerFailed, PeerLacksMethod, PeerUnreachable, code_of, error_of, status_text
from kiln.rpc.url import CHANNEL_OPTIONS, parse_url

Serve = Callable[..., AbstractAsyncContextManager[str]]

KINDS = (Invalid, Usage, NotFound, Precondition, OutOfRange, Denied, Exhausted, Corrupt, Unavailable)


def subclasses(kind: type[KilnError]) -> Iterator[type[KilnError]]:
    for below in kind.__subclasses__():
        yield below
        yield from subclasses(below)


def test_each_leaf_has_exactly_one_kind() -> None:
    for module in pkgutil.walk_packages(kiln.__path__, "kiln."):
        if not module.name.startswith("kiln.protos") and module.name != "kiln.__main__":
            importlib.import_module(module.name)
    leaves = [leaf for leaf in subclasses(KilnError) if leaf not in KINDS and leaf.__module__.startswith("kiln.")]
    assert len(leaves) > 20
    for leaf in leaves:
        assert len([kind for kind in KINDS if issubclass(leaf, kind)]) == 1, leaf


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_survives_the_wire(kind: type[KilnError]) -> None:
    status = grpc.aio.AioRpcError(code_of(kind("why")), details="why")
    back = error_of(status, url="grpc+unix:///s")
    assert isinstance(back, Invalid if kind is Usage else kind)
    assert "grpc+unix:///s" in str(back)
    assert "why" in str(back)


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_status_means_something(code: grpc.StatusCode) -> None:
    assert isinstance(error_of(grpc.aio.AioRpcError(code), url="u"), KINDS)


@given(st.text(max_size=5000))
def test_a_text_is_cut_to_what_a_trailer_holds(text: str) -> None:
    cut = status_text(text)
    assert len(quote(cut)) <= TEXT_BYTES_MAX
    assert cut == text or (text.startswith(cut[:-1]) and cut.endswith("…"))


class Refusing:
    """Handlers that fail in every way."""

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        return [
            grpc.method_handlers_generic_handler(
                "test.Refusing",
                {
                    "Kiln": grpc.unary_unary_rpc_method_handler(self.kiln),
                    "Long": grpc.unary_unary_rpc_method_handler(self.long),
                    "Bug": grpc.unary_unary_rpc_method_handler(self.bug),
                    "Own": grpc.unary_unary_rpc_method_handler(self.own),
                    "Stream": grpc.unary_stream_rpc_method_handler(self.stream),
                    "Cancelled": grpc.unary_stream_rpc_method_handler(self.cancelled),
                },
            )
        ]

    async def kiln(self, _request: bytes, _context: object) -> bytes:
        raise NotFound("no such thing: \x1b[31m ü")

    async def long(self, _request: bytes, _context: object) -> bytes:
        raise Invalid("ü\n" * 20_000)

    async def bug(self, _request: bytes, _context: object) -> bytes:
        raise ValueError("a secret")

    async def own(self, _request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        await context.abort(grpc.StatusCode.OUT_OF_RANGE, "its own")

    async def stream(self, _request: bytes, _context: object) -> AsyncIterator[bytes]:
        yield b"first"
        raise Exhausted("enough")

    async def cancelled(self, _request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
        yield b"first"
        await context.abort(grpc.StatusCode.CANCELLED, "")


@pytest.mark.parametrize(
    ("method", "kind", "says"),
    [
        ("Kiln", NotFound, "no such thing: \x1b[31m ü"),
        ("Long", Invalid, "…"),
        ("Own", OutOfRange, "its own"),
        ("Bug", PeerFailed, "internal error"),
        ("None", PeerLacksMethod, "does not offer"),
    ],
)
async def test_a_handlers_error_is_the_callers(serve: Serve, method: str, kind: type[KilnError], says: str) -> None:
    async with serve(Refusing().handlers()) as url, connected(parse_url(url, CHANNEL_OPTIONS)) as peer:
        with pytest.raises(kind) as caught:
            await ask(peer, peer.channel.unary_unary(f"/test.Refusing/{method}"), b"")
    assert says in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_a_surprise_is_logged_in_full(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    async with serve(Refusing().handlers()) as url, connected(parse_url(url, CHANNEL_OPTIONS)) as peer:
        with pytest.raises(PeerFailed):
            await ask(peer, peer.channel.unary_unary("/test.Refusing/Bug"), b"")
    assert "a secret" in caplog.text
    assert "/test.Refusing/Bug" in caplog.text


@pytest.mark.parametrize(("method", "kind"), [("Stream", Exhausted), ("Cancelled", PeerFailed)])
async def test_a_stream_breaks_with_its_status(serve: Serve, method: str, kind: type[KilnError]) -> None:
    async with serve(Refusing().handlers()) as url, connected(parse_url(url, CHANNEL_OPTIONS)) as peer:
        messages: AsyncIterator[bytes] = receive(peer, peer.channel.unary_stream(f"/test.Refusing/{method}"), b"")
        assert await anext(messages) == b"first"
        with pytest.raises(kind):
            await anext(messages)


async def test_nobody_there_names_the_url_and_a_way_out() -> None:
    async with connected(parse_url("grpc+unix:///nonexistent/kiln.sock", CHANNEL_OPTIONS)) as peer:
        with pytest.raises(PeerUnreachable) as caught:
            await ask(peer, peer.channel.unary_unary("/test.Refusing/Kiln"), b"")
    assert "grpc+unix:///nonexistent/kiln.sock" in str(caught.value)
    assert "kiln serve" in str(caught.value)
