"""A build's journal: its recorded events as a row of bytes, and the archive of a build that ended (pure).

Each record is a header and an event. The header has, little-endian, 4 bytes each: the event's length, how many bytes of
the log it stands for, and its CRC-32; the event is a `kiln.build.v1.Event`, that of log bytes without them, since those
are in the log. What a crash cut off or left as zeros ends the journal.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from kiln.build.errors import Malformed
from kiln.build.events import Event, Log
from kiln.build.wire_events import decode_event, encode_event
from kiln.build.wire_submission import Submission, from_submission, to_submission
from kiln.protos.kiln.build.v1 import build_pb2

_HEADER = struct.Struct("<III")
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Record:
    """An event and where in the journal it is. A `Log` in it may lack its data, `log_bytes` of it."""

    event: Event
    log_bytes: int
    start: int
    end: int


def encode_record(event: Event) -> bytes:
    """The record of `event`."""
    log_bytes = 0
    if isinstance(event.body, Log):
        log_bytes = len(event.body.data)
        event = replace(event, body=replace(event.body, data=b""))
    encoded = encode_event(event)
    return _HEADER.pack(len(encoded), log_bytes, zlib.crc32(encoded)) + encoded


def decode_records(data: bytes, *, start: int) -> Iterator[Record]:
    """The whole records at the beginning of `data`, which stands at `start` in the journal."""
    position = 0
    while position + _HEADER.size <= len(data):
        length, log_bytes, checksum = _HEADER.unpack_from(data, position)
        end = position + _HEADER.size + length
        encoded = data[position + _HEADER.size : end]
        if not length or end > len(data) or zlib.crc32(encoded) != checksum:
            return
        event = decode_event(encoded)
        if event is not None:  # Else a newer kiln wrote it.
            yield Record(event, log_bytes, start + position, start + end)
        position = end


def encode_archive(submission: Submission, last: Event | None = None, journal: bytes = b"") -> bytes:
    """What is kept of a build: what was asked and, once it ended, its last event and its journal."""
    return _encoded(to_submission(submission).SerializeToString(deterministic=True), last, journal)


def _encoded(submission: bytes, last: Event | None, journal: bytes) -> bytes:
    parts = (
        submission,
        b"" if last is None else encode_event(last),
        zlib.compress(journal, 1) if journal else b"",
    )
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


@dataclass(frozen=True, slots=True)
class Archive:
    """What is kept of a build, decoded as far as it is asked for."""

    submission_bytes: bytes
    last_bytes: bytes
    journal_bytes: bytes

    @classmethod
    def decode(cls, data: bytes) -> "Archive":
        """Raises Malformed."""
        parts = []
        position = 0
        while position < len(data):
            if position + _LENGTH.size > len(data):
                raise Malformed("record of a build", "it is cut off")
            (length,) = _LENGTH.unpack_from(data, position)
            position += _LENGTH.size + length
            if position > len(data):
                raise Malformed("record of a build", "it is cut off")
            parts.append(data[position - length : position])
        if len(parts) != 3:
            raise Malformed("record of a build", f"it has {len(parts)} parts instead of 3")
        return cls(*parts)

    def ended(self, last: Event, journal: bytes) -> bytes:
        """The archive of the same build with its end. What was asked is not judged again: rules change with kilns."""
        return _encoded(self.submission_bytes, last, journal)

    @property
    def submission(self) -> Submission:
        """What was asked. Raises RequestInvalid, OptionInvalid."""
        return from_submission(build_pb2.Submission.FromString(self.submission_bytes))

    @property
    def last(self) -> Event | None:
        """The last event; None while it runs."""
        return decode_event(self.last_bytes) if self.last_bytes else None

    @property
    def journal(self) -> bytes:
        """All events; empty while it runs. Raises Malformed."""
        try:
            return zlib.decompress(self.journal_bytes) if self.journal_bytes else b""
        except zlib.error as error:
            raise Malformed("record of a build", str(error)) from error
