"""Channels: sockets with odd names, TLS with both sides' certificates, bearer tokens."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import grpc
import grpc.aio
import pytest

from kiln.rpc.calls import ask
from kiln.rpc.channel import CredentialsUnreadable, connected
from kiln.rpc.status import PeerUnreachable
from kiln.rpc.url import CHANNEL_OPTIONS, parse_url

Serve = Callable[..., AbstractAsyncContextManager[str]]

Method = grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]

TLS = Path(__file__).parent / "tls"


async def token_seen(_request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    return repr(dict(context.invocation_metadata() or ()).get("authorization")).encode()


def handlers() -> list[grpc.GenericRpcHandler]:
    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "TokenSeen": grpc.unary_unary_rpc_method_handler(token_seen)
    }
    return [grpc.method_handlers_generic_handler("test.Echo", methods)]


async def token_at(url: str) -> str:
    async with connected(parse_url(url, CHANNEL_OPTIONS)) as peer:
        return (await ask(peer, peer.channel.unary_unary("/test.Echo/TokenSeen"), b"")).decode()


@asynccontextmanager
async def served_by_tls(*, client_certificate: bool) -> AsyncIterator[str]:
    server = grpc.aio.server(handlers=handlers())
    pair = ((TLS / "server.key").read_bytes(), (TLS / "server.pem").read_bytes())
    ca = (TLS / "ca.pem").read_bytes() if client_certificate else None
    credentials = grpc.ssl_server_credentials([pair], ca, require_client_auth=client_certificate)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"grpc+https://127.0.0.1:{port}?tls-ca-cert-path={TLS}/ca.pem"
    finally:
        await server.stop(None)


@pytest.mark.parametrize("name", ["a socket", "100%", "ü?#"])
async def test_a_socket_may_have_any_name(tmp_path: Path, name: str) -> None:
    server = grpc.aio.server(handlers=handlers())
    server.add_insecure_port("unix:" + quote(f"{tmp_path}/{name}"))
    await server.start()
    assert (tmp_path / name).is_socket()
    try:
        for form in ("grpc+unix:", "grpc+unix://"):
            assert await token_at(form + quote(f"{tmp_path}/{name}")) == "None"
    finally:
        await server.stop(None)


async def test_plain_tcp() -> None:
    server = grpc.aio.server(handlers=handlers())
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        assert await token_at(f"grpc+http://127.0.0.1:{port}") == "None"
    finally:
        await server.stop(None)


async def test_tls_with_both_sides_certificates() -> None:
    async with served_by_tls(client_certificate=True) as url:
        pair = f"&tls-client-cert-path={TLS}/client.pem&tls-client-key-path={TLS}/client.key"
        assert await token_at(url + pair) == "None"
        with pytest.raises(PeerUnreachable):
            await token_at(url)


async def test_a_server_of_an_unknown_authority_is_refused() -> None:
    async with served_by_tls(client_certificate=False) as url:
        with pytest.raises(PeerUnreachable):
            await token_at(url.partition("?")[0])


async def test_a_token_is_read_anew_for_each_call(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("one\n")
    async with served_by_tls(client_certificate=False) as url:
        parsed = parse_url(f"{url}&token-file={token}", CHANNEL_OPTIONS)
        async with connected(parsed) as peer:
            method: Method = peer.channel.unary_unary("/test.Echo/TokenSeen")
            assert await ask(peer, method, b"") == b"'Bearer one'"
            token.write_text("two\n")
            assert await ask(peer, method, b"") == b"'Bearer two'"


@pytest.mark.parametrize("option", ["tls-ca-cert-path", "token-file"])
async def test_an_unreadable_file_is_named(option: str) -> None:
    with pytest.raises(CredentialsUnreadable, match="/nonexistent"):
        await token_at(f"grpc+https://localhost:1?{option}=/nonexistent")


async def test_a_restarted_server_is_found_again(serve: Serve, tmp_path: Path) -> None:
    async with connected(parse_url(f"grpc+unix://{tmp_path}/0.sock", CHANNEL_OPTIONS)) as peer:
        method: Method = peer.channel.unary_unary("/test.Echo/TokenSeen")
        for _ in range(2):
            async with serve(handlers()) as url:
                assert url == peer.url
                await peer.channel.channel_ready()
                assert await ask(peer, method, b"") == b"None"
            with pytest.raises(PeerUnreachable):
                await ask(peer, method, b"")
