"""A failure as the gRPC status of a unary call, small enough to arrive (pure).

gRPC core refuses trailers over 8 KiB to 16 KiB, and the caller would see RESOURCE_EXHAUSTED instead of the reason
(grpc/grpc#37852). The sentence travels twice, the second time in the details, and the details as base64.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from google.protobuf.message import DecodeError

from kiln.build.errors import RequestInvalid
from kiln.build.events import Failure, FieldDetail, MissingDetail, PathDetail, Reason, UnmetDetail
from kiln.build.wire_events import from_failure, to_failure
from kiln.build.wire_values import to_text
from kiln.errors import Invalid
from kiln.protos.kiln.build.v1 import build_pb2, status_pb2

STATUS_BYTES_MAX = 3500  # Message and details together.

# By what a blind retry would do: clients and proxies repeat UNAVAILABLE, and none of the others.
CODES: Mapping[Reason, tuple[str, int]] = MappingProxyType(
    {
        Reason.UNSPECIFIED: ("UNKNOWN", 2),
        Reason.INVALID_REQUEST: ("INVALID_ARGUMENT", 3),
        Reason.MISSING_INPUT: ("FAILED_PRECONDITION", 9),
        Reason.UNSATISFIABLE: ("FAILED_PRECONDITION", 9),
        Reason.DENIED: ("PERMISSION_DENIED", 7),
        Reason.COMMAND_FAILED: ("FAILED_PRECONDITION", 9),
        Reason.OUTPUT_MISSING: ("FAILED_PRECONDITION", 9),
        Reason.OUTPUT_INVALID: ("FAILED_PRECONDITION", 9),
        Reason.TIMED_OUT: ("FAILED_PRECONDITION", 9),
        Reason.RESOURCES_EXHAUSTED: ("FAILED_PRECONDITION", 9),
        Reason.CANCELLED: ("CANCELLED", 1),
        Reason.INFRASTRUCTURE: ("UNAVAILABLE", 14),
    }
)
_TEXT_CHARS_MIN = 200  # A shorter text is not cut.


@dataclass(frozen=True, slots=True)
class UnaryStatus:
    """A gRPC status: its code's name, its message, and the bytes of `grpc-status-details-bin`."""

    code: str
    message: str
    details: bytes

    @property
    def size(self) -> int:
        """Bytes of message and details."""
        return len(self.message.encode()) + len(self.details)


def invalid_request(error: RequestInvalid) -> Failure:
    """The failure that says what `error` does."""
    return Failure(Reason.INVALID_REQUEST, str(error), detail=FieldDetail(error.field, error.index, error.rule))


def unary_status(failure: Failure) -> UnaryStatus:
    """The status for `failure`, of at most STATUS_BYTES_MAX.

    What does not fit is cut: first the log's tail (from its start), then what lay near, then lists, at last text.
    """
    status = _status(failure)
    if status.size <= STATUS_BYTES_MAX:
        return status
    bare = replace(failure, log_tail=b"")
    # Less the tags and lengths that the tail brings with it, and those of the two messages around it that may grow.
    room = STATUS_BYTES_MAX - _status(bare).size - 8
    if room > 0:
        return _status(replace(failure, log_tail=failure.log_tail[-room:]))
    while _status(bare).size > STATUS_BYTES_MAX:
        bare = _shorter(bare)
    return _status(bare)


def failure_in(details: bytes) -> Failure | None:
    """The failure that `grpc-status-details-bin` carries; None if it has none that can be read."""
    try:
        status = status_pb2.Status.FromString(details)
        for detail in status.details:
            message = build_pb2.Failure()
            if detail.Unpack(message):
                return from_failure(message)
    except (DecodeError, Invalid):
        return None
    return None


def _status(failure: Failure) -> UnaryStatus:
    code, number = CODES[failure.reason]
    message = to_text(failure.message)
    status = status_pb2.Status(code=number, message=message)
    status.details.add().Pack(to_failure(failure))
    return UnaryStatus(code, message, status.SerializeToString(deterministic=True))


def _shorter(failure: Failure) -> Failure:
    """`failure` with less in it."""
    if failure.near:
        return replace(failure, near=failure.near[: len(failure.near) // 2])
    match failure.detail:
        case MissingDetail(blobs, directories) if blobs or directories:
            kept = MissingDetail(blobs[: len(blobs) // 2], directories[: len(directories) // 2], more=True)
            return replace(failure, detail=kept)
        case UnmetDetail(refusals) if refusals:
            return replace(failure, detail=UnmetDetail(refusals[: len(refusals) // 2]))
        case PathDetail(path) if len(path) > _TEXT_CHARS_MIN and len(path) >= len(failure.message):
            return replace(failure, detail=PathDetail(path[: len(path) // 2] + "…"))
        case _ if len(failure.message) > _TEXT_CHARS_MIN:
            return replace(failure, message=failure.message[: len(failure.message) // 2] + "…")
        case _:
            return replace(failure, detail=None)
