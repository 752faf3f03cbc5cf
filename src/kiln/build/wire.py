"""Requests and results <-> `snix.build.v1`, the protocol's present shape (pure)."""

from collections.abc import Iterable, Iterator

from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from kiln.build.errors import Malformed
from kiln.build.events import Output
from kiln.build.model import BuildRequest, Constraints
from kiln.build.validate import refuse
from kiln.castore.entry_wire import EntryUnset, from_entry, to_entry
from kiln.castore.model import DigestLengthInvalid, Node, TargetInvalid
from kiln.protos.snix.build.protos import build_pb2
from kiln.protos.snix.castore.protos import castore_pb2


def decode_request(data: bytes) -> BuildRequest:
    """The request that `data` encodes. Raises Malformed, RequestInvalid."""
    try:
        message = build_pb2.BuildRequest.FromString(data)
    except DecodeError as error:
        raise Malformed("snix.build.v1.BuildRequest", str(error)) from error
    return from_request(message)


def encode_request(request: BuildRequest) -> bytes:
    """The one encoding of `request` that kiln writes: see `kiln.build.digest`."""
    return to_request(request).SerializeToString(deterministic=True)


def from_request(message: build_pb2.BuildRequest) -> BuildRequest:
    """The request in `message`. Raises RequestInvalid."""
    refuse_unknown_fields(message)
    return BuildRequest(
        inputs=from_inputs(message.inputs),
        command=tuple(message.command_args),
        working_dir=message.working_dir,
        scratch_paths=tuple(message.scratch_paths),
        inputs_dir=message.inputs_dir,
        outputs=tuple(message.outputs),
        environment=tuple((variable.key, variable.value) for variable in message.environment_vars),
        constraints=from_constraints(message.constraints) if message.HasField("constraints") else Constraints(),
        additional_files=tuple((file.path, file.contents) for file in message.additional_files),
        refscan_needles=tuple(message.refscan_needles),
    )


def to_request(request: BuildRequest) -> build_pb2.BuildRequest:
    """`request` as a message."""
    asked = request.constraints
    return build_pb2.BuildRequest(
        inputs=[to_entry(name, node) for name, node in request.inputs],
        command_args=request.command,
        working_dir=request.working_dir,
        scratch_paths=request.scratch_paths,
        inputs_dir=request.inputs_dir,
        outputs=request.outputs,
        environment_vars=[build_pb2.BuildRequest.EnvVar(key=key, value=value) for key, value in request.environment],
        constraints=None
        if asked.system is None
        else build_pb2.BuildRequest.BuildConstraints(
            system=asked.system,
            min_memory=asked.min_memory,
            available_ro_paths=asked.available_ro_paths,
            network_access=asked.network_access,
            provide_bin_sh=asked.provide_bin_sh,
        ),
        additional_files=[
            build_pb2.BuildRequest.AdditionalFile(path=path, contents=contents)
            for path, contents in request.additional_files
        ],
        refscan_needles=request.refscan_needles,
    )


def from_inputs(entries: Iterable[castore_pb2.Entry]) -> tuple[tuple[bytes, Node], ...]:
    """The nodes of a request's inputs; their names are for the request to check. Raises RequestInvalid."""
    return tuple(_from_input(index, entry) for index, entry in enumerate(entries))


def _from_input(index: int, entry: castore_pb2.Entry) -> tuple[bytes, Node]:
    try:
        return from_entry(entry)
    except EntryUnset:
        refuse("input-unset", "inputs", index, b"", "is neither directory nor file nor symlink")
    except DigestLengthInvalid as error:
        name = entry.directory.name or entry.file.name
        refuse("input-digest", "inputs", index, name, f"has a digest of {error.length} bytes")
    except TargetInvalid as error:
        refuse("input-target", "inputs", index, entry.symlink.name, f"has a target that {error.why}")


def from_constraints(message: build_pb2.BuildRequest.BuildConstraints) -> Constraints:
    """The constraints in `message`."""
    return Constraints(
        system=message.system,
        min_memory=message.min_memory,
        available_ro_paths=tuple(message.available_ro_paths),
        network_access=message.network_access,
        provide_bin_sh=message.provide_bin_sh,
    )


def from_response(message: build_pb2.BuildResponse) -> tuple[Output, ...]:
    """The outputs in the order of the request. Raises EntryUnset, DigestLengthInvalid, TargetInvalid."""
    return tuple(Output(from_entry(found.output)[1], tuple(found.needles)) for found in message.outputs)


def to_response(outputs: Iterable[Output]) -> build_pb2.BuildResponse:
    """`outputs`, in the order of the request, as a message; their entries have no names."""
    return build_pb2.BuildResponse(
        outputs=[
            build_pb2.BuildResponse.Output(output=to_entry(b"", output.node), needles=output.needles)
            for output in outputs
        ]
    )


def refuse_unknown_fields(request: Message) -> None:
    """Raise RequestInvalid for a field, in `request` or any message in it, that this kiln does not know."""
    known = type(request)()
    known.CopyFrom(request)
    known.DiscardUnknownFields()
    if known.ByteSize() == request.ByteSize():
        return  # The walk below is Python, and takes 2 ms for 500 inputs.
    for field, index, message in _parts("", -1, request):
        unknown = UnknownFieldSet(message)
        if len(unknown):
            number = f"{message.DESCRIPTOR.full_name} {unknown[0].field_number}"
            refuse("unknown-field", field, index, number, "is no field that is known here")


def _parts(field: str, index: int, message: Message) -> Iterator[tuple[str, int, Message]]:
    """`message` and those in it, each with the path of the field that holds it and the place in its list."""
    yield field, index, message
    for inner, value in message.ListFields():
        if inner.message_type is None:
            continue
        path = f"{field}.{inner.name}" if field else inner.name
        if inner.is_repeated:
            for place, part in enumerate(value):
                yield from _parts(path, place, part)
        else:
            yield from _parts(path, index, value)
