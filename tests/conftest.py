"""What every folder of tests may need."""

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest

from kiln.rpc.channel import SERVER_OPTIONS
from kiln.rpc.status import KilnErrors

Serve = Callable[..., AbstractAsyncContextManager[str]]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """Serves handlers at a unix socket, as kiln does, for as long as a block; gives the URL."""

    @asynccontextmanager
    async def serving(
        handlers: Sequence[grpc.GenericRpcHandler], options: Sequence[tuple[str, int]] = SERVER_OPTIONS
    ) -> AsyncIterator[str]:
        interceptors = [KilnErrors(logging.getLogger("kiln.tests"))]
        server = grpc.aio.server(handlers=handlers, interceptors=interceptors, options=options)
        socket = tmp_path / f"{len(list(tmp_path.iterdir()))}.sock"
        server.add_insecure_port(f"unix:{socket}")
        await server.start()
        try:
            yield f"grpc+unix://{socket}"
        finally:
            await server.stop(None)

    return serving
