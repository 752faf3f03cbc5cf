"""Everything that `kiln.build.v1` says, there and back; and what a newer peer may say."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiln.build import events
from kiln.build.errors import Malformed, OptionInvalid
from kiln.build.model import BuildOptions, BuildRequest, CacheUse
from kiln.build.service import BuildInfo, Capabilities
from kiln.build.wire_events import (
    decode_event,
    encode_event,
    from_event,
    from_failure,
    to_event,
    to_failure,
)
from kiln.build.wire_host import from_build_info, from_capabilities, to_build_info, to_capabilities
from kiln.build.wire_json import event_from_json, event_to_json, failure_from_json, failure_to_json
from kiln.build.wire_submission import Submission, from_options, from_submission, to_options, to_submission
from kiln.castore.entry_wire import EntryUnset
from kiln.castore.model import Digest, DirectoryNode, FileNode, Node, SymlinkNode
from kiln.protos.kiln.build.v1 import build_pb2
from kiln.protos.snix.castore.protos import castore_pb2

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
texts = st.lists(text, max_size=2).map(tuple)
labels = st.dictionaries(text, text, max_size=2)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
i32 = st.integers(-(2**31), 2**31 - 1)
flags = st.booleans()
seconds = st.integers(0, 10**13).map(lambda ms: ms / 1000)
digests = st.binary(min_size=32, max_size=32).map(Digest)
files = st.builds(FileNode, digests, u64, flags)
nodes: st.SearchStrategy[Node] = st.one_of(
    st.builds(DirectoryNode, digests, u64),
    files,
    st.binary(min_size=1, max_size=8).filter(lambda target: 0 not in target).map(SymlinkNode),
)
options = st.builds(
    BuildOptions,
    wall_s=st.none() | seconds,
    silence_s=st.none() | seconds,
    memory_bytes=u64,
    cpu_millis=u32,
    processes=u32,
    disk_bytes=u64,
    log_bytes=u64,
    priority=i32,
    cache=st.sampled_from(CacheUse),
    cancel_on_disconnect=flags,
    disconnect_grace_s=seconds,
    keep_on_failure_s=st.none() | seconds,
    split_stderr=flags,
    attempts=u32,
    prefer_local=flags,
    sample_every_s=seconds,
)
refusals = st.lists(st.builds(events.Refusal, text, text, text, text), max_size=2).map(tuple)
builders = st.builds(
    events.BuilderInfo, text, text, text, text, text, text, shell_digest=st.none() | digests, weaker=labels
)
usages = st.builds(
    events.Usage,
    wall_s=seconds,
    user_s=seconds,
    system_s=seconds,
    memory=u64,
    memory_peak=u64,
    read_bytes=u64,
    write_bytes=u64,
    processes_peak=u32,
    memory_stall_s=seconds,
    disk_peak=u64,
    unmeasured=texts,
)
outputs = st.builds(events.Output, nodes, st.lists(u64, max_size=3).map(tuple), u64, u64)
digest_lists = st.lists(digests, max_size=2).map(tuple)
details = st.one_of(
    st.none(),
    st.builds(events.ExitDetail, i32, i32, flags),
    st.builds(events.FieldDetail, text, st.integers(-1, 2**62), text),
    st.builds(events.MissingDetail, digest_lists, digest_lists, flags),
    st.builds(events.UnmetDetail, refusals),
    st.builds(events.LimitDetail, text, u64, u64),
    st.builds(events.PathDetail, text),
)
failures = st.builds(
    events.Failure,
    st.sampled_from(events.Reason),
    text,
    st.sampled_from(events.Retry),
    details,
    st.binary(max_size=8),
    texts,
)
successes = st.builds(
    events.Success,
    st.lists(outputs, max_size=2).map(tuple),
    st.none() | st.builds(events.CacheHit, text, seconds),
    flags,
    text,
)
kinds = st.sampled_from(events.PhaseKind)
BODIES: dict[type[events.BuildEvent], st.SearchStrategy[events.BuildEvent]] = {
    events.Accepted: st.builds(
        events.Accepted,
        st.binary(max_size=4),
        st.binary(max_size=4),
        text,
        st.none() | options,
        st.none() | seconds,
        text,
    ),
    events.Queued: st.builds(events.Queued, st.sampled_from(events.Wait), text, u64, refusals),
    events.Assigned: st.builds(events.Assigned, builders, u64, flags),
    events.Phase: st.builds(events.Phase, kinds),
    events.Log: st.builds(events.Log, st.binary(max_size=8), u64, st.sampled_from(events.Stream)),
    events.OutputReady: st.builds(events.OutputReady, u32, outputs),
    events.Notice: st.builds(events.Notice, text, text, labels),
    events.AttemptEnded: st.builds(events.AttemptEnded, failures, text),
    events.Cancelling: st.builds(events.Cancelling, text, text),
    events.Finished: st.builds(
        events.Finished,
        st.one_of(successes, failures),
        usages,
        st.none() | builders,
        st.none() | files,
        flags,
        st.lists(st.builds(events.PhaseSpan, kinds, u64, u64), max_size=2).map(tuple),
    ),
    events.Progress: st.builds(events.Progress, kinds, u64, u64, u64, u64, u64),
    events.Sample: st.builds(events.Sample, usages),
    events.Heartbeat: st.builds(events.Heartbeat, u64, u64),
}
all_events = st.builds(events.Event, text, u64, seconds, u64, u32, st.one_of(*BODIES.values()))


@pytest.mark.parametrize("kind", BODIES, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_every_event_survives_the_wire_and_json(kind: type[events.BuildEvent], data: st.DataObject) -> None:
    event = data.draw(st.builds(events.Event, text, u64, seconds, u64, u32, BODIES[kind]))
    encoded = encode_event(event)
    assert decode_event(encoded) == event
    assert encode_event(event) == encoded
    assert event_from_json(json.dumps(event_to_json(event))) == event


def test_the_kinds_of_event_are_those_of_the_protocol() -> None:
    assert len(BODIES) == len(build_pb2.Event.DESCRIPTOR.oneofs_by_name["event"].fields)
    for wire, kind in (
        (build_pb2.Reason, events.Reason),
        (build_pb2.Retry, events.Retry),
        (build_pb2.Stream, events.Stream),
        (build_pb2.PhaseKind, events.PhaseKind),
        (build_pb2.Wait, events.Wait),
        (build_pb2.Cache, CacheUse),
    ):
        names = {number: name.partition("_")[2] for name, number in wire.items()}
        assert {member.value: member.name for member in kind} == names


@given(failures)
def test_every_failure_survives_the_wire_and_json(failure: events.Failure) -> None:
    assert from_failure(to_failure(failure)) == failure
    assert failure_from_json(json.dumps(failure_to_json(failure))) == failure


@given(options, labels, text, texts)
def test_every_submission_survives_the_wire(
    chosen: BuildOptions, notes: dict[str, str], token: str, features: tuple[str, ...]
) -> None:
    submission = Submission(BuildRequest(command=("x",)), replace(chosen, labels=notes), token, features)
    assert from_submission(to_submission(submission)) == submission
    assert from_options(to_options(chosen)) == chosen


@given(st.builds(Capabilities, texts, texts, st.lists(builders, max_size=2).map(tuple), options, text, u32, text))
def test_capabilities_survive_the_wire(capabilities: Capabilities) -> None:
    assert from_capabilities(to_capabilities(capabilities)) == capabilities


@given(
    st.builds(
        BuildInfo,
        text,
        st.none() | all_events,
        u64,
        u64,
        st.none() | st.just(BuildRequest(command=("x",))),
        labels,
        st.binary(max_size=4),
    )
)
def test_what_is_known_of_a_build_survives_the_wire(info: BuildInfo) -> None:
    assert from_build_info(to_build_info(info)) == info


def test_an_event_of_a_newer_kind_is_skipped_and_its_number_is_there_to_be_counted() -> None:
    data = build_pb2.Event(build_id="b", seq=7).SerializeToString() + b"\xfa\x06\x00"  # Number 111, empty.
    assert decode_event(data) is None
    assert build_pb2.Event.FromString(data).seq == 7


NEWER_PHASE = build_pb2.PhaseKind.ValueType(99)
NEWER_FAILURE = build_pb2.Failure(
    reason=build_pb2.Reason.ValueType(99), retry=build_pb2.Retry.ValueType(99), message="m"
)


@pytest.mark.parametrize(
    ("message", "body"),
    [
        (build_pb2.Event(phase=build_pb2.Phase(kind=NEWER_PHASE)), events.Phase(events.PhaseKind.UNSPECIFIED)),
        (
            build_pb2.Event(queued=build_pb2.Queued(wait=build_pb2.Wait.ValueType(99))),
            events.Queued(events.Wait.UNSPECIFIED),
        ),
        (
            build_pb2.Event(log=build_pb2.Log(stream=build_pb2.Stream.ValueType(99))),
            events.Log(b"", 0, events.Stream.UNSPECIFIED),
        ),
        (
            build_pb2.Event(finished=build_pb2.Finished(failure=NEWER_FAILURE)),
            events.Finished(events.Failure(events.Reason.UNSPECIFIED, "m", events.Retry.NEVER)),
        ),
    ],
    ids=str,
)
def test_an_unknown_number_of_an_enum_means_0_and_never_a_retry(
    message: build_pb2.Event, body: events.BuildEvent
) -> None:
    event = from_event(message)
    assert event is not None
    assert event.body == body
    newer = build_pb2.Options(cache=build_pb2.Cache.ValueType(99), on_disconnect=build_pb2.Disconnect.ValueType(99))
    assert from_options(newer) == BuildOptions()


def test_a_verdict_of_a_newer_kind_is_a_failure_that_nobody_retries() -> None:
    event = from_event(build_pb2.Event(finished=build_pb2.Finished()))
    assert event is not None
    assert isinstance(event.body, events.Finished)
    assert isinstance(event.body.verdict, events.Failure)
    assert event.body.verdict.retry is events.Retry.NEVER


def test_fields_of_a_newer_peer_are_ignored_outside_of_the_request() -> None:
    event = events.Event("b", 1, 2.5, 3, 1, events.Heartbeat(4, 5))
    assert decode_event(encode_event(event) + b"\xfa\x07\x00") == event
    assert event_from_json(json.dumps({**event_to_json(event), "newer": 1})) == event


def test_a_log_that_is_no_file_is_refused() -> None:
    entry = castore_pb2.Entry(symlink=castore_pb2.SymlinkEntry(target=b"x"))
    with pytest.raises(EntryUnset):
        from_event(build_pb2.Event(finished=build_pb2.Finished(log=entry)))


def test_bytes_that_are_no_event_are_malformed() -> None:
    with pytest.raises(Malformed, match=r"kiln\.build\.v1\.Event"):
        decode_event(b"\x0a\xff")


def test_a_path_that_is_not_unicode_is_escaped_where_a_person_reads_it() -> None:
    failure = events.Failure(
        events.Reason.OUTPUT_INVALID, "m\udcff", detail=events.PathDetail("a\udcfe"), near=("\udcfd",)
    )
    sent = from_failure(to_failure(failure))
    assert (sent.message, sent.detail, sent.near) == ("m\\xff", events.PathDetail("a\\xfe"), ("\\xfd",))


@pytest.mark.parametrize("name", ["wall", "silence", "disconnect_grace", "keep_on_failure", "sample_every"])
def test_an_option_below_0_seconds_is_refused_by_name(name: str) -> None:
    below: dict[str, Any] = {name: {"seconds": 0, "nanos": -1}}
    with pytest.raises(OptionInvalid, match=name):
        from_options(build_pb2.Options(**below))


@given(st.floats(0, 4e9))
def test_times_come_back_to_the_nanosecond(wall_s: float) -> None:
    sent = from_options(to_options(BuildOptions(wall_s=wall_s))).wall_s
    assert sent is not None
    assert math.isclose(sent, wall_s, rel_tol=0, abs_tol=0.6e-9 + math.ulp(wall_s))
    assert to_event(events.Event("", 0, wall_s, 0, 0, events.Heartbeat(0, 0))).time.nanos < 10**9
