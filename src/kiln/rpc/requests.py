"""A client's stream of requests, its end told from its loss."""

from collections.abc import AsyncIterator
from typing import Any, TypeVar

import grpc.aio

from kiln.errors import Unavailable

Q = TypeVar("Q")


class ClientGone(Unavailable):
    """The client went away in mid-stream."""

    def __init__(self) -> None:
        super().__init__("the client went away before it had sent everything")


async def whole(requests: AsyncIterator[Q], context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Q]:
    """`requests`, but ClientGone is raised where the stream broke.

    gRPC ends the iterator in both cases, and cancels the handler of a broken call only some time later: a servicer
    that trusts the end would commit half a blob. A stream that the client closed can still be answered, one that broke
    cannot; so headers are sent to find out.
    """
    async for request in requests:
        yield request
    try:
        await context.send_initial_metadata(())
    except grpc.aio.InternalError as error:
        raise ClientGone from error
