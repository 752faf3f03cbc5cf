"""The root plan: what a build sees, decided without a file system."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from kiln.build.model import BuildRequest, Constraints
from kiln.build.validate import is_within
from kiln.castore.model import Digest, DirectoryNode, FileNode, SymlinkNode
from kiln.sandbox.plan import (
    HostFacts,
    HostPath,
    Input,
    Network,
    RootPlan,
    Scratch,
    Shell,
    outermost,
    parents,
    plan_root,
)

DIGEST = Digest(b"d" * 32)
TREE = DirectoryNode(DIGEST, 0)
FILE = FileNode(DIGEST, 1)
LINUX = Constraints(system="x86_64-linux")


def planned(host: HostFacts | None = None, **fields: object) -> RootPlan:
    request = BuildRequest(**{"command": ("/x",), "constraints": LINUX, **fields})  # type: ignore[arg-type]
    return plan_root(request, host or HostFacts())


def targets(plan: RootPlan) -> dict[str, object]:
    return {mount.target: mount.source for mount in plan.mounts}


def test_an_empty_request_sees_tmp_dev_proc_and_etc_only() -> None:
    plan = planned()
    assert plan.directories == ("dev", "etc", "proc", "tmp")
    assert [file.path for file in plan.files] == ["etc/group", "etc/hosts", "etc/nsswitch.conf", "etc/passwd"]
    assert targets(plan) == {"tmp": Scratch("tmp")}
    assert plan.network is Network.NONE


def test_inputs_are_read_only_mounts_in_inputs_dir_and_symlinks_are_made() -> None:
    plan = planned(
        inputs_dir="nix/store", inputs=((b"a", TREE), (b"b", FILE), (b"c", SymlinkNode(b"/nowhere"))),
    )  # fmt: skip
    assert targets(plan) == {"tmp": Scratch("tmp"), "nix/store/a": Input(0), "nix/store/b": Input(1)}
    assert [m.writable for m in plan.mounts] == [True, False, False]
    assert [m.is_directory for m in plan.mounts] == [True, True, False]
    assert [(link.path, link.target) for link in plan.links] == [("nix/store/c", b"/nowhere")]
    assert {"nix", "nix/store", "nix/store/a"} <= set(plan.directories)


def test_nested_scratch_is_one_mount_with_a_directory_in_it() -> None:
    plan = planned(scratch_paths=("build", "build/deep/er"), working_dir="build")
    assert targets(plan) == {"build": Scratch("build"), "tmp": Scratch("tmp")}
    build = next(root for root in plan.scratch if root.root == "build")
    assert build.directories == ("build/deep", "build/deep/er")


def test_inputs_in_scratch_get_mount_points_there_and_none_in_the_root() -> None:
    plan = planned(scratch_paths=("nix/store",), inputs_dir="nix/store", inputs=((b"a", TREE), (b"b", FILE)))
    store = next(root for root in plan.scratch if root.root == "nix/store")
    assert store.mount_points == (("nix/store/a", True), ("nix/store/b", False))
    assert store.holds_inputs
    assert "nix/store/a" not in plan.directories
    order = [mount.target for mount in plan.mounts]
    assert order.index("nix/store") < order.index("nix/store/a")


def test_scratch_tmp_is_the_private_tmp() -> None:
    assert targets(planned(scratch_paths=("tmp",))) == {"tmp": Scratch("tmp")}


def test_files_in_scratch_are_the_builds_own_and_others_are_not() -> None:
    plan = planned(scratch_paths=("build",), additional_files=(("build/a/b", b"1"), ("opt/c", b"2")))
    build = next(root for root in plan.scratch if root.root == "build")
    assert [(file.path, file.mode) for file in build.files] == [("build/a/b", 0o644)]
    assert "build/a" in build.directories
    assert ("opt/c", 0o444) in [(file.path, file.mode) for file in plan.files]
    assert "opt" in plan.directories


def test_an_additional_file_replaces_kilns_own_of_that_name() -> None:
    plan = planned(additional_files=(("etc/hosts", b"mine"),))
    assert [file.contents for file in plan.files if file.path == "etc/hosts"] == [b"mine"]


def test_an_input_etc_at_the_root_replaces_kilns_own_whole() -> None:
    plan = planned(inputs=((b"etc", TREE),))
    assert not [file for file in plan.files if file.path.startswith("etc")]
    assert targets(plan)["etc"] == Input(0)


def test_network_files_are_there_only_with_the_network() -> None:
    host = HostFacts(network=Network.PRIVATE, network_files=(("etc/resolv.conf", b"nameserver 1"),))
    assert "etc/resolv.conf" not in [file.path for file in planned(host).files]
    plan = planned(host, constraints=dataclasses.replace(LINUX, network_access=True))
    assert "etc/resolv.conf" in [file.path for file in plan.files]
    assert plan.network is Network.PRIVATE


def test_shell_and_host_paths_are_mounts() -> None:
    host = HostFacts(ro_paths=(("/dev/kvm", False), ("/opt/sdk", True)), devices=frozenset({"/dev/kvm"}))
    plan = planned(
        host,
        constraints=Constraints(
            system="x86_64-linux", provide_bin_sh=True, available_ro_paths=("/dev/kvm", "/opt/sdk")
        ),
    )
    found = targets(plan)
    assert found["bin/sh"] == Shell()
    assert found["dev/kvm"] == HostPath("/dev/kvm")
    assert {m.target: m.device for m in plan.mounts}["dev/kvm"]
    assert not {m.target: m.device for m in plan.mounts}["opt/sdk"]


def test_pwd_is_always_the_working_directory_and_home_only_a_default() -> None:
    assert planned(scratch_paths=("b",), working_dir="b").environment == (("PWD", b"/b"), ("HOME", b"/"))
    given_home = planned(environment=(("HOME", b"/h"), ("PWD", b"/lie")))
    assert given_home.environment == (("HOME", b"/h"), ("PWD", b"/"))


def test_i686_is_32_bit() -> None:
    assert planned(constraints=Constraints(system="i686-linux")).is_32_bit
    assert not planned().is_32_bit


PATHS = st.lists(st.sampled_from(["a", "b", "a/b", "a/b/c", "ab", "a/c", "a-b", "b/x"]), max_size=8)


@given(paths=PATHS)
def test_outermost_covers_all_and_none_covers_another(paths: list[str]) -> None:
    found = outermost(paths)
    assert all(any(is_within(path, root) for root in found) for path in paths)
    assert not [(one, other) for one in found for other in found if one != other and is_within(one, other)]


@given(scratch=PATHS, files=PATHS)
def test_parents_come_before_what_stands_in_them(scratch: list[str], files: list[str]) -> None:
    free = sorted({f"{path}/file" for path in files})
    plan = planned(scratch_paths=tuple(sorted(scratch)), additional_files=tuple((path, b"") for path in free))
    made: set[str] = set()
    for directory in plan.directories:
        assert all(parent in made for parent in parents(directory))
        made.add(directory)
    for root in plan.scratch:
        inside = {root.root}
        for directory in root.directories:
            assert directory.rpartition("/")[0] in inside
            inside.add(directory)
        assert all(file.path.rpartition("/")[0] in inside for file in root.files)


def test_a_path_as_deep_as_can_be_is_planned() -> None:
    deep = "x" + "/a" * 2045
    plan = planned(scratch_paths=(deep,), outputs=(deep,))
    assert [scratch.root for scratch in plan.scratch] == ["tmp", deep]
    assert set(parents(deep)) < set(plan.directories)
