"""What stands around every call: how many there are at once, and who may make them."""

import hmac
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar, cast

import grpc
import grpc.aio

from kiln.errors import Exhausted

Q = TypeVar("Q")
A = TypeVar("A")

_Context = grpc.aio.ServicerContext[Any, Any]
_Block = Callable[[_Context], AbstractAsyncContextManager[None]]


class TooManyCalls(Exhausted):
    """As many calls are open as the server takes."""

    def __init__(self, calls_max: int) -> None:
        super().__init__(f"{calls_max} calls are open, which is all this server takes: try again later")
        self.calls_max = calls_max


class BoundedCalls(grpc.aio.ServerInterceptor):
    """Refuses calls beyond `calls_max` at once, but never those that a full server needs: Cancel, Get, health."""

    def __init__(self, *, calls_max: int) -> None:
        self.open = 0
        """How many calls of the counted kind there are now."""
        self._calls_max = calls_max

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], "Awaitable[grpc.RpcMethodHandler[Q, A] | None]"],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Q, A] | None":  # Generic in the stubs only.
        """The handler found for a call, counted."""
        handler = await continuation(handler_call_details)
        if handler is None or not _lasts(handler, handler_call_details.method):
            return handler
        return _around(handler, self._counted)

    @asynccontextmanager
    async def _counted(self, _context: _Context) -> AsyncIterator[None]:
        if self.open >= self._calls_max:
            raise TooManyCalls(self._calls_max)
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1


class BearerToken(grpc.aio.ServerInterceptor):
    """Takes only calls with the token that is in a file, read anew for each call so that it can be rotated."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], "Awaitable[grpc.RpcMethodHandler[Q, A] | None]"],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Q, A] | None":
        """The handler found for a call, behind the check."""
        handler = await continuation(handler_call_details)
        return None if handler is None else _around(handler, self._checked)

    @asynccontextmanager
    async def _checked(self, context: _Context) -> AsyncIterator[None]:
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        try:
            token = _contents(self._path).strip()
        except OSError:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this server cannot read its own token file")
        given_bytes = given if isinstance(given, bytes) else given.encode()
        if not token or not hmac.compare_digest(given_bytes, b"Bearer " + token):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this server wants a bearer token: see token-file")
        yield


def _contents(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _lasts(handler: Any, method: str) -> bool:
    """Whether a call may go on for as long as its client likes."""
    return handler.request_streaming or handler.response_streaming or method.endswith("/DoBuild")


def _around(handler: "grpc.RpcMethodHandler[Q, A]", block: _Block) -> "grpc.RpcMethodHandler[Q, A]":
    """`handler`, its calls inside of `block`."""
    # grpcio's handlers are named tuples, of which its stubs know nothing.
    found: Any = handler
    kinds = ("stream" if streaming else "unary" for streaming in (found.request_streaming, found.response_streaming))
    slot = "_".join(kinds)
    inner = getattr(found, slot)

    async def answer(request: Any, context: _Context) -> Any:
        async with block(context):
            return await inner(request, context)

    async def answers(request: Any, context: _Context) -> AsyncIterator[Any]:
        async with block(context):
            async for message in inner(request, context):
                yield message

    wrapped = answers if inspect.isasyncgenfunction(inner) else answer
    return cast("grpc.RpcMethodHandler[Q, A]", found._replace(**{slot: wrapped}))
