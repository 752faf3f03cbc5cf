"""How servicers of builds take and give messages: as bytes, so that what does not parse is the client's fault."""

from typing import NoReturn, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from kiln.build.errors import Malformed
from kiln.build.events import Failure
from kiln.build.unary_status import unary_status
from kiln.rpc.requests import ClientGone

M = TypeVar("M", bound=Message)

Context = grpc.aio.ServicerContext[bytes, bytes]

BUILD_ID_HEADER = "kiln-build-id"


def parsed(kind: type[M], data: bytes) -> M:
    """The message that `data` encodes. Raises Malformed, where gRPC itself would answer INTERNAL."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise Malformed(kind.DESCRIPTOR.full_name, str(error)) from error


async def send_build_id(context: Context, build_id: str) -> None:
    """Send the initial metadata, with the build's id in it. Raises ClientGone."""
    try:
        await context.send_initial_metadata(((BUILD_ID_HEADER, build_id),))
    except grpc.aio.InternalError as error:
        raise ClientGone from error


async def send(context: Context, message: Message) -> None:
    """Send one message of a stream; waits while the client takes none. Raises ClientGone."""
    try:
        await context.write(message.SerializeToString())
    except grpc.aio.InternalError as error:
        raise ClientGone from error


async def refuse(context: Context, failure: Failure) -> NoReturn:
    """End the call with the status for `failure`."""
    status = unary_status(failure)
    details = (("grpc-status-details-bin", status.details),)
    await context.abort(grpc.StatusCode[status.code], status.message, details)
