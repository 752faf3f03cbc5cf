"""URL -> gRPC channel: `grpc+unix:///path`, `grpc+http://host:port`, `grpc+https://host:port`."""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import quote

import grpc
import grpc.aio

from kiln.errors import Denied
from kiln.rpc.url import Url, UrlInvalid

MESSAGE_BYTES_MAX = 64 * 1024 * 1024  # A directory of 100,000 entries with the longest names takes 31 MB.

_SUN_PATH_BYTES_MAX = 107  # sizeof(sun_path) - 1, unix(7).

_KEEPALIVE_MS = 30_000

# What both ends agree on. Pings find a peer that vanished without a word while a stream waits for it. A server built
# on gRPC's core drops clients that ping more often than it allows (by default: each five minutes), so ours allows more.
_COMMON_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)
_CLIENT_OPTIONS = (
    *_COMMON_OPTIONS,
    # A restarted server is found again within a second, not after gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Channels share no connections: closing one closes its own.
    ("grpc.use_local_subchannel_pool", 1),
)
SERVER_OPTIONS = (
    *_COMMON_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 3),
    # Two servers at one address would share its connections at random.
    ("grpc.so_reuseport", 0),
)
"""For `grpc.aio.server`: message limits and keepalive to match our clients'."""


class CredentialsUnreadable(Denied):
    """A certificate, key or token file cannot be read."""

    def __init__(self, path: str, error: OSError) -> None:
        super().__init__(f"cannot read {path}: {error.strerror}")
        self.path = path


@dataclass(frozen=True, slots=True)
class Peer:
    """A server by its URL, and the channel to it, which connects at the first call and again after each loss.

    A peer that is connected and makes no progress for `stall_s` seconds is taken as gone.
    """

    url: str
    channel: grpc.aio.Channel
    stall_s: float = 120.0


@asynccontextmanager
async def connected(url: Url) -> AsyncIterator[Peer]:
    """A channel to `url`, whose scheme is one of CHANNEL_OPTIONS, for as long as the block; open calls end with it.

    Raises UrlInvalid, and CredentialsUnreadable. That nobody answers shows at the first call.
    """
    if url.scheme == "grpc+unix":
        channel = grpc.aio.insecure_channel(_unix_target(url), options=_CLIENT_OPTIONS)
    elif url.scheme == "grpc+http":
        channel = grpc.aio.insecure_channel(_tcp_target(url), options=_CLIENT_OPTIONS)
    else:
        channel = grpc.aio.secure_channel(_tcp_target(url), _credentials(url), options=_CLIENT_OPTIONS)
    async with channel:
        yield Peer(url.text, channel)


def _unix_target(url: Url) -> str:
    if url.authority:
        raise UrlInvalid(url.text, f"a socket is named by an absolute path, as in {url.scheme}:///run/kiln.sock")
    if not url.path.startswith("/") or url.path == "/":
        raise UrlInvalid(url.text, "it names no socket")
    if len(os.fsencode(url.path)) > _SUN_PATH_BYTES_MAX:
        raise UrlInvalid(url.text, f"a socket's path has at most {_SUN_PATH_BYTES_MAX} bytes")
    return "unix:" + quote(os.fsencode(url.path))


def _tcp_target(url: Url) -> str:
    if url.path not in {"", "/"}:
        raise UrlInvalid(url.text, f"{url.scheme} takes no path")
    host, colon, port = url.authority.rpartition(":")
    if not colon or not host or "@" in host or not port.isdecimal():
        raise UrlInvalid(url.text, f"it needs a host and a port, as in {url.scheme}://localhost:8000")
    return f"dns:{url.authority}"


def _credentials(url: Url) -> grpc.ChannelCredentials:
    ca, certificate, key = (
        _contents(url.options[name]) if name in url.options else None
        for name in ("tls-ca-cert-path", "tls-client-cert-path", "tls-client-key-path")
    )
    if (certificate is None) != (key is None):
        raise UrlInvalid(url.text, "tls-client-cert-path and tls-client-key-path go together")
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    if token_path := url.options.get("token-file"):
        _contents(token_path)
        token = grpc.metadata_call_credentials(_BearerToken(token_path))
        return grpc.composite_channel_credentials(credentials, token)
    return credentials


class _BearerToken(grpc.AuthMetadataPlugin):
    """Reads the token anew for each call, so that it can be rotated."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(
        self,
        context: grpc.AuthMetadataContext,  # noqa: ARG002  gRPC's signature; the token is the same for all methods.
        callback: Callable[[tuple[tuple[str, str], ...], Exception | None], None],
    ) -> None:
        try:
            token = _contents(self._path).decode("ascii").strip()
        except (CredentialsUnreadable, UnicodeDecodeError) as error:
            callback((), error)
        else:
            callback((("authorization", f"Bearer {token}"),), None)


def _contents(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise CredentialsUnreadable(path, error) from error
