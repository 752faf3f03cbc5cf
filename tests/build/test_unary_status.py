"""A failed unary build arrives with its reason, whatever it drags along."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiln.build.errors import RequestInvalid
from kiln.build.events import (
    Detail,
    ExitDetail,
    Failure,
    FieldDetail,
    LimitDetail,
    MissingDetail,
    PathDetail,
    Reason,
    Refusal,
    Retry,
    UnmetDetail,
)
from kiln.build.model import BuildRequest
from kiln.build.unary_status import CODES, STATUS_BYTES_MAX, failure_in, invalid_request, unary_status
from kiln.castore.model import Digest
from kiln.protos.kiln.build.v1 import status_pb2

# As in the design's table of reasons.
DESIGN = {
    "INVALID_REQUEST": "INVALID_ARGUMENT",
    "MISSING_INPUT": "FAILED_PRECONDITION",
    "UNSATISFIABLE": "FAILED_PRECONDITION",
    "DENIED": "PERMISSION_DENIED",
    "COMMAND_FAILED": "FAILED_PRECONDITION",
    "OUTPUT_MISSING": "FAILED_PRECONDITION",
    "OUTPUT_INVALID": "FAILED_PRECONDITION",
    "TIMED_OUT": "FAILED_PRECONDITION",
    "RESOURCES_EXHAUSTED": "FAILED_PRECONDITION",
    "CANCELLED": "CANCELLED",
    "INFRASTRUCTURE": "UNAVAILABLE",
    "UNSPECIFIED": "UNKNOWN",
}
MANY = tuple(Digest(number.to_bytes(32, "big")) for number in range(200))


@pytest.mark.parametrize("reason", Reason)
def test_each_reason_has_the_code_of_the_design(reason: Reason) -> None:
    status = unary_status(Failure(reason, "why"))
    assert status.code == DESIGN[reason.name] == CODES[reason][0]
    parsed = status_pb2.Status.FromString(status.details)
    assert (parsed.code, parsed.message, status.message) == (CODES[reason][1], "why", "why")
    assert parsed.details[0].type_url == "type.googleapis.com/kiln.build.v1.Failure"


def test_the_status_has_the_bytes_of_googles() -> None:
    # google/rpc/status.proto: code 1, message 2, details 3.
    assert status_pb2.Status(code=3, message="m").SerializeToString() == b"\x08\x03\x12\x01m"
    assert status_pb2.Status.DESCRIPTOR.fields_by_name["details"].number == 3


def test_a_failure_that_fits_arrives_whole() -> None:
    failure = Failure(Reason.COMMAND_FAILED, "exit 3", Retry.NEVER, ExitDetail(3), b"last words\n")
    assert failure_in(unary_status(failure).details) == failure


def test_of_a_long_log_the_last_bytes_arrive_and_all_the_rest() -> None:
    tail = bytes(range(256)) * 40
    failure = Failure(Reason.COMMAND_FAILED, "exit 3", detail=ExitDetail(3), log_tail=tail)
    status = unary_status(failure)
    assert STATUS_BYTES_MAX - 16 <= status.size <= STATUS_BYTES_MAX
    sent = failure_in(status.details)
    assert sent is not None
    assert (sent.message, sent.detail) == (failure.message, failure.detail)
    assert len(sent.log_tail) > 3000
    assert tail.endswith(sent.log_tail)


@pytest.mark.parametrize(
    "detail",
    [
        None,
        FieldDetail("f" * 5000, 1, "rule"),
        MissingDetail(MANY, MANY),
        UnmetDetail(tuple(Refusal(f"worker{number}", "memory", "1", "0") for number in range(300))),
        UnmetDetail((Refusal("w" * 5000, "memory", "1", "0"),)),
        LimitDetail("l" * 5000, 1, 2),
        PathDetail("é" * 4000),
    ],
    ids=lambda detail: type(detail).__name__,
)
@pytest.mark.parametrize("message", ["short", "ü" * 5000])
@pytest.mark.parametrize("near", [(), tuple(f"build/{number}" for number in range(2000))])
def test_no_failure_is_too_large_to_arrive(detail: Detail | None, message: str, near: tuple[str, ...]) -> None:
    status = unary_status(Failure(Reason.MISSING_INPUT, message, Retry.AFTER_UPLOAD, detail, b"x" * 9000, near))
    assert status.size <= STATUS_BYTES_MAX
    sent = failure_in(status.details)
    assert sent is not None
    assert (sent.reason, sent.retry) == (Reason.MISSING_INPUT, Retry.AFTER_UPLOAD)
    assert sent.message[:5] == message[:5]
    if isinstance(detail, MissingDetail) and message == "short":
        assert isinstance(sent.detail, MissingDetail)
        assert sent.detail.more
        assert sent.detail.blobs


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=3000), st.binary(max_size=4000))
def test_the_limit_holds_at_every_length(message: str, tail: bytes) -> None:
    status = unary_status(Failure(Reason.INFRASTRUCTURE, message, log_tail=tail))
    assert status.size <= STATUS_BYTES_MAX
    sent = failure_in(status.details)
    assert sent is not None
    assert tail.endswith(sent.log_tail)


@given(st.binary(max_size=40))
def test_details_of_another_peer_are_no_failure(details: bytes) -> None:
    assert failure_in(details) is None


def test_a_broken_rule_is_told_with_field_index_and_rule() -> None:
    with pytest.raises(RequestInvalid) as caught:
        BuildRequest(command=("x",), outputs=("../x",))
    failure = invalid_request(caught.value)
    assert failure.detail == FieldDetail("outputs", 0, "output-clean")
    assert failure.message.startswith('outputs[0]: "../x" is not a clean relative path')
