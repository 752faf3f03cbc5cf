"""Requests and results <-> `tvix.build.v1`, the protocol's older shape (pure).

Inputs and outputs lie in the absolute `store_dir`, which is a scratch path without being named; there are no additional
files and no needles. Everything else is as in the present shape, and so are the rules and the request digest.
"""

from collections.abc import Iterable

from google.protobuf.message import DecodeError

from kiln.build.errors import Malformed, RequestInvalid
from kiln.build.events import Output
from kiln.build.model import BuildRequest
from kiln.build.validate import is_clean, refuse
from kiln.build.wire import from_request, refuse_unknown_fields
from kiln.castore.entry_wire import from_tvix_node, to_tvix_node
from kiln.castore.model import NameInvalid, Node, check_name
from kiln.protos.snix.build.protos import build_pb2
from kiln.protos.snix.castore.protos import castore_pb2
from kiln.protos.tvix.build.protos import build_pb2 as tvix_build_pb2


def decode_request(data: bytes) -> BuildRequest:
    """The request that `data` encodes. Raises Malformed, RequestInvalid."""
    try:
        message = tvix_build_pb2.BuildRequest.FromString(data)
    except DecodeError as error:
        raise Malformed("tvix.build.v1.BuildRequest", str(error)) from error
    return from_tvix_request(message)


def from_tvix_request(message: tvix_build_pb2.BuildRequest) -> BuildRequest:
    """The request in `message`. Raises RequestInvalid, with field and index of this shape."""
    refuse_unknown_fields(message)
    store_dir = message.store_dir.removeprefix("/")
    if not store_dir or store_dir == message.store_dir or not is_clean(store_dir):
        refuse("store-dir-clean", "store_dir", -1, message.store_dir, "is not a clean absolute path")
    for index, name in enumerate(message.outputs):
        try:
            check_name(name.encode())
        except NameInvalid as error:
            refuse("output-name", "outputs", index, name, error.why)
    scratch_paths = list(message.scratch_paths)
    implied = len(scratch_paths)
    if store_dir not in scratch_paths:
        # Where it belongs in a sorted list, so that an unsorted one stays unsorted and is refused.
        implied = next((index for index, path in enumerate(scratch_paths) if path > store_dir), implied)
        scratch_paths.insert(implied, store_dir)
    try:
        return from_request(
            build_pb2.BuildRequest(
                # Nodes and Entries have the same bytes, and so have the two shapes' variables and constraints.
                inputs=[castore_pb2.Entry.FromString(node.SerializeToString()) for node in message.inputs],
                command_args=message.command_args,
                working_dir=message.working_dir,
                scratch_paths=scratch_paths,
                inputs_dir=store_dir,
                outputs=[f"{store_dir}/{name}" for name in message.outputs],
                environment_vars=[
                    build_pb2.BuildRequest.EnvVar(key=variable.key, value=variable.value)
                    for variable in message.environment_vars
                ],
                constraints=build_pb2.BuildRequest.BuildConstraints.FromString(message.constraints.SerializeToString())
                if message.HasField("constraints")
                else None,
            )
        )
    except RequestInvalid as error:
        field, index = error.field, error.index
        if field == "inputs_dir" or (field == "scratch_paths" and index == implied):
            field, index = "store_dir", -1
        elif field == "scratch_paths" and index > implied:
            index -= 1
        raise RequestInvalid(field=field, index=index, rule=error.rule, why=error.why) from error


def to_build(
    message: tvix_build_pb2.BuildRequest, request: BuildRequest, outputs: Iterable[Output]
) -> tvix_build_pb2.Build:
    """The answer to `message`, which is `request`: itself as it came, and the outputs by the names it asked for."""
    named = zip((path.rpartition("/")[2].encode() for path in request.outputs), outputs, strict=True)
    return tvix_build_pb2.Build(
        build_request=message,
        outputs=[to_tvix_node(name, output.node) for name, output in sorted(named, key=lambda pair: pair[0])],
    )


def from_build(message: tvix_build_pb2.Build) -> tuple[tuple[bytes, Node], ...]:
    """The outputs by name. Raises EntryUnset, DigestLengthInvalid, TargetInvalid."""
    return tuple(from_tvix_node(node) for node in message.outputs)
