from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiln.build.errors import Malformed
from kiln.build.events import Accepted, Event, Finished, Log, Notice, Phase, PhaseKind, RecordedEvent, Stream, Success
from kiln.build.model import BuildOptions, BuildRequest
from kiln.build.wire_submission import Submission
from kiln.builders.journal import Archive, decode_records, encode_archive, encode_record

BODIES: st.SearchStrategy[RecordedEvent] = st.one_of(
    st.builds(Log, st.binary(max_size=200), st.integers(0, 2**40), st.sampled_from([Stream.OUTPUT, Stream.STDERR])),
    st.builds(Phase, st.sampled_from([PhaseKind.STAGE, PhaseKind.RUN])),
    st.builds(Notice, st.text(), st.text()),
    st.just(Finished(Success(()))),
)
EVENTS = st.builds(
    Event,
    st.just("0123456789abcdef"),
    st.integers(1, 2**40),
    st.integers(0, 2**32).map(float),
    st.integers(0, 2**40),
    st.integers(1, 9),
    BODIES,
)


def without_data(event: Event) -> Event:
    return replace(event, body=replace(event.body, data=b"")) if isinstance(event.body, Log) else event


@given(events=st.lists(EVENTS), start=st.integers(0, 2**40))
def test_a_journal_gives_back_all_events_less_the_bytes_of_the_log(events: list[Event], start: int) -> None:
    encoded = [encode_record(event) for event in events]
    records = list(decode_records(b"".join(encoded), start=start))
    assert [record.event for record in records] == [without_data(event) for event in events]
    assert [record.log_bytes for record in records] == [
        len(event.body.data) if isinstance(event.body, Log) else 0 for event in events
    ]
    ends = [start + len(b"".join(encoded[: i + 1])) for i in range(len(encoded))]
    assert [record.end for record in records] == ends
    assert [record.start for record in records] == [start, *ends][: len(ends)]


@given(events=st.lists(EVENTS, min_size=1), data=st.data())
def test_what_a_crash_left_of_a_journal_is_its_beginning(events: list[Event], data: st.DataObject) -> None:
    encoded = [encode_record(event) for event in events]
    whole = b"".join(encoded)
    cut = data.draw(st.integers(0, len(whole)))
    left = whole[:cut] + data.draw(st.sampled_from([b"", bytes(100)]))  # Cut off, or never written.
    survived = 0
    # Not by `cut`: where a record ends in zeros, those that were never written are its own.
    while survived < len(encoded) and left.startswith(b"".join(encoded[: survived + 1])):
        survived += 1
    assert [record.event for record in decode_records(left, start=0)] == [without_data(e) for e in events[:survived]]


def test_a_flipped_bit_ends_the_journal() -> None:
    event = Event("0123456789abcdef", 1, 0.0, 0, 1, Accepted(b"digest"))
    first, second = encode_record(event), bytearray(encode_record(event))
    second[-1] ^= 1
    assert len(list(decode_records(first + bytes(second) + first, start=0))) == 1


@given(events=st.lists(EVENTS, min_size=1))
def test_an_archive_gives_back_request_events_and_the_last_event(events: list[Event]) -> None:
    submission = Submission(BuildRequest(command=("a",)), BuildOptions(labels={"k": "v"}), "token")
    journal = b"".join(encode_record(event) for event in events)
    archive = Archive.decode(encode_archive(submission, events[-1], journal))
    assert archive.submission == submission
    assert archive.last == events[-1]
    assert archive.journal == journal


def test_an_archive_of_a_running_build_has_no_last_event() -> None:
    archive = Archive.decode(encode_archive(Submission(BuildRequest(command=("a",)), BuildOptions())))
    assert archive.last is None
    assert archive.journal == b""


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_an_archive_that_is_cut_off_is_malformed(cut: int) -> None:
    whole = encode_archive(Submission(BuildRequest(command=("a",)), BuildOptions()))
    with pytest.raises(Malformed):
        Archive.decode(whole[:-cut])
