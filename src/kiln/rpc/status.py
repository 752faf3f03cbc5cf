"""KilnError <-> gRPC status: the only table, and what applies it on either side."""

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar, cast
from urllib.parse import quote

import grpc
import grpc.aio

from kiln.errors import (
    Corrupt,
    Denied,
    Exhausted,
    Invalid,
    KilnError,
    NotFound,
    OutOfRange,
    Precondition,
    Unavailable,
    Usage,
)

Q = TypeVar("Q")
A = TypeVar("A")

# gRPC refuses trailers over 8 KiB, and the caller would see RESOURCE_EXHAUSTED instead (grpc/grpc#37852). The text
# travels percent-encoded, so its encoded length counts.
TEXT_BYTES_MAX = 3500

_CODES: Mapping[type[KilnError], grpc.StatusCode] = MappingProxyType(
    {
        Invalid: grpc.StatusCode.INVALID_ARGUMENT,
        Usage: grpc.StatusCode.INVALID_ARGUMENT,
        NotFound: grpc.StatusCode.NOT_FOUND,
        Precondition: grpc.StatusCode.FAILED_PRECONDITION,
        OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
        Denied: grpc.StatusCode.PERMISSION_DENIED,
        Exhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Corrupt: grpc.StatusCode.DATA_LOSS,
        Unavailable: grpc.StatusCode.UNAVAILABLE,
        KilnError: grpc.StatusCode.INTERNAL,
    }
)


class PeerUnreachable(Unavailable):
    """Nobody answers at a URL, or whoever did went away."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(f"no server answers at {url} ({why}): check the URL, or start one there with `kiln serve`")
        self.url = url


class PeerStalled(Unavailable):
    """The other side is connected and says nothing for too long."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(f"the server at {url} does not answer in time: {why}")
        self.url = url


class PeerFailed(Unavailable):
    """The other side met trouble of its own."""

    def __init__(self, url: str, code: grpc.StatusCode, why: str) -> None:
        super().__init__(f"the server at {url} failed: {why or code.name}")
        self.url = url
        self.code = code


class PeerLacksMethod(Precondition):
    """The other side does not offer what is asked for, as a store of another scheme does not."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(f"the server at {url} does not offer this service: {why}")
        self.url = url


_KINDS: Mapping[grpc.StatusCode, type[KilnError]] = MappingProxyType(
    {
        grpc.StatusCode.INVALID_ARGUMENT: Invalid,
        grpc.StatusCode.NOT_FOUND: NotFound,
        grpc.StatusCode.FAILED_PRECONDITION: Precondition,
        grpc.StatusCode.OUT_OF_RANGE: OutOfRange,
        grpc.StatusCode.PERMISSION_DENIED: Denied,
        grpc.StatusCode.UNAUTHENTICATED: Denied,
        grpc.StatusCode.RESOURCE_EXHAUSTED: Exhausted,
        grpc.StatusCode.DATA_LOSS: Corrupt,
    }
)


def code_of(error: KilnError) -> grpc.StatusCode:
    """The status of `error`, by its kind."""
    return next(_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)


def error_of(error: grpc.aio.AioRpcError, *, url: str) -> KilnError:
    """What a status from the server at `url` means here. What has no kind of its own is the server's own trouble."""
    code, text = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE:
        return PeerUnreachable(url, text)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return PeerStalled(url, text)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return PeerLacksMethod(url, text)
    if kind := _KINDS.get(code):
        return kind(f"the server at {url} says: {text or code.name}")
    return PeerFailed(url, code, text)


@contextmanager
def translated(url: str) -> Iterator[None]:
    """A block in which statuses from the server at `url` are raised as KilnErrors."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_of(error, url=url) from error


def status_text(text: str) -> str:
    """`text`, cut so that it fits into a trailer."""
    if len(quote(text)) <= TEXT_BYTES_MAX:
        return text
    low, high = 0, len(text)
    while low < high:  # Characters take 1 to 12 bytes: the longest prefix that fits is searched for.
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high) if len(quote(text[:middle])) <= TEXT_BYTES_MAX - len(quote("…")) else (low, middle - 1)
        )
    return text[:low] + "…"


class KilnErrors(grpc.aio.ServerInterceptor):
    """Answers a KilnError with its status, and any other exception with INTERNAL and no word of its own.

    The traceback of such a surprise goes to `log`, never to the peer.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], "Awaitable[grpc.RpcMethodHandler[Q, A] | None]"],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Q, A] | None":  # Generic in the stubs only.
        """The handler found for a call, wrapped."""
        # grpcio's handlers are named tuples and its handler functions asynchronous; its stubs know neither.
        handler: Any = await continuation(handler_call_details)
        if handler is None:  # Nobody offers the method: gRPC answers UNIMPLEMENTED.
            return None
        kinds = (
            "stream" if streaming else "unary" for streaming in (handler.request_streaming, handler.response_streaming)
        )
        slot = "_".join(kinds)
        inner = getattr(handler, slot)
        wrap = self._around_stream if inspect.isasyncgenfunction(inner) else self._around_answer
        return cast("grpc.RpcMethodHandler[Q, A]", handler._replace(**{slot: wrap(inner, handler_call_details.method)}))

    def _around_answer(self, inner: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
        async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                return await inner(request, context)
            except Exception as error:  # noqa: BLE001  This is the edge: nothing may pass it unseen.
                await self._refuse(error, context, method)

        return answer

    def _around_stream(
        self, inner: Callable[..., AsyncIterator[Any]], method: str
    ) -> Callable[..., AsyncIterator[Any]]:
        async def answers(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            try:
                async for message in inner(request, context):
                    yield message
            except Exception as error:  # noqa: BLE001  As above.
                await self._refuse(error, context, method)

        return answers

    async def _refuse(self, error: Exception, context: grpc.aio.ServicerContext[Any, Any], method: str) -> NoReturn:
        if isinstance(error, grpc.aio.AbortError):  # The handler has given its own status.
            raise error
        if isinstance(error, KilnError):
            await context.abort(code_of(error), status_text(str(error)))
        self._log.error("%s failed", method, exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has more")
