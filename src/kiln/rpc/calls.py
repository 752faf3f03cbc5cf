"""The ways kiln calls a peer: one answer, a stream of answers, a stream of requests; never waiting without end."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar, cast

import grpc
import grpc.aio

from kiln.rpc.channel import Peer
from kiln.rpc.status import PeerFailed, PeerStalled, translated

Q = TypeVar("Q")
A = TypeVar("A")


async def ask(peer: Peer, method: grpc.aio.UnaryUnaryMultiCallable[Q, A], request: Q) -> A:
    """The one answer to `request`. Raises KilnErrors only."""
    async with _answering(peer):
        return await method(request, timeout=peer.stall_s)


async def receive(peer: Peer, method: grpc.aio.UnaryStreamMultiCallable[Q, A], request: Q) -> AsyncIterator[A]:
    """The answers to `request` in order. Closing the iterator ends the call. Raises KilnErrors only."""
    call = method(request)
    try:
        while True:
            async with _answering(peer):
                message = await call.read()
            if message is grpc.aio.EOF:
                return
            yield cast("A", message)
    finally:
        call.cancel()  # Without effect on a call that has ended.


async def send(peer: Peer, method: grpc.aio.StreamUnaryMultiCallable[Q, A], requests: AsyncIterable[Q]) -> A:
    """The answer to all of `requests`. What `requests` raises is raised here, and the peer sees a cancelled call.

    The requests are fed by hand: gRPC turns an exception of a request iterator into a cancellation.
    """
    call = method()

    async def feed() -> None:
        async for request in requests:
            try:
                async with _answering(peer):
                    await call.write(request)
            except (PeerFailed, asyncio.InvalidStateError):
                return  # The call has ended. Why, only its answer says.
        async with _answering(peer):
            await call.done_writing()

    feeding = asyncio.create_task(feed())

    def stop(_: object) -> None:
        if not call.cancelled():  # Nor by a write that stalled, whose error is wanted.
            feeding.cancel()

    # A refusal ends the feeding at once. A write left to fail after it would put INTERNAL in the place of its status.
    call.add_done_callback(stop)
    try:
        await asyncio.wait([feeding])
        if not feeding.cancelled():
            feeding.result()
        async with _answering(peer):
            return await call
    finally:
        call.cancel()
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)


@asynccontextmanager
async def _answering(peer: Peer) -> AsyncIterator[None]:
    """A block that waits for the peer: its statuses and its silence become KilnErrors."""
    try:
        async with asyncio.timeout(peer.stall_s):
            with translated(peer.url):
                yield
    except TimeoutError as error:
        raise PeerStalled(peer.url, f"nothing for {peer.stall_s:g} s") from error
    except asyncio.CancelledError as error:
        # gRPC shows a call that the peer cancelled (as tonic does when a handler panics) like our own cancellation.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise PeerFailed(peer.url, grpc.StatusCode.CANCELLED, "it dropped the call") from error
