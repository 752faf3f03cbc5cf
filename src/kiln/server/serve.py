"""A host of builds and its castore, offered to others: the gRPC services, where they are, and how they end."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from kiln.build.service import BuildHost
from kiln.castore.castore import Castore
from kiln.castore.model import BLAKE3_DOCUMENTED, BLAKE3_DOUBLED, Scheme
from kiln.protos.kiln.build.v1 import build_pb2
from kiln.protos.snix.build.protos import rpc_build_pb2
from kiln.protos.snix.castore.protos import rpc_blobstore_pb2, rpc_directory_pb2
from kiln.protos.tvix.build.protos import rpc_build_pb2 as tvix_rpc_build_pb2
from kiln.protos.tvix.castore.protos import rpc_blobstore_pb2 as tvix_rpc_blobstore_pb2
from kiln.protos.tvix.castore.protos import rpc_directory_pb2 as tvix_rpc_directory_pb2
from kiln.rpc.channel import SERVER_OPTIONS
from kiln.rpc.status import KilnErrors
from kiln.rpc.url import Url
from kiln.server.castore_servicers import castore_handlers
from kiln.server.interceptors import BearerToken, BoundedCalls
from kiln.server.kiln_servicer import kiln_handlers
from kiln.server.listen import Security, bound
from kiln.server.unary_servicers import unary_handlers

CALLS_MAX = 10_000  # Open at once: as many as builds may be queued, each watched by somebody.

_CLOSE_S = 2.0  # For answers under way when the server stops.
_QUIET_S = 0.5  # Without a call, after the last build: whoever waited for it has fetched what it wanted.
_LINGER_S = 10.0


class Serving:
    """A server that answers, at `urls`."""

    def __init__(self, host: BuildHost, health: health_aio.HealthServicer, calls: BoundedCalls) -> None:
        self.urls: list[str] = []
        self._host = host
        self._health = health
        self._calls = calls

    async def drain(self, *, grace_s: float, hurry: asyncio.Event) -> None:
        """Take no more builds, let those there are end, and their clients fetch what they made.

        Builds that still run after `grace_s` seconds, or when `hurry` is set, are cancelled.
        """
        await self._health.enter_graceful_shutdown()
        hurried = asyncio.create_task(hurry.wait())
        ending = asyncio.create_task(self._host.close(cancel=False))
        try:
            await asyncio.wait([ending, hurried], timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():
                await self._host.close(cancel=True, why="the server is shutting down")
                await ending
            lingering = asyncio.create_task(self._quiet())
            await asyncio.wait([lingering, hurried], timeout=_LINGER_S, return_when=asyncio.FIRST_COMPLETED)
            lingering.cancel()
        finally:
            hurried.cancel()

    async def _quiet(self) -> None:
        """Until no call was open for a while."""
        quiet_s = 0.0
        while quiet_s < _QUIET_S:
            await asyncio.sleep(_QUIET_S / 5)
            quiet_s = 0.0 if self._calls.open else quiet_s + _QUIET_S / 5


@asynccontextmanager
async def serving(
    host: BuildHost,
    castore: Castore,
    addresses: Sequence[Url],
    security: Security,
    *,
    log: logging.Logger,
    calls_max: int = CALLS_MAX,
    strict: bool = False,
) -> AsyncIterator[Serving]:
    """Offer `host` and the castore it builds from at `addresses`, for as long as the block.

    `strict`: as Snix does, refuse requests whose outputs are out of order.
    Clients find an address only once it answers. Raises CannotListen, CredentialsUnreadable.
    """
    calls = BoundedCalls(calls_max=calls_max)
    health = health_aio.HealthServicer()
    names = _services(castore.scheme)
    for name in names:
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    handlers = (
        kiln_handlers(host, strict=strict),
        *unary_handlers(host, castore.scheme, strict=strict),
        *castore_handlers(castore),
    )
    offered = Serving(host, health, calls)
    async with AsyncExitStack() as stack:
        for url in addresses:
            interceptors: list[grpc.aio.ServerInterceptor] = [KilnErrors(log), calls]
            if url.scheme == "https" and security.token_file is not None:
                interceptors.insert(1, BearerToken(security.token_file))
            # No bound on the streams of a connection: beyond it clients wait in silence, where `calls` tells them.
            server = grpc.aio.server(handlers=handlers, interceptors=interceptors, options=SERVER_OPTIONS)
            health_pb2_grpc.add_HealthServicer_to_server(health, server)
            reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
            stack.push_async_callback(server.stop, _CLOSE_S)
            binding = stack.enter_context(bound(server, url, security))
            await server.start()
            binding.appear()
            offered.urls.append(binding.url)
        yield offered


def _services(scheme: Scheme) -> tuple[str, ...]:
    """The full names of what serves a store of `scheme`. Importing their modules made them known to reflection."""
    modules = [build_pb2]
    if scheme is BLAKE3_DOUBLED:
        modules += [rpc_build_pb2, rpc_blobstore_pb2, rpc_directory_pb2]
    elif scheme is BLAKE3_DOCUMENTED:
        modules += [tvix_rpc_build_pb2, tvix_rpc_blobstore_pb2, tvix_rpc_directory_pb2]
    return tuple(service.full_name for module in modules for service in module.DESCRIPTOR.services_by_name.values())
