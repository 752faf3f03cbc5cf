"""The generated modules are registered under the names that peers know, wherever Python keeps them."""

import pytest

from kiln.protos.kiln.build.v1 import build_pb2 as kiln_build_pb2
from kiln.protos.snix.build.protos import build_pb2, rpc_build_pb2
from kiln.protos.snix.castore.protos import castore_pb2, rpc_blobstore_pb2, rpc_directory_pb2
from kiln.protos.tvix.build.protos import build_pb2 as tvix_build_pb2
from kiln.protos.tvix.build.protos import rpc_build_pb2 as tvix_rpc_build_pb2
from kiln.protos.tvix.castore.protos import castore_pb2 as tvix_castore_pb2

METHODS = {
    "snix.build.v1.BuildService": (rpc_build_pb2, ["DoBuild"]),
    "snix.castore.v1.BlobService": (rpc_blobstore_pb2, ["Stat", "Read", "Put"]),
    "snix.castore.v1.DirectoryService": (rpc_directory_pb2, ["Get", "Put"]),
    "tvix.build.v1.BuildService": (tvix_rpc_build_pb2, ["DoBuild"]),
    "kiln.build.v1.BuildService": (
        kiln_build_pb2,
        ["Capabilities", "Build", "Watch", "ReadLog", "Cancel", "Get", "List", "FindMissing"],
    ),
}
# Field numbers as in the specification of each protocol; what stands here never changes.
REQUEST = {
    "inputs": 1,
    "command_args": 2,
    "working_dir": 3,
    "scratch_paths": 4,
    "inputs_dir": 5,
    "outputs": 6,
    "environment_vars": 7,
    "constraints": 8,
    "additional_files": 9,
    "refscan_needles": 10,
}
OLDER = {"store_dir" if name == "inputs_dir" else name: number for name, number in REQUEST.items() if number < 9}


@pytest.mark.parametrize("service", METHODS)
def test_each_service_has_the_name_and_methods_of_its_protocol(service: str) -> None:
    module, methods = METHODS[service]
    found = module.DESCRIPTOR.services_by_name[service.rpartition(".")[2]]
    assert found.full_name == service
    assert [method.name for method in found.methods] == methods


def test_files_are_imported_by_the_names_of_the_wire() -> None:
    assert castore_pb2.DESCRIPTOR.name == "snix/castore/protos/castore.proto"
    assert build_pb2.DESCRIPTOR.name == "snix/build/protos/build.proto"
    assert tvix_castore_pb2.DESCRIPTOR.name == "tvix/castore/protos/castore.proto"
    assert [file.name for file in build_pb2.DESCRIPTOR.dependencies] == ["snix/castore/protos/castore.proto"]


def test_requests_have_the_numbers_of_their_protocols() -> None:
    assert {field.name: field.number for field in build_pb2.BuildRequest.DESCRIPTOR.fields} == REQUEST
    assert {field.name: field.number for field in tvix_build_pb2.BuildRequest.DESCRIPTOR.fields} == OLDER
