import pytest

from kiln.build.errors import RequestInvalid
from kiln.build.model import BuildRequest
from kiln.castore.model import SymlinkNode
from kiln.cli.assemble import Asked, request_of

NODE = SymlinkNode(b"target")


def request(**asked: object) -> BuildRequest:
    return request_of(Asked(command=("true",), **asked), "x86_64-linux")  # type: ignore[arg-type]


def test_where_a_command_finds_itself() -> None:
    made = request(shell=True, memory=1 << 20, network=True)
    assert (made.working_dir, made.inputs_dir, made.scratch_paths) == ("build", "inputs", ("build",))
    assert made.environment == (("HOME", b"/build"),)
    assert made.constraints.system == "x86_64-linux"
    assert made.constraints.provide_bin_sh
    assert made.constraints.network_access
    assert made.constraints.min_memory == 1 << 20


def test_an_output_makes_its_parent_writable() -> None:
    assert request(outputs=("a/b",)).scratch_paths == ("a", "build")
    assert request(outputs=("a",)).scratch_paths == ("a", "build")
    assert request(outputs=("build/x", "a/b/c", "a/b/d")).scratch_paths == ("a/b", "build")


def test_lists_are_sorted_and_outputs_are_not() -> None:
    made = request(
        inputs=((b"b", NODE), (b"a", NODE)),
        outputs=("build/z", "build/a"),
        environment=(("Z", b"1"), ("A", b"2")),
        scratch=("z", "a"),
    )
    assert [name for name, _ in made.inputs] == [b"a", b"b"]
    assert made.environment == (("A", b"2"), ("HOME", b"/build"), ("Z", b"1"))
    assert made.scratch_paths == ("a", "build", "z")
    assert made.outputs == ("build/z", "build/a")


def test_home_can_be_chosen() -> None:
    assert request(environment=(("HOME", b"/tmp"),)).environment == (("HOME", b"/tmp"),)


@pytest.mark.parametrize("output", ["../x", "", "/abs", "a//b", "a/", ".", "a\0b", "dev/x"])
def test_a_path_that_is_none_is_refused_under_its_own_name(output: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        request(outputs=(output,))
    assert caught.value.field in {"outputs", "scratch_paths"}


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"inputs": ((b"a", NODE), (b"a", NODE))}, "inputs"),
        ({"inputs": ((b"../a", NODE),)}, "inputs"),
        ({"environment": (("A", b"1"), ("A", b"2"))}, "environment_vars"),
        ({"environment": (("", b"1"),)}, "environment_vars"),
        ({"scratch": ("inputs/x", "/x")}, "scratch_paths"),
        ({"paths": ("relative",)}, "constraints.available_ro_paths"),
    ],
)
def test_what_breaks_a_rule_is_named(asked: dict[str, object], field: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        request(**asked)
    assert caught.value.field == field
