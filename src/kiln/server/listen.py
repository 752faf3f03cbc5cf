"""Where a server listens: `unix:///PATH`, `http://HOST:PORT`, `https://HOST:PORT`, also with `grpc+` in front."""

import contextlib
import fcntl
import os
import secrets
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import quote

import grpc
import grpc.aio

from kiln.errors import Denied, Unavailable, Usage
from kiln.rpc.channel import CredentialsUnreadable
from kiln.rpc.url import Url, UrlInvalid, parse_url

_SUN_PATH_BYTES_MAX = 107  # sizeof(sun_path) - 1, unix(7).
_PORT_MAX = 65535
_KNOWN = {scheme: frozenset[str]() for scheme in ("unix", "http", "https")}


class CannotListen(Unavailable):
    """An address cannot be had."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(f"cannot listen at {url}: {why}")
        self.url = url
        self.why = why


class OpenToAll(Denied):
    """An address at which anybody who reaches it could build."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(f"will not listen at {url}: {why}")
        self.url = url


@dataclass(frozen=True, slots=True)
class Tls:
    """The files of https addresses: our certificate and key; whose clients may come, if only those of one authority."""

    certificate: str
    key: str
    client_ca: str | None = None


@dataclass(frozen=True, slots=True)
class Security:
    """What protects addresses other than sockets."""

    tls: Tls | None = None
    token_file: str | None = None
    insecure_tcp: bool = False
    """http:// is allowed, and https:// to clients that show neither certificate nor token."""


def default_listen(environment: Mapping[str, str]) -> str:
    """Where a server listens that nobody told."""
    directory = environment.get("XDG_RUNTIME_DIR") or "/run"
    return "unix://" + quote(f"{directory}/kiln/kiln.sock")


def parse_listen(text: str, security: Security) -> Url:
    """The address `text` names. Raises UrlInvalid, Usage, OpenToAll."""
    url = parse_url(text.removeprefix("grpc+"), _KNOWN)
    if url.scheme == "unix":
        if url.authority or not url.path.startswith("/") or url.path.endswith("/"):
            raise UrlInvalid(text, "a socket is named by an absolute path, as in unix:///run/kiln.sock")
        return url
    host, colon, port = url.authority.rpartition(":")
    if (
        url.path not in {"", "/"}
        or not colon
        or not host
        or "@" in host
        or not port.isdecimal()
        or int(port) > _PORT_MAX
    ):
        raise UrlInvalid(text, f"it needs a host and a port and no path, as in {url.scheme}://localhost:8000")
    if url.scheme == "http" and not security.insecure_tcp:
        raise OpenToAll(
            text, "without TLS anybody on the way could read and build; use https://, or say --insecure-tcp"
        )
    if url.scheme == "https":
        if security.tls is None:
            raise Usage(f"https needs a certificate and its key: give --tls-cert and --tls-key for {text}")
        if security.tls.client_ca is None and security.token_file is None and not security.insecure_tcp:
            why = "anybody could build; give --tls-client-ca or --token-file, or say --insecure-tcp"
            raise OpenToAll(text, why)
    return url


@contextmanager
def bound(server: grpc.aio.Server, url: Url, security: Security) -> Iterator["Binding"]:
    """`server`, not yet started, bound to `url`; a socket is removed on leaving. Raises CannotListen."""
    if url.scheme == "unix":
        with _bound_socket(server, url) as binding:
            yield binding
        return
    _check_bindable(url)
    try:
        if url.scheme == "http":
            port = server.add_insecure_port(url.authority)
        else:
            assert security.tls is not None
            port = server.add_secure_port(url.authority, _credentials(security.tls))
    except RuntimeError as error:  # All that gRPC says: it could not bind.
        raise CannotListen(url.text, "somebody else just took the address") from error
    host = url.authority.rpartition(":")[0]
    yield Binding(f"grpc+{url.scheme}://{host}:{port}")


class Binding:
    """An address; `appear` is called once the server answers."""

    def __init__(self, url: str) -> None:
        self.url = url
        """What clients are to be given."""

    def appear(self) -> None:
        """Let clients find it."""


class _Socket(Binding):
    """A socket that has a name nobody knows until the server answers."""

    def __init__(self, path: str, hidden: str) -> None:
        super().__init__("grpc+unix://" + quote(os.fsencode(path)))
        self._path = path
        self._hidden = hidden
        found = os.lstat(hidden)
        self._inode = (found.st_dev, found.st_ino)

    def appear(self) -> None:
        """Take the name, unless a live server has it. Raises CannotListen."""
        try:
            directory = os.open(os.path.dirname(self._path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(directory, fcntl.LOCK_EX)  # Of two servers that start at once, one sees the other.
                _check_free(self._path, self.url)
                os.rename(self._hidden, self._path)
            finally:
                os.close(directory)
        except OSError as error:
            raise CannotListen(self.url, error.strerror or str(error)) from error

    def disappear(self) -> None:
        """Remove the socket, by whichever name, unless it is another server's by now."""
        for path in (self._hidden, self._path):
            with contextlib.suppress(FileNotFoundError):
                found = os.lstat(path)
                if (found.st_dev, found.st_ino) == self._inode:
                    os.unlink(path)


@contextmanager
def _bound_socket(server: grpc.aio.Server, url: Url) -> Iterator[_Socket]:
    directory = os.path.dirname(url.path)
    hidden = f"{directory}/.{secrets.token_hex(4)}"
    if max(len(os.fsencode(path)) for path in (url.path, hidden)) > _SUN_PATH_BYTES_MAX:
        raise UrlInvalid(url.text, f"a socket's path has at most {_SUN_PATH_BYTES_MAX} bytes")
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        _check_free(url.path, url.text)
    except OSError as error:
        raise CannotListen(url.text, error.strerror or str(error)) from error
    umask = os.umask(0o177)  # From its first moment the socket is its owner's only.
    try:
        server.add_insecure_port("unix:" + quote(os.fsencode(hidden)))
    except RuntimeError as error:
        raise CannotListen(url.text, f"no socket can be made in {directory}") from error
    finally:
        os.umask(umask)
    binding = _Socket(url.path, hidden)
    try:
        yield binding
    finally:
        binding.disappear()


def _check_bindable(url: Url) -> None:
    """Raise CannotListen with the reason, which gRPC keeps to itself, unless one of the host's addresses can be had."""
    host, _, port = url.authority.rpartition(":")
    why = OSError("the host has no address")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        found, why = [], error
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                why = error
            else:
                return
    raise CannotListen(url.text, why.strerror or str(why)) from why


def _check_free(path: str, url: str) -> None:
    """Raise CannotListen unless `path` is free, or a socket that nobody answers any more."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise CannotListen(url, "there is a file of that name that is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return  # Left by a server that was killed.
        except BlockingIOError:
            pass  # Its queue of connections is full: it lives.
    raise CannotListen(url, "a server answers there already; stop it first, or name another socket")


def _credentials(tls: Tls) -> grpc.ServerCredentials:
    pair = (_contents(tls.key), _contents(tls.certificate))
    client_ca = None if tls.client_ca is None else _contents(tls.client_ca)
    return grpc.ssl_server_credentials([pair], client_ca, require_client_auth=client_ca is not None)


def _contents(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise CredentialsUnreadable(path, error) from error
