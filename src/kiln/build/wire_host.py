"""What a host tells of itself and of its builds <-> `kiln.build.v1` (pure)."""

from kiln.build.model import BuildOptions
from kiln.build.service import BuildInfo, Capabilities
from kiln.build.wire import from_request, to_request
from kiln.build.wire_events import from_builder, from_event, to_builder, to_event
from kiln.build.wire_submission import from_options, to_labels, to_options
from kiln.protos.kiln.build.v1 import build_pb2


def from_capabilities(message: build_pb2.CapabilitiesReply) -> Capabilities:
    """What can be asked of a host. Raises DigestLengthInvalid, OptionInvalid."""
    return Capabilities(
        systems=tuple(message.systems),
        features=tuple(message.features),
        builders=tuple(from_builder(builder) for builder in message.builders),
        maxima=from_options(message.maxima) if message.HasField("maxima") else BuildOptions(),
        castore_scheme=message.castore_scheme,
        message_bytes_max=message.max_message_bytes,
        version=message.version,
    )


def to_capabilities(capabilities: Capabilities) -> build_pb2.CapabilitiesReply:
    """`capabilities` as a message."""
    return build_pb2.CapabilitiesReply(
        systems=capabilities.systems,
        features=capabilities.features,
        builders=[to_builder(builder) for builder in capabilities.builders],
        maxima=to_options(capabilities.maxima),
        castore_scheme=capabilities.castore_scheme,
        max_message_bytes=capabilities.message_bytes_max,
        version=capabilities.version,
    )


def from_build_info(message: build_pb2.BuildInfo) -> BuildInfo:
    """What is known of one build. Raises RequestInvalid, and what `from_event` raises."""
    return BuildInfo(
        build_id=message.build_id,
        last=from_event(message.last) if message.HasField("last") else None,
        first_seq=message.first_seq,
        head_seq=message.head_seq,
        request=from_request(message.request) if message.HasField("request") else None,
        labels=dict(message.labels),
        request_digest=message.request_digest,
    )


def to_build_info(info: BuildInfo) -> build_pb2.BuildInfo:
    """`info` as a message."""
    return build_pb2.BuildInfo(
        build_id=info.build_id,
        last=None if info.last is None else to_event(info.last),
        first_seq=info.first_seq,
        head_seq=info.head_seq,
        request=None if info.request is None else to_request(info.request),
        labels=to_labels(info.labels),
        request_digest=info.request_digest,
    )
