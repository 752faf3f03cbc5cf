"""Each rule refuses what it is about, by its own name, and nothing else."""

import tracemalloc
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiln.build.errors import RequestInvalid
from kiln.build.model import BuildRequest, Constraints
from kiln.build.validate import RULES, Paths, check_outputs_sorted, is_within
from kiln.build.wire import decode_request, encode_request, from_request
from kiln.build.wire_tvix import from_tvix_request
from kiln.castore.model import Digest, DirectoryNode, FileNode, SymlinkNode
from kiln.protos.snix.build.protos import build_pb2
from kiln.protos.snix.castore.protos import castore_pb2
from kiln.protos.tvix.build.protos import build_pb2 as tvix_build_pb2

DIGEST = Digest(bytes(32))
DIRECTORY = DirectoryNode(DIGEST, 0)
FILE = FileNode(DIGEST, 0)
LINK = SymlinkNode(b"target")
SYSTEM = "x86_64-linux"


@dataclass(frozen=True)
class Refused:
    rule: str
    field: str
    index: int
    change: dict[str, Any]


def changed(**change: Any) -> BuildRequest:
    """A request that is valid but for `change`."""
    good: dict[str, Any] = {
        "inputs": ((b"tools", DIRECTORY),),
        "command": ("/inputs/tools/cc",),
        "working_dir": "build",
        "scratch_paths": ("build",),
        "inputs_dir": "inputs",
        "outputs": ("build/out",),
    }
    return BuildRequest(**(good | change))


def ro(*paths: str, shell: bool = False) -> Constraints:
    return Constraints(system=SYSTEM, available_ro_paths=paths, provide_bin_sh=shell)


SHELL = Constraints(system=SYSTEM, provide_bin_sh=True)

UNCLEAN = ["/a", "a/", "a//b", "a/./b", "a/../b", ".", "..", "./a", "../a", "/"]

CASES = [
    Refused("input-name", "inputs", 0, {"inputs": ((b"a/b", FILE),)}),
    Refused("input-name", "inputs", 1, {"inputs": ((b"a", FILE), (b"b" * 256, FILE))}),
    Refused("inputs-sorted", "inputs", 1, {"inputs": ((b"b", FILE), (b"a", FILE))}),
    Refused("inputs-sorted", "inputs", 2, {"inputs": ((b"a", FILE), (b"b", FILE), (b"b", LINK))}),
    *(Refused("working-dir-clean", "working_dir", -1, {"working_dir": path}) for path in UNCLEAN),
    *(Refused("scratch-path-clean", "scratch_paths", 1, {"scratch_paths": ("build", path)}) for path in UNCLEAN),
    Refused("scratch-paths-sorted", "scratch_paths", 1, {"scratch_paths": ("c", "build")}),
    *(Refused("inputs-dir-clean", "inputs_dir", -1, {"inputs_dir": path}) for path in UNCLEAN),
    *(Refused("output-clean", "outputs", 1, {"outputs": ("build/out", path)}) for path in UNCLEAN),
    Refused("environment-name", "environment_vars", 1, {"environment": (("A", b""), ("B=", b""))}),
    Refused("environment-name", "environment_vars", 0, {"environment": (("", b""),)}),
    Refused("environment-name", "environment_vars", 0, {"environment": (("A\0", b""),)}),
    Refused("environment-value", "environment_vars", 0, {"environment": (("A", b"1\x00"),)}),
    Refused("environment-sorted", "environment_vars", 1, {"environment": (("B", b""), ("A", b""))}),
    Refused("constraints-system", "constraints.system", -1, {"constraints": Constraints(system="")}),
    Refused("constraints-system", "constraints.system", -1, {"constraints": Constraints(min_memory=1)}),
    Refused("ro-path-clean", "constraints.available_ro_paths", 0, {"constraints": ro("dev/kvm")}),
    Refused("ro-path-clean", "constraints.available_ro_paths", 1, {"constraints": ro("/dev/kvm", "/dev/x/")}),
    Refused("ro-paths-sorted", "constraints.available_ro_paths", 1, {"constraints": ro("/dev/net", "/dev/kvm")}),
    *(Refused("additional-file-clean", "additional_files", 0, {"additional_files": ((p, b""),)}) for p in UNCLEAN),
    Refused(
        "additional-files-sorted", "additional_files", 1, {"additional_files": (("build/b", b""), ("build/a", b""))}
    ),
    Refused("empty-command", "command_args", -1, {"command": ()}),
    Refused("empty-command", "command_args", 0, {"command": ("", "x")}),
    Refused("nul-byte", "command_args", 1, {"command": ("a", "b\0")}),
    Refused("nul-byte", "working_dir", -1, {"working_dir": "build/\0"}),
    Refused("nul-byte", "scratch_paths", 1, {"scratch_paths": ("build", "c\0")}),
    Refused("nul-byte", "inputs_dir", -1, {"inputs_dir": "a\0"}),
    Refused("nul-byte", "outputs", 0, {"outputs": ("build/\0",)}),
    Refused("nul-byte", "constraints.available_ro_paths", 0, {"constraints": ro("/\0")}),
    Refused("nul-byte", "additional_files", 0, {"additional_files": (("build/\0", b""),)}),
    Refused("not-unicode", "command_args", 0, {"command": ("\udcff",)}),
    Refused("not-unicode", "outputs", 0, {"outputs": ("build/\udcff",)}),
    Refused("not-unicode", "environment_vars", 0, {"environment": (("\ud800", b""),)}),
    Refused("not-unicode", "refscan_needles", 0, {"refscan_needles": ("\udcff",)}),
    Refused("not-unicode", "constraints.system", -1, {"constraints": Constraints(system="\udcff")}),
    Refused("path-length", "outputs", 0, {"outputs": ("build/" + "é" * 128,)}),
    Refused("path-length", "scratch_paths", 1, {"scratch_paths": ("build", "c" + "/d" * 2047)}),
    Refused("min-memory-range", "constraints.min_memory", -1, {"constraints": Constraints(SYSTEM, 2**64)}),
    Refused("min-memory-range", "constraints.min_memory", -1, {"constraints": Constraints(SYSTEM, -1)}),
    Refused("duplicate-environment-name", "environment_vars", 1, {"environment": (("A", b"1"), ("A", b"1"))}),
    Refused("empty-needle", "refscan_needles", 1, {"refscan_needles": ("a", "")}),
    *(
        Refused("input-reserved", "inputs", 1, {"inputs_dir": "", "inputs": ((b"a", FILE), (name, DIRECTORY))})
        for name in (b"dev", b"proc", b"tmp")
    ),
    *(
        Refused("inputs-dir-reserved", "inputs_dir", -1, {"inputs_dir": path})
        for path in ("dev", "proc", "dev/shm", "proc/1")
    ),
    Refused("shell-conflict", "inputs", 0, {"constraints": SHELL, "inputs_dir": "", "inputs": ((b"bin", DIRECTORY),)}),
    Refused(
        "shell-conflict",
        "inputs",
        1,
        {"constraints": SHELL, "inputs_dir": "bin", "inputs": ((b"ls", FILE), (b"sh", FILE))},
    ),
    Refused("shell-conflict", "inputs_dir", -1, {"constraints": SHELL, "inputs_dir": "bin/sh"}),
    Refused("shell-conflict", "scratch_paths", 0, {"constraints": SHELL, "scratch_paths": ("bin/sh", "build")}),
    Refused("shell-conflict", "additional_files", 0, {"constraints": SHELL, "additional_files": (("bin/sh", b""),)}),
    Refused("shell-conflict", "additional_files", 0, {"constraints": SHELL, "additional_files": (("bin", b""),)}),
    Refused("additional-file-empty", "additional_files", 0, {"additional_files": (("", b""),)}),
    Refused(
        "additional-file-repeated", "additional_files", 1, {"additional_files": (("build/a", b""), ("build/a", b""))}
    ),
    Refused("additional-file-in-input", "additional_files", 0, {"additional_files": (("inputs/tools", b""),)}),
    Refused("additional-file-in-input", "additional_files", 0, {"additional_files": (("inputs/tools/x", b""),)}),
    *(
        Refused("additional-file-reserved", "additional_files", 0, {"additional_files": ((path, b""),)})
        for path in ("dev", "dev/null", "proc", "proc/1")
    ),
    *(
        Refused("additional-file-conflict", "additional_files", 0, {"additional_files": ((path, b""), *more)})
        for path, *more in (("build",), ("inputs",), ("etc",), ("tmp",), ("a", ("a/b", b"")))
    ),
    Refused(
        "additional-file-conflict",
        "additional_files",
        0,
        {"additional_files": (("opt", b""),), "constraints": ro("/opt/x")},
    ),
    Refused("scratch-path-in-input", "scratch_paths", 1, {"scratch_paths": ("build", "inputs/tools")}),
    Refused("scratch-path-in-input", "scratch_paths", 1, {"scratch_paths": ("build", "inputs/tools/x")}),
    Refused("scratch-path-in-input", "scratch_paths", 1, {"scratch_paths": ("build", "tools/x"), "inputs_dir": ""}),
    *(
        Refused("scratch-path-reserved", "scratch_paths", 0, {"scratch_paths": (path, "zz"), "outputs": ()})
        for path in ("", "dev", "dev/shm", "proc", "proc/x")
    ),
    Refused("etc-conflict", "scratch_paths", 1, {"scratch_paths": ("build", "etc/passwd")}),
    Refused("etc-conflict", "inputs_dir", -1, {"inputs_dir": "etc/hosts/x"}),
    Refused("etc-conflict", "additional_files", 0, {"additional_files": (("etc/group/x", b""),)}),
    Refused("output-outside-scratch", "outputs", 0, {"outputs": ("elsewhere",)}),
    Refused("output-outside-scratch", "outputs", 0, {"outputs": ("",)}),
    Refused("output-outside-scratch", "outputs", 0, {"outputs": ("builder/out",)}),
    *(
        Refused("output-overlaps-input", "outputs", 0, {"scratch_paths": ("build", "inputs"), "outputs": (path,)})
        for path in ("inputs", "inputs/tools", "inputs/tools/x")
    ),
    Refused("output-overlaps-output", "outputs", 1, {"outputs": ("build/a", "build/a")}),
    Refused("output-overlaps-output", "outputs", 1, {"outputs": ("build/a", "build/a/b")}),
    Refused("output-overlaps-output", "outputs", 0, {"outputs": ("build/a/b/c", "build/a")}),
    *(
        Refused("output-overlaps-file", "outputs", 0, {"additional_files": (("build/a/b", b""),), "outputs": (path,)})
        for path in ("build", "build/a", "build/a/b", "build/a/b/c")
    ),
    *(
        Refused("ro-path-conflict", "constraints.available_ro_paths", 0, {"constraints": ro(path)})
        for path in (
            "/",
            "/dev",
            "/proc",
            "/tmp",
            "/inputs",
            "/inputs/tools",
            "/inputs/tools/x",
            "/build",
            "/build/out/x",
        )
    ),
    Refused("ro-path-conflict", "constraints.available_ro_paths", 0, {"constraints": ro("/bin", shell=True)}),
    *(
        Refused("working-dir-absent", "working_dir", -1, {"working_dir": path})
        for path in ("elsewhere", "bin", "tmp/x", "inputs/other", "inputs/tool", "etc/passwd")
    ),
    Refused("working-dir-absent", "working_dir", -1, {"working_dir": "inputs/f", "inputs": ((b"f", FILE),)}),
    Refused(
        "working-dir-absent", "working_dir", -1, {"working_dir": "build/f", "additional_files": (("build/f", b""),)}
    ),
    Refused(
        "working-dir-absent", "working_dir", -1, {"working_dir": "etc", "inputs_dir": "", "inputs": ((b"etc", FILE),)}
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule}-{next(iter(case.change))}")
def test_a_request_that_breaks_a_rule_is_refused_by_its_name(case: Refused) -> None:
    with pytest.raises(RequestInvalid) as caught:
        changed(**case.change)
    assert (caught.value.rule, caught.value.field, caught.value.index) == (case.rule, case.field, case.index)
    where = case.field if case.index < 0 else f"{case.field}[{case.index}]"
    assert str(caught.value).startswith(f"{where}: ")
    assert str(caught.value).endswith(RULES[case.rule])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"outputs": ()},
        {"working_dir": ""},
        {"inputs_dir": ""},
        {"scratch_paths": ("build", "build")},
        {"refscan_needles": ("a", "a", "b")},
        {"outputs": ("build",)},
        {"outputs": ("build/b", "build/a")},
        {"outputs": ("build/a", "build/ab")},
        {"scratch_paths": ("build", "tmp"), "outputs": ("tmp/out",)},
        {"additional_files": (("etc/passwd", b""),)},
        {"additional_files": (("bin/sh", b""),)},
        {"additional_files": (("bin/ls", b""),), "constraints": SHELL},
        {"additional_files": (("tmp/x", b""),)},
        {"additional_files": (("inputs/more", b""),)},
        {"scratch_paths": ("build", "inputs"), "outputs": ("inputs/more",)},
        {"scratch_paths": ("build", "build/a/b"), "outputs": ("build/a",)},
        {"scratch_paths": ("build", "etc")},
        {"inputs_dir": "", "inputs": ((b"bin", DIRECTORY), (b"etc", DIRECTORY))},
        {"inputs_dir": "", "inputs": ((b"etc", DIRECTORY),), "working_dir": "etc/below"},
        {"inputs_dir": "tmp"},
        {"inputs": ((b"\xff", FILE),)},
        {"environment": (("A", b"\xff"),)},
        {"constraints": ro("/dev/kvm", "/dev/kvm", "/etc/hosts")},
        {"constraints": ro("/opt/tools"), "working_dir": "opt/tools/bin"},
        {"constraints": SHELL, "working_dir": "bin"},
        *(
            {"working_dir": path}
            for path in ("build/below", "inputs", "inputs/tools", "inputs/tools/below", "tmp", "dev", "dev/shm", "proc")
        ),
        {"inputs": ((b"link", LINK),), "working_dir": "inputs/link"},
        {"inputs_dir": "nix/store", "working_dir": "nix"},
        {"scratch_paths": ("a/b", "build"), "working_dir": "a"},
        {"additional_files": (("a/b/c", b""),), "working_dir": "a/b"},
    ],
    ids=str,
)
def test_what_no_rule_is_about_is_accepted(change: dict[str, Any]) -> None:
    request = changed(**change)
    assert decode_request(encode_request(request)) == request


def test_only_a_strict_server_wants_outputs_in_order() -> None:
    request = changed(outputs=("build/b", "build/a"))
    with pytest.raises(RequestInvalid) as caught:
        check_outputs_sorted(request)
    assert (caught.value.rule, caught.value.field, caught.value.index) == ("outputs-sorted", "outputs", 1)
    check_outputs_sorted(replace(request, outputs=("build/a", "build/b")))


def test_a_value_in_a_message_has_no_control_characters() -> None:
    with pytest.raises(RequestInvalid) as caught:
        changed(outputs=("\x1b[31m\n",))
    assert str(caught.value).startswith(r'outputs[0]: "\x1b[31m\n" is in no scratch path')


def entry(**fields: Any) -> build_pb2.BuildRequest:
    return build_pb2.BuildRequest(command_args=["x"], inputs=[castore_pb2.Entry(**fields)])


def test_inputs_that_are_no_nodes_are_refused_by_the_encoding() -> None:
    for rule, message in {
        "input-unset": entry(),
        "input-digest": entry(file=castore_pb2.FileEntry(name=b"a", digest=b"short")),
        "input-target": entry(symlink=castore_pb2.SymlinkEntry(name=b"a")),
    }.items():
        with pytest.raises(RequestInvalid) as caught:
            from_request(message)
        assert (caught.value.rule, caught.value.field, caught.value.index) == (rule, "inputs", 0)


UNKNOWN_FIELD = b"\xf8\x01\x07"  # Number 31, a varint.


@pytest.mark.parametrize(
    ("data", "field", "index"),
    [
        (UNKNOWN_FIELD, "", -1),
        (b"\x0a\x03" + UNKNOWN_FIELD, "inputs", 0),
        (b"\x0a\x00\x0a\x05\x12\x03" + UNKNOWN_FIELD, "inputs.file", 1),
        (b"\x42\x03" + UNKNOWN_FIELD, "constraints", -1),
        (b"\x3a\x00\x3a\x03" + UNKNOWN_FIELD, "environment_vars", 1),
        (b"\x4a\x03" + UNKNOWN_FIELD, "additional_files", 0),
    ],
)
def test_a_field_that_nobody_here_knows_is_refused_wherever_it_stands(data: bytes, field: str, index: int) -> None:
    with pytest.raises(RequestInvalid, match="31") as caught:
        from_request(build_pb2.BuildRequest.FromString(data))
    assert (caught.value.rule, caught.value.field, caught.value.index) == ("unknown-field", field, index)


def tvix(**change: Any) -> tvix_build_pb2.BuildRequest:
    good: dict[str, Any] = {"command_args": ["x"], "store_dir": "/nix/store", "outputs": ["out"]}
    return tvix_build_pb2.BuildRequest(**(good | change))


@pytest.mark.parametrize(
    ("message", "rule", "field", "index"),
    [
        *(
            (tvix(store_dir=path), "store-dir-clean", "store_dir", -1)
            for path in ("", "/", "nix/store", "/nix/store/", "//nix", "/nix/../store")
        ),
        (tvix(store_dir="/dev"), "inputs-dir-reserved", "store_dir", -1),
        (tvix(outputs=["a", "b/c"]), "output-name", "outputs", 1),
        (tvix(outputs=[""]), "output-name", "outputs", 0),
        (tvix(outputs=["a", "a"]), "output-overlaps-output", "outputs", 1),
        # Neither before nor after the place of the implied scratch path is a number off by one.
        (tvix(scratch_paths=["/a", "z"]), "scratch-path-clean", "scratch_paths", 0),
        (tvix(scratch_paths=["a", "z/"]), "scratch-path-clean", "scratch_paths", 1),
        (tvix(scratch_paths=["z", "a"]), "scratch-paths-sorted", "scratch_paths", 1),
        (tvix(command_args=[]), "empty-command", "command_args", -1),
        (tvix_build_pb2.BuildRequest.FromString(UNKNOWN_FIELD), "unknown-field", "", -1),
    ],
)
def test_the_older_shape_has_the_same_rules_and_its_own_fields(
    message: tvix_build_pb2.BuildRequest, rule: str, field: str, index: int
) -> None:
    with pytest.raises(RequestInvalid) as caught:
        from_tvix_request(message)
    assert (caught.value.rule, caught.value.field, caught.value.index) == (rule, field, index)


PATH = st.lists(st.sampled_from(["a", "b", "a-b", "a0", "\x01"]), max_size=4).map("/".join)


@given(among=st.lists(PATH, max_size=6), path=PATH)
def test_what_is_above_and_below_a_path_is_found(among: list[str], path: str) -> None:
    paths = Paths(among)
    assert paths.any_above(path) == any(is_within(path, other) for other in among)
    assert paths.any_below(path) == any(is_within(other, path) for other in among)
    assert paths.any_inside(path) == any(is_within(other, path) for other in among if other != path)


def test_a_hostile_request_is_checked_in_memory_of_its_own_size() -> None:
    deep = tuple(f"{number:03d}" + "/a" * 2045 for number in range(100))  # 0.4 MB, below 200,000 directories.
    files = tuple((f"f{path}"[:-2], b"") for path in deep)
    tracemalloc.start()
    try:
        changed(scratch_paths=deep, outputs=deep, additional_files=files, working_dir="", constraints=Constraints())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 << 20


def test_every_rule_has_a_test_here() -> None:
    of_encoding = {"unknown-field", "input-unset", "input-digest", "input-target", "store-dir-clean", "output-name"}
    assert {case.rule for case in CASES} | of_encoding | {"outputs-sorted"} == set(RULES)
