"""All castores there are, by URL scheme: the table for a composition root to hand to `CastoreRegistry`.

    memory://                      gone with the process
    local:///path                  a store on disk
    grpc+unix:///path, grpc+http://host:port, grpc+https://host:port

The option `scheme` names a castore scheme; without it a store on disk has the one recorded in it, and the others are
blake3/doubled. A store is imported only when it is asked for: gRPC alone takes 80 ms.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType

from kiln.castore.castore import Castore
from kiln.castore.model import BLAKE3_DOUBLED, SCHEMES, Scheme
from kiln.castore.registry import Backend
from kiln.rpc.url import CHANNEL_OPTIONS, Url, UrlInvalid


@asynccontextmanager
async def _memory(url: Url) -> AsyncIterator[Castore]:
    from kiln.castore.blobs.memory import MemoryBlobs  # noqa: PLC0415  See above.
    from kiln.castore.directories.memory import MemoryDirectories  # noqa: PLC0415

    if url.authority or url.path not in {"", "/"}:
        raise UrlInvalid(url.text, "memory:// takes no path")
    scheme = _scheme(url) or BLAKE3_DOUBLED
    yield Castore(MemoryBlobs(scheme), MemoryDirectories(scheme))


@asynccontextmanager
async def _local(url: Url) -> AsyncIterator[Castore]:
    from kiln.castore.local.store import LocalStore  # noqa: PLC0415  See above.

    if url.authority or not url.path.startswith("/"):
        raise UrlInvalid(url.text, "a store is named by an absolute path, as in local:///var/lib/kiln")
    match url.options.get("durability", "normal"):
        case "normal" | "strict" as durability:
            store = LocalStore.open(url.path, scheme=_scheme(url), durability=durability)
        case other:
            raise UrlInvalid(url.text, f"unknown durability {other!r}; known are normal, strict")
    try:
        yield Castore(store.blobs, store.directories)
    finally:
        store.close()


@asynccontextmanager
async def _grpc(url: Url) -> AsyncIterator[Castore]:
    from kiln.castore.blobs.grpc import GrpcBlobs  # noqa: PLC0415  See above.
    from kiln.castore.blobs.verified import VerifiedBlobs  # noqa: PLC0415
    from kiln.castore.directories.grpc import GrpcDirectories  # noqa: PLC0415
    from kiln.rpc.channel import connected  # noqa: PLC0415

    scheme = _scheme(url) or BLAKE3_DOUBLED
    async with connected(url) as peer:
        yield Castore(VerifiedBlobs(GrpcBlobs(peer, scheme)), GrpcDirectories(peer, scheme))


def _scheme(url: Url) -> Scheme | None:
    name = url.options.get("scheme")
    if name is not None and name not in SCHEMES:
        raise UrlInvalid(url.text, f"unknown castore scheme {name!r}; known are {', '.join(SCHEMES)}")
    return None if name is None else SCHEMES[name]


BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        "memory": Backend(frozenset({"scheme"}), _memory),
        "local": Backend(frozenset({"scheme", "durability"}), _local),
        **{name: Backend(options | {"scheme"}, _grpc) for name, options in CHANNEL_OPTIONS.items()},
    }
)
