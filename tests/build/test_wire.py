"""Requests over the wires of real peers, and back."""

import json
import string
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st

from kiln.build import wire_tvix
from kiln.build.cache_key import cache_key
from kiln.build.digest import request_digest
from kiln.build.errors import Malformed, RequestInvalid
from kiln.build.events import Output
from kiln.build.model import BuildRequest, Constraints
from kiln.build.validate import check_outputs_sorted
from kiln.build.wire import decode_request, encode_request, from_response, to_response
from kiln.build.wire_json import request_from_json, request_to_json
from kiln.build.wire_tvix import from_build, from_tvix_request, to_build
from kiln.castore.entry_wire import EntryUnset, from_entry, from_tvix_node, to_entry, to_tvix_node
from kiln.castore.model import (
    BLAKE3_DOCUMENTED,
    BLAKE3_DOUBLED,
    Digest,
    DigestLengthInvalid,
    DirectoryNode,
    FileNode,
    Node,
    SymlinkNode,
    TargetInvalid,
)
from kiln.protos.snix.build.protos import build_pb2
from kiln.protos.snix.castore.protos import castore_pb2
from kiln.protos.tvix.build.protos import build_pb2 as tvix_build_pb2

Golden = Callable[[str], list[dict[str, Any]]]

# What real Snix lets pass and no sandbox could carry out.
REFUSED_BY_KILN = {
    "empty_message": "empty-command",
    "empty_command": "empty-command",
    "duplicate_outputs": "output-overlaps-output",
    "duplicate_env_key": "duplicate-environment-name",
    "duplicate_additional_file": "additional-file-repeated",
    "output_outside_scratch": "output-outside-scratch",
    "additional_file_empty_path": "additional-file-empty",
    "needle_empty_string": "empty-needle",
    "nul_in_path": "nul-byte",
    "nul_in_command": "nul-byte",
}
# Real Snix refuses them for the order of their outputs alone; of the first, the paths are in no scratch path either.
REFUSED_WHERE_STRICT = {"outputs_unsorted", "outputs_path_sorted_not_byte_sorted"}
FIELDS = {
    "input": "inputs",
    "second": "inputs",
    "two": "inputs",
    "working": "working_dir",
    "scratch": "scratch_paths",
    "outputs": "outputs",
    "env": "environment_vars",
    "constraints": "constraints.system",
    "ro": "constraints.available_ro_paths",
    "additional": "additional_files",
}


def test_what_snix_passes_is_accepted_and_written_as_snix_does_but_for_ten_named_rules(golden: Golden) -> None:
    refused = {}
    for case in golden("build_request.json"):
        if not case["valid"]:
            continue
        data = bytes.fromhex(case["request_hex"])
        try:
            request = decode_request(data)
        except RequestInvalid as error:
            refused[case["name"]] = error.rule
        else:
            assert encode_request(request) == data, case["name"]
            check_outputs_sorted(request)
            assert [name.hex() for name, _ in request.inputs] == [i["name_hex"] for i in case["request"]["inputs"]]
            assert list(request.command) == case["request"]["command_args"]
            assert list(request.outputs) == case["request"]["outputs"]
            assert list(request.refscan_needles) == case["request"]["refscan_needles"]
    assert refused == REFUSED_BY_KILN


def test_what_snix_refuses_is_refused_for_the_same_field_but_for_the_order_of_outputs(golden: Golden) -> None:
    cases = [case for case in golden("build_request.json") if not case["valid"]]
    assert len(cases) == 63
    for case in cases:
        data = bytes.fromhex(case["request_hex"])
        if case["name"] == "outputs_path_sorted_not_byte_sorted":
            request = decode_request(data)
            assert request.outputs == ("build/a", "build-a")
            with pytest.raises(RequestInvalid, match="stands after"):
                check_outputs_sorted(request)
            continue
        with pytest.raises(RequestInvalid) as caught:
            decode_request(data)
        if case["name"] == "outputs_unsorted":
            assert caught.value.rule == "output-outside-scratch"
        first = case["name"].split("_")[0]
        field = "inputs_dir" if case["name"].startswith("inputs_dir") else FIELDS.get(first, "inputs")
        assert caught.value.field == field, case["name"]
        _, at, position = case["answers"]["dummy"]["message"].partition(" at position")
        if at:
            assert str(caught.value.index) == position.lstrip(": ").partition(":")[0], case["name"]


def test_the_two_original_tests_of_the_protocol(golden: Golden) -> None:
    cases = golden("tvix.json")
    assert len(cases) == 2
    for case in cases:
        data = bytes.fromhex(case["build_request_hex"])
        message = tvix_build_pb2.BuildRequest.FromString(data)
        assert message.SerializeToString() == data
        assert MessageToDict(message, preserving_proto_field_name=True) == case["build_request"]
        request = wire_tvix.decode_request(data)
        store_path = "nix/store/" + case["build_request"]["outputs"][0]
        assert (request.inputs_dir, request.scratch_paths) == ("nix/store", ("build", "nix/store"))
        assert request.outputs == (store_path,)
        assert len(request.inputs) == len(case["build_request"].get("inputs", []))
        # The snix shape of the same request over the same nodes is named by the same digest.
        assert request_digest(decode_request(encode_request(request))) == request_digest(request)
        node = FileNode(Digest(bytes(32)), 3)
        answer = to_build(message, request, [Output(node)])
        assert answer.build_request.SerializeToString() == data
        assert from_build(answer) == ((case["build_request"]["outputs"][0].encode(), node),)


def test_the_older_answer_is_sorted_by_name_whatever_the_order_of_the_request() -> None:
    message = tvix_build_pb2.BuildRequest(command_args=["x"], store_dir="/s", outputs=["b", "a"])
    of_b, of_a = SymlinkNode(b"b"), SymlinkNode(b"a")
    answer = to_build(message, from_tvix_request(message), [Output(of_b), Output(of_a)])
    assert from_build(answer) == ((b"a", of_a), (b"b", of_b))


def test_an_implied_scratch_path_that_is_named_as_well_is_there_once() -> None:
    message = tvix_build_pb2.BuildRequest(command_args=["x"], store_dir="/s", scratch_paths=["a", "s", "z"])
    assert from_tvix_request(message).scratch_paths == ("a", "s", "z")


digests = st.binary(min_size=32, max_size=32).map(Digest)
sizes = st.integers(0, 2**64 - 1)
nodes: st.SearchStrategy[Node] = st.one_of(
    st.builds(DirectoryNode, digests, sizes),
    st.builds(FileNode, digests, sizes, st.booleans()),
    st.binary(min_size=1, max_size=50).filter(lambda target: b"\0" not in target).map(SymlinkNode),
)
components = st.text(string.ascii_letters + "é ~", min_size=1, max_size=8)
input_names = st.binary(min_size=1, max_size=8).filter(
    lambda name: not {0, 47} & set(name) and name not in {b".", b".."}
)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
arguments = text.filter(lambda value: "\0" not in value)
constraints = st.builds(
    Constraints,
    system=text.filter(bool),
    min_memory=sizes,
    available_ro_paths=st.sets(components).map(lambda found: tuple(sorted(f"/host/{name}" for name in found))),
    network_access=st.booleans(),
    provide_bin_sh=st.booleans(),
)
requests = st.builds(
    BuildRequest,
    inputs=st.dictionaries(input_names, nodes, max_size=4).map(lambda found: tuple(sorted(found.items()))),
    command=st.lists(arguments, max_size=3).map(lambda rest: ("program", *rest)),
    working_dir=st.sampled_from(["", "build", "build/below", "inputs", "tmp"]),
    scratch_paths=st.just(("build", "build2")),
    inputs_dir=st.just("inputs"),
    outputs=st.lists(components, unique=True, max_size=4).map(lambda names: tuple(f"build/{name}" for name in names)),
    environment=st.dictionaries(
        arguments.filter(lambda key: key and "=" not in key), st.binary(max_size=5).map(lambda v: v.replace(b"\0", b""))
    ).map(lambda found: tuple(sorted(found.items()))),
    additional_files=st.dictionaries(components, st.binary(max_size=5), max_size=3).map(
        lambda found: tuple(sorted((f"build2/{name}", contents) for name, contents in found.items()))
    ),
    refscan_needles=st.lists(text.filter(bool), max_size=4).map(tuple),
    constraints=st.just(Constraints()) | constraints,
)


@given(requests)
def test_every_request_survives_the_wire_and_json(request: BuildRequest) -> None:
    data = encode_request(request)
    assert decode_request(data) == request
    assert encode_request(decode_request(data)) == data
    assert request_from_json(json.dumps(request_to_json(request))) == request


@given(requests)
def test_both_shapes_of_a_request_have_one_digest(request: BuildRequest) -> None:
    snix = replace(request, additional_files=(), refscan_needles=(), working_dir="", inputs_dir="build", inputs=())
    older = tvix_build_pb2.BuildRequest(
        command_args=snix.command,
        scratch_paths=["build2"],
        store_dir="/build",
        outputs=[path.removeprefix("build/") for path in snix.outputs],
        environment_vars=[tvix_build_pb2.BuildRequest.EnvVar(key=key, value=value) for key, value in snix.environment],
    )
    if snix.constraints.system is not None:
        older.constraints.system = snix.constraints.system
        older.constraints.min_memory = snix.constraints.min_memory
        older.constraints.available_ro_paths.extend(snix.constraints.available_ro_paths)
        older.constraints.network_access = snix.constraints.network_access
        older.constraints.provide_bin_sh = snix.constraints.provide_bin_sh
    assert from_tvix_request(older) == snix
    assert request_digest(from_tvix_request(older)) == request_digest(snix)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_request_or_refused_with_a_name(data: bytes) -> None:
    for decode in (decode_request, wire_tvix.decode_request):
        with suppress(Malformed, RequestInvalid):
            assert decode(data).command


@given(st.lists(st.builds(Output, nodes, st.lists(sizes, max_size=3).map(tuple)), max_size=3).map(tuple))
def test_every_response_survives_the_wire(outputs: tuple[Output, ...]) -> None:
    message = to_response(outputs)
    assert from_response(build_pb2.BuildResponse.FromString(message.SerializeToString())) == outputs
    assert all(not from_entry(output.output)[0] for output in message.outputs)


@given(st.binary(max_size=8), nodes)
def test_every_node_survives_both_wires(name: bytes, node: Node) -> None:
    assert from_entry(to_entry(name, node)) == (name, node)
    assert from_tvix_node(to_tvix_node(name, node)) == (name, node)
    assert to_tvix_node(name, node).SerializeToString() == to_entry(name, node).SerializeToString()


def test_an_entry_that_is_no_node_is_refused_by_what_is_wrong_with_it() -> None:
    with pytest.raises(EntryUnset):
        from_entry(castore_pb2.Entry())
    with pytest.raises(DigestLengthInvalid):
        from_entry(castore_pb2.Entry(directory=castore_pb2.DirectoryEntry(digest=b"short")))
    with pytest.raises(TargetInvalid):
        from_entry(castore_pb2.Entry(symlink=castore_pb2.SymlinkEntry(target=b"a\0")))


def test_the_request_digest_is_what_the_documentation_says() -> None:
    # Field 2 twice, then 3, 4 and 6: /sh x, build, build, build/out. The digest is `b3sum` of the tag and that.
    request = BuildRequest(command=("/sh", "x"), working_dir="build", scratch_paths=("build",), outputs=("build/out",))
    assert encode_request(request) == (b"\x12\x03/sh\x12\x01x\x1a\x05build\x22\x05build\x32\x09build/out")
    assert request_digest(request).hex() == "cec87c9eed59020eec92f0bd0749d2887a600f550bf159682388c0b7e1aa7a0e"


KEYED = BuildRequest(
    command=("x",),
    scratch_paths=("build",),
    outputs=("build/b", "build/a"),
    refscan_needles=("y", "x", "y"),
    constraints=Constraints(system="x86_64-linux", min_memory=1, provide_bin_sh=True),
)


def test_the_cache_key_is_the_same_for_what_decides_no_byte() -> None:
    key = cache_key(KEYED, scheme=BLAKE3_DOUBLED)
    for same in (
        replace(KEYED, constraints=replace(KEYED.constraints, min_memory=2)),
        replace(KEYED, outputs=("build/a", "build/b")),
        replace(KEYED, refscan_needles=("x", "y")),
    ):
        assert cache_key(same, scheme=BLAKE3_DOUBLED) == key
        assert request_digest(same) != request_digest(KEYED)
    no_shell = replace(KEYED, constraints=Constraints(system="x86_64-linux"))
    assert cache_key(no_shell, scheme=BLAKE3_DOUBLED, shell=Digest(bytes(32))) == cache_key(
        no_shell, scheme=BLAKE3_DOUBLED
    )


def test_the_cache_key_differs_for_whatever_decides_a_byte() -> None:
    def key(request: BuildRequest = KEYED, **more: Any) -> bytes:
        return cache_key(request, **({"scheme": BLAKE3_DOUBLED} | more))

    keys = [
        key(),
        key(shell=Digest(bytes(32))),
        key(shell=Digest(b"\1" * 32)),
        key(salt=b"x"),
        key(scheme=BLAKE3_DOCUMENTED),
        key(replace(KEYED, command=("y",))),
        key(replace(KEYED, outputs=("build/b",))),
        key(replace(KEYED, refscan_needles=("x",))),
        key(replace(KEYED, constraints=replace(KEYED.constraints, system="i686-linux"))),
        key(replace(KEYED, environment=(("A", b""),))),
    ]
    assert len(set(keys)) == len(keys)
