"""Times, enums and text <-> what protobuf has for them (pure)."""

import math
from enum import Enum
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

E = TypeVar("E", bound=Enum)
_NS = 10**9


def to_duration(seconds: float) -> Duration:
    """`seconds`, 0 or more, to the nanosecond."""
    whole, nanos = _split(seconds)
    return Duration(seconds=whole, nanos=nanos)


def to_timestamp(seconds: float) -> Timestamp:
    """Unix time to the nanosecond, as far as a float has it."""
    whole, nanos = _split(seconds)
    return Timestamp(seconds=whole, nanos=nanos)


def from_time(time: Duration | Timestamp) -> float:
    """Seconds."""
    # Division of integers rounds once, so that a decimal fraction comes back as the float it was.
    return (time.seconds * _NS + time.nanos) / _NS


def _split(seconds: float) -> tuple[int, int]:
    whole = math.floor(seconds)
    nanos = round((seconds - whole) * _NS)  # The difference is exact.
    return (whole + 1, 0) if nanos == _NS else (whole, nanos)


def to_enum(kind: type[E], number: int) -> E:
    """The member of `kind`; a number of the future means 0."""
    try:
        return kind(number)
    except ValueError:
        return kind(0)


def to_text(text: str) -> str:
    r"""`text` as it can be sent: where it holds bytes of a path that are not UTF-8 (surrogates), as \x escapes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
