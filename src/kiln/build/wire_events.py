"""Events, verdicts and failures <-> `kiln.build.v1` (pure).

What a newer peer says in enum values, details or verdicts that are not known here is kept as far as it is understood;
an event that is not known at all is None.
"""

from collections.abc import Iterable
from typing import assert_never

from google.protobuf.message import DecodeError

from kiln.build.errors import Malformed
from kiln.build.events import (
    Accepted,
    Assigned,
    AttemptEnded,
    BuilderInfo,
    BuildEvent,
    CacheHit,
    Cancelling,
    Detail,
    Event,
    ExitDetail,
    Failure,
    FieldDetail,
    Finished,
    Heartbeat,
    LimitDetail,
    Log,
    MissingDetail,
    Notice,
    Output,
    OutputReady,
    PathDetail,
    Phase,
    PhaseKind,
    PhaseSpan,
    Progress,
    Queued,
    Reason,
    Refusal,
    Retry,
    Sample,
    Stream,
    Success,
    UnmetDetail,
    Usage,
    Wait,
)
from kiln.build.wire_submission import from_options, to_labels, to_options
from kiln.build.wire_values import from_time, to_duration, to_enum, to_text, to_timestamp
from kiln.castore.entry_wire import EntryUnset, from_entry, to_entry
from kiln.castore.model import Digest, FileNode
from kiln.protos.kiln.build.v1 import build_pb2


def encode_event(event: Event) -> bytes:
    """`event` as bytes, always the same ones."""
    return to_event(event).SerializeToString(deterministic=True)


def decode_event(data: bytes) -> Event | None:
    """The event that `data` encodes. Raises Malformed, and what `from_event` raises."""
    try:
        message = build_pb2.Event.FromString(data)
    except DecodeError as error:
        raise Malformed("kiln.build.v1.Event", str(error)) from error
    return from_event(message)


def from_event(message: build_pb2.Event) -> Event | None:
    """The event in `message`; None if it is of a kind unknown here: skip it, but count its `seq` as seen.

    Raises EntryUnset, DigestLengthInvalid, TargetInvalid, OptionInvalid.
    """
    body: BuildEvent
    match message.WhichOneof("event"):
        case "accepted":
            body = _from_accepted(message.accepted)
        case "queued":
            queued = message.queued
            body = Queued(to_enum(Wait, queued.wait), queued.detail, queued.ahead, _from_refusals(queued.refusals))
        case "assigned":
            assigned = message.assigned
            body = Assigned(from_builder(assigned.builder), assigned.memory_bytes, assigned.emulated)
        case "phase":
            body = Phase(to_enum(PhaseKind, message.phase.kind))
        case "log":
            body = Log(message.log.data, message.log.offset, to_enum(Stream, message.log.stream))
        case "output":
            body = OutputReady(message.output.index, _from_output(message.output.output))
        case "notice":
            body = Notice(message.notice.kind, message.notice.text, dict(message.notice.fields))
        case "attempt_ended":
            body = AttemptEnded(from_failure(message.attempt_ended.failure), message.attempt_ended.next)
        case "cancelling":
            body = Cancelling(message.cancelling.by, message.cancelling.why)
        case "finished":
            body = _from_finished(message.finished)
        case "progress":
            progress = message.progress
            body = Progress(
                to_enum(PhaseKind, progress.kind),
                progress.done_bytes,
                progress.total_bytes,
                progress.done,
                progress.total,
                progress.ahead,
            )
        case "sample":
            body = Sample(_from_usage(message.sample))
        case "heartbeat":
            body = Heartbeat(message.heartbeat.head_seq, message.heartbeat.log_size)
        case None:
            return None
    return Event(message.build_id, message.seq, from_time(message.time), message.elapsed_us, message.attempt, body)


def to_event(event: Event) -> build_pb2.Event:
    """`event` as a message."""
    message = build_pb2.Event(
        build_id=event.build_id,
        seq=event.seq,
        time=to_timestamp(event.time_s),
        elapsed_us=event.elapsed_us,
        attempt=event.attempt,
    )
    match event.body:
        case Accepted() as accepted:
            message.accepted.CopyFrom(_to_accepted(accepted))
        case Queued(wait, detail, ahead, refusals):
            queued = build_pb2.Queued(
                wait=build_pb2.Wait.ValueType(wait.value),
                detail=to_text(detail),
                ahead=ahead,
                refusals=_to_refusals(refusals),
            )
            message.queued.CopyFrom(queued)
        case Assigned(builder, memory_bytes, emulated):
            assigned = build_pb2.Assigned(builder=to_builder(builder), memory_bytes=memory_bytes, emulated=emulated)
            message.assigned.CopyFrom(assigned)
        case Phase(kind):
            message.phase.CopyFrom(build_pb2.Phase(kind=build_pb2.PhaseKind.ValueType(kind.value)))
        case Log(data, offset, stream):
            log = build_pb2.Log(data=data, offset=offset, stream=build_pb2.Stream.ValueType(stream.value))
            message.log.CopyFrom(log)
        case OutputReady(index, output):
            message.output.CopyFrom(build_pb2.OutputReady(index=index, output=_to_output(output)))
        case Notice(kind=notice_kind, text=text, fields=fields):
            notice = build_pb2.Notice(kind=notice_kind, text=to_text(text), fields=to_labels(fields))
            message.notice.CopyFrom(notice)
        case AttemptEnded(failure, next_step):
            ended = build_pb2.AttemptEnded(failure=to_failure(failure), next=to_text(next_step))
            message.attempt_ended.CopyFrom(ended)
        case Cancelling(by, why):
            message.cancelling.CopyFrom(build_pb2.Cancelling(by=to_text(by), why=to_text(why)))
        case Finished() as finished:
            message.finished.CopyFrom(_to_finished(finished))
        case Progress() as progress:
            message.progress.CopyFrom(
                build_pb2.Progress(
                    kind=build_pb2.PhaseKind.ValueType(progress.kind.value),
                    done_bytes=progress.done_bytes,
                    total_bytes=progress.total_bytes,
                    done=progress.done,
                    total=progress.total,
                    ahead=progress.ahead,
                )
            )
        case Sample(usage):
            message.sample.CopyFrom(_to_usage(usage))
        case Heartbeat(head_seq, log_size):
            message.heartbeat.CopyFrom(build_pb2.Heartbeat(head_seq=head_seq, log_size=log_size))
        case _:
            assert_never(event.body)
    return message


def _from_accepted(message: build_pb2.Accepted) -> Accepted:
    return Accepted(
        request_digest=message.request_digest,
        cache_key=message.cache_key,
        merged_into=message.merged_into,
        effective=from_options(message.effective) if message.HasField("effective") else None,
        kept_until_s=from_time(message.kept_until) if message.HasField("kept_until") else None,
        server_epoch=message.server_epoch,
    )


def _to_accepted(accepted: Accepted) -> build_pb2.Accepted:
    return build_pb2.Accepted(
        request_digest=accepted.request_digest,
        cache_key=accepted.cache_key,
        merged_into=accepted.merged_into,
        effective=None if accepted.effective is None else to_options(accepted.effective),
        kept_until=None if accepted.kept_until_s is None else to_timestamp(accepted.kept_until_s),
        server_epoch=accepted.server_epoch,
    )


def _from_refusals(messages: Iterable[build_pb2.Refusal]) -> tuple[Refusal, ...]:
    return tuple(Refusal(message.worker, message.constraint, message.wanted, message.has) for message in messages)


def _to_refusals(refusals: Iterable[Refusal]) -> list[build_pb2.Refusal]:
    return [
        build_pb2.Refusal(
            worker=to_text(refusal.worker),
            constraint=to_text(refusal.constraint),
            wanted=to_text(refusal.wanted),
            has=to_text(refusal.has),
        )
        for refusal in refusals
    ]


def from_builder(message: build_pb2.Builder) -> BuilderInfo:
    """Who runs builds. Raises DigestLengthInvalid."""
    return BuilderInfo(
        worker=message.worker,
        url=message.url,
        builder_id=message.builder_id,
        version=message.version,
        contract=message.contract,
        system=message.system,
        shell_digest=Digest(message.shell_digest) if message.shell_digest else None,
        weaker=dict(message.weaker),
    )


def to_builder(builder: BuilderInfo) -> build_pb2.Builder:
    """`builder` as a message."""
    return build_pb2.Builder(
        worker=to_text(builder.worker),
        url=to_text(builder.url),
        builder_id=builder.builder_id,
        version=builder.version,
        contract=builder.contract,
        system=builder.system,
        shell_digest=builder.shell_digest.raw if builder.shell_digest else b"",
        weaker=to_labels(builder.weaker),
    )


def _from_output(message: build_pb2.Output) -> Output:
    _, node = from_entry(message.entry)
    return Output(node, tuple(message.needles), message.bytes, message.files)


def _to_output(output: Output) -> build_pb2.Output:
    return build_pb2.Output(
        entry=to_entry(b"", output.node), needles=output.needles, bytes=output.bytes, files=output.files
    )


def _from_usage(message: build_pb2.Usage) -> Usage:
    return Usage(
        wall_s=from_time(message.wall),
        user_s=from_time(message.user),
        system_s=from_time(message.system),
        memory=message.memory,
        memory_peak=message.memory_peak,
        read_bytes=message.read_bytes,
        write_bytes=message.write_bytes,
        processes_peak=message.processes_peak,
        memory_stall_s=from_time(message.memory_stall),
        disk_peak=message.disk_peak,
        unmeasured=tuple(message.unmeasured),
    )


def _to_usage(usage: Usage) -> build_pb2.Usage:
    return build_pb2.Usage(
        wall=to_duration(usage.wall_s),
        user=to_duration(usage.user_s),
        system=to_duration(usage.system_s),
        memory=usage.memory,
        memory_peak=usage.memory_peak,
        read_bytes=usage.read_bytes,
        write_bytes=usage.write_bytes,
        processes_peak=usage.processes_peak,
        memory_stall=to_duration(usage.memory_stall_s),
        disk_peak=usage.disk_peak,
        unmeasured=usage.unmeasured,
    )


def _from_finished(message: build_pb2.Finished) -> Finished:
    match message.WhichOneof("verdict"):
        case "success":
            verdict: Success | Failure = _from_success(message.success)
        case "failure":
            verdict = from_failure(message.failure)
        case None:
            verdict = Failure(Reason.UNSPECIFIED, "the server's verdict is of a kind that is not known here")
    return Finished(
        verdict=verdict,
        usage=_from_usage(message.usage),
        builder=from_builder(message.builder) if message.HasField("builder") else None,
        log=_from_log(message) if message.HasField("log") else None,
        log_truncated=message.log_truncated,
        spans=tuple(PhaseSpan(to_enum(PhaseKind, span.kind), span.from_us, span.to_us) for span in message.spans),
    )


def _from_log(message: build_pb2.Finished) -> FileNode:
    _, node = from_entry(message.log)
    if not isinstance(node, FileNode):
        raise EntryUnset
    return node


def _to_finished(finished: Finished) -> build_pb2.Finished:
    verdict = finished.verdict
    return build_pb2.Finished(
        success=_to_success(verdict) if isinstance(verdict, Success) else None,
        failure=to_failure(verdict) if isinstance(verdict, Failure) else None,
        usage=_to_usage(finished.usage),
        builder=None if finished.builder is None else to_builder(finished.builder),
        log=None if finished.log is None else to_entry(b"", finished.log),
        log_truncated=finished.log_truncated,
        spans=[
            build_pb2.PhaseSpan(
                kind=build_pb2.PhaseKind.ValueType(span.kind.value), from_us=span.from_us, to_us=span.to_us
            )
            for span in finished.spans
        ],
    )


def _from_success(message: build_pb2.Success) -> Success:
    cached = message.cached
    return Success(
        outputs=tuple(_from_output(output) for output in message.outputs),
        cached=CacheHit(cached.origin_build_id, from_time(cached.made)) if message.HasField("cached") else None,
        cacheable=message.cacheable,
        why_not=message.why_not,
    )


def _to_success(success: Success) -> build_pb2.Success:
    cached = success.cached
    return build_pb2.Success(
        outputs=[_to_output(output) for output in success.outputs],
        cached=None
        if cached is None
        else build_pb2.CacheHit(origin_build_id=cached.origin_build_id, made=to_timestamp(cached.made_s)),
        cacheable=success.cacheable,
        why_not=to_text(success.why_not),
    )


def from_failure(message: build_pb2.Failure) -> Failure:
    """The failure in `message`. Raises DigestLengthInvalid."""
    return Failure(
        reason=to_enum(Reason, message.reason),
        message=message.message,
        retry=to_enum(Retry, message.retry),
        detail=_from_detail(message),
        log_tail=message.log_tail,
        near=tuple(message.near),
    )


def _from_detail(message: build_pb2.Failure) -> Detail | None:
    match message.WhichOneof("detail"):
        case "exit":
            return ExitDetail(message.exit.code, message.exit.signal, message.exit.core)
        case "field":
            return FieldDetail(message.field.path, message.field.index, message.field.rule)
        case "missing":
            return MissingDetail(
                tuple(Digest(raw) for raw in message.missing.blobs),
                tuple(Digest(raw) for raw in message.missing.directories),
                message.missing.more,
            )
        case "unmet":
            return UnmetDetail(_from_refusals(message.unmet.refusals))
        case "limit":
            return LimitDetail(message.limit.what, message.limit.limit, message.limit.peak)
        case "path":
            return PathDetail(message.path)
        case None:
            return None


def to_failure(failure: Failure) -> build_pb2.Failure:
    """`failure` as a message."""
    message = build_pb2.Failure(
        reason=build_pb2.Reason.ValueType(failure.reason.value),
        message=to_text(failure.message),
        retry=build_pb2.Retry.ValueType(failure.retry.value),
        log_tail=failure.log_tail,
        near=[to_text(path) for path in failure.near],
    )
    match failure.detail:
        case ExitDetail(code, signal, core):
            message.exit.CopyFrom(build_pb2.Exit(code=code, signal=signal, core=core))
        case FieldDetail(path, index, rule):
            message.field.CopyFrom(build_pb2.Field(path=path, index=index, rule=rule))
        case MissingDetail(blobs, directories, more):
            missing = build_pb2.Missing(
                blobs=[digest.raw for digest in blobs], directories=[digest.raw for digest in directories], more=more
            )
            message.missing.CopyFrom(missing)
        case UnmetDetail(refusals):
            message.unmet.CopyFrom(build_pb2.Unmet(refusals=_to_refusals(refusals)))
        case LimitDetail(what, limit, peak):
            message.limit.CopyFrom(build_pb2.Limit(what=what, limit=limit, peak=peak))
        case PathDetail(path):
            message.path = to_text(path)
        case None:
            pass
        case _:
            assert_never(failure.detail)
    return message
