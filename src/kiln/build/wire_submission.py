"""What a client submits <-> `kiln.build.v1` (pure)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from google.protobuf.duration_pb2 import Duration

from kiln.build.errors import OptionInvalid
from kiln.build.model import BuildOptions, BuildRequest, CacheUse
from kiln.build.wire import from_request, to_request
from kiln.build.wire_values import from_time, to_duration, to_enum, to_text
from kiln.protos.kiln.build.v1 import build_pb2


@dataclass(frozen=True, slots=True)
class Submission:
    """A request, how this run of it is to go (labels included), and what makes a repetition the same build."""

    request: BuildRequest
    options: BuildOptions
    client_token: str = ""
    must_understand: tuple[str, ...] = ()


def from_submission(message: build_pb2.Submission) -> Submission:
    """The submission in `message`. Raises RequestInvalid, OptionInvalid."""
    return Submission(
        request=from_request(message.request),
        options=replace(from_options(message.options), labels=dict(message.labels)),
        client_token=message.client_token,
        must_understand=tuple(message.must_understand),
    )


def to_submission(submission: Submission) -> build_pb2.Submission:
    """`submission` as a message."""
    return build_pb2.Submission(
        request=to_request(submission.request),
        options=to_options(submission.options),
        client_token=submission.client_token,
        must_understand=submission.must_understand,
        labels=to_labels(submission.options.labels),
    )


def to_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """`labels` in an order that depends on nothing else."""
    return {to_text(key): to_text(labels[key]) for key in sorted(labels)}


def from_options(message: build_pb2.Options) -> BuildOptions:
    """The options in `message`, without labels. Raises OptionInvalid for a time below 0."""
    return BuildOptions(
        wall_s=_optional_s(message, "wall"),
        silence_s=_optional_s(message, "silence"),
        memory_bytes=message.memory_bytes,
        cpu_millis=message.cpu_millis,
        processes=message.processes,
        disk_bytes=message.disk_bytes,
        log_bytes=message.log_bytes,
        priority=message.priority,
        cache=to_enum(CacheUse, message.cache),
        cancel_on_disconnect=message.on_disconnect == build_pb2.DISCONNECT_CANCEL,
        disconnect_grace_s=_optional_s(message, "disconnect_grace") or 0.0,
        keep_on_failure_s=_optional_s(message, "keep_on_failure"),
        split_stderr=message.split_stderr,
        attempts=message.attempts,
        prefer_local=message.prefer_local,
        sample_every_s=_optional_s(message, "sample_every") or 0.0,
    )


def to_options(options: BuildOptions) -> build_pb2.Options:
    """`options` as a message; labels travel beside it, the build's id not at all."""
    return build_pb2.Options(
        wall=_optional_duration(options.wall_s),
        silence=_optional_duration(options.silence_s),
        memory_bytes=options.memory_bytes,
        cpu_millis=options.cpu_millis,
        processes=options.processes,
        disk_bytes=options.disk_bytes,
        log_bytes=options.log_bytes,
        priority=options.priority,
        cache=build_pb2.Cache.ValueType(options.cache.value),
        on_disconnect=build_pb2.DISCONNECT_CANCEL if options.cancel_on_disconnect else build_pb2.DISCONNECT_KEEP,
        disconnect_grace=_optional_duration(options.disconnect_grace_s or None),
        keep_on_failure=_optional_duration(options.keep_on_failure_s),
        split_stderr=options.split_stderr,
        attempts=options.attempts,
        prefer_local=options.prefer_local,
        sample_every=_optional_duration(options.sample_every_s or None),
    )


def _optional_s(options: build_pb2.Options, name: str) -> float | None:
    if name not in {field.name for field, _ in options.ListFields()}:
        return None
    duration: Duration = getattr(options, name)
    seconds = from_time(duration)
    if seconds < 0:
        raise OptionInvalid(name, f"{seconds} s is below 0")
    return seconds


def _optional_duration(seconds: float | None) -> Duration | None:
    return None if seconds is None else to_duration(seconds)
