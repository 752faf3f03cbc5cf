"""Every castore there is, bare and wrapped, under every scheme it can have: what the shared suites run over."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from kiln.castore.backends import BACKENDS
from kiln.castore.blobs.measured import MeasuredBlobs
from kiln.castore.blobs.memory import MemoryBlobs
from kiln.castore.blobs.size_limited import SizeLimitedBlobs
from kiln.castore.blobs.tiered import TieredBlobs
from kiln.castore.blobs.verified import VerifiedBlobs
from kiln.castore.castore import Castore
from kiln.castore.directories.measured import MeasuredDirectories
from kiln.castore.directories.memory import MemoryDirectories
from kiln.castore.directories.size_limited import SizeLimitedDirectories
from kiln.castore.directories.tiered import TieredDirectories
from kiln.castore.directories.verified import VerifiedDirectories
from kiln.castore.model import SCHEMES, Scheme
from kiln.castore.protocol import PACKAGES
from kiln.castore.registry import CastoreRegistry
from kiln.server.castore_servicers import castore_handlers

Serve = Callable[..., AbstractAsyncContextManager[str]]

BYTES_MAX = 64 * 1024 * 1024


def in_memory(scheme: Scheme) -> Castore:
    return Castore(MemoryBlobs(scheme), MemoryDirectories(scheme))


def tiered(scheme: Scheme) -> Castore:
    near, far = in_memory(scheme), in_memory(scheme)
    return Castore(TieredBlobs(near.blobs, far.blobs), TieredDirectories(near.directories, far.directories))


def verified(scheme: Scheme) -> Castore:
    inner = in_memory(scheme)
    return Castore(VerifiedBlobs(inner.blobs), VerifiedDirectories(inner.directories))


def size_limited(scheme: Scheme) -> Castore:
    inner = in_memory(scheme)
    return Castore(
        SizeLimitedBlobs(inner.blobs, bytes_max=BYTES_MAX),
        SizeLimitedDirectories(inner.directories, bytes_max=BYTES_MAX),
    )


def measured(scheme: Scheme) -> Castore:
    inner = in_memory(scheme)
    return Castore(MeasuredBlobs(inner.blobs), MeasuredDirectories(inner.directories))


IN_PROCESS: dict[str, Callable[[Scheme], Castore]] = {
    "memory": in_memory,
    "tiered": tiered,
    "verified": verified,
    "size_limited": size_limited,
    "measured": measured,
}
CASES = [(kind, scheme) for kind in (*IN_PROCESS, "local") for scheme in SCHEMES]
CASES += [("grpc", scheme) for scheme in PACKAGES]


@pytest.fixture(params=CASES, ids=["-".join(case) for case in CASES])
async def castore(request: pytest.FixtureRequest, serve: Serve, tmp_path: Path) -> AsyncIterator[Castore]:
    """One of them, empty."""
    kind, name = request.param
    scheme = SCHEMES[name]
    registry = CastoreRegistry(BACKENDS)
    if kind == "local":
        async with registry.open(f"local://{tmp_path}/store?scheme={name}") as opened:
            yield opened
    elif kind == "grpc":
        async with (
            serve(castore_handlers(in_memory(scheme))) as url,
            registry.open(f"{url}?scheme={name}") as opened,
        ):
            yield opened
    else:
        yield IN_PROCESS[kind](scheme)


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> Scheme:
    """Each scheme in turn."""
    return SCHEMES[request.param]
