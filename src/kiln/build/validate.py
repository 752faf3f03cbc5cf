"""Which requests are valid: Snix's checks in Snix's order, then kiln's own (pure).

Snix answers the first failure in the order of the fields inputs, working_dir, scratch_paths, inputs_dir, outputs,
environment_vars, constraints, additional_files, and so does this. Its checks are about each field by itself; kiln's own
are about what no sandbox could carry out, or only by guessing what was meant.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NoReturn

from kiln.build.errors import RequestInvalid
from kiln.castore.model import NAME_BYTES_MAX, FileNode, NameInvalid, check_name, printable

if TYPE_CHECKING:  # The model checks itself at birth, so it imports this module.
    from kiln.build.model import BuildRequest

PATH_BYTES_MAX = 4095 - len("/")  # PATH_MAX less the final NUL; the paths here lack the leading slash.
MEMORY_MAX = 2**64 - 1  # uint64 on the wire.

RULES: Mapping[str, str] = MappingProxyType(
    {
        # Of the encoding, by the `wire` modules.
        "unknown-field": "A field that kiln does not know may change what is asked, so it is refused.",
        "input-unset": "An input is a directory, a file or a symlink.",
        "input-digest": "A digest has 32 bytes.",
        "input-target": "A symlink's target has 1 to 4095 bytes, none of them NUL.",
        # Snix's, in its order.
        "input-name": "A name has 1 to 255 bytes without slash or NUL, and is neither '.' nor '..'.",
        "inputs-sorted": "Inputs stand in strictly ascending order of their names' bytes.",
        "working-dir-clean": "A path is relative, without '.', '..', empty components or a slash at either end.",
        "scratch-path-clean": "A path is relative, without '.', '..', empty components or a slash at either end.",
        "scratch-paths-sorted": "Scratch paths stand in ascending order of their bytes.",
        "inputs-dir-clean": "A path is relative, without '.', '..', empty components or a slash at either end.",
        "output-clean": "A path is relative, without '.', '..', empty components or a slash at either end.",
        "outputs-sorted": "A strict server wants outputs in ascending order of their bytes.",
        "environment-name": "A variable's name is not empty and has neither '=' nor NUL.",
        "environment-value": "A variable's value has no NUL.",
        "environment-sorted": "Environment variables stand in ascending order of their names' bytes.",
        "constraints-system": "Constraints name a system, such as x86_64-linux.",
        "ro-path-clean": "An available path is absolute, without '.', '..', empty components or a slash at its end.",
        "ro-paths-sorted": "Available paths stand in ascending order of their bytes.",
        "additional-file-clean": "A path is relative, without '.', '..', empty components or a slash at either end.",
        "additional-files-sorted": "Additional files stand in ascending order of their paths' bytes.",
        # The tvix shape's, by `wire_tvix`.
        "store-dir-clean": "The store directory is absolute, not the root, without '.', '..' or empty components.",
        "output-name": "An output of this protocol is a name in the store directory, without slash or NUL.",
        # Kiln's own.
        "empty-command": "A command has a program, as its first argument.",
        "nul-byte": "The operating system takes no NUL in a path or an argument.",
        "not-unicode": "Strings of the protocol are UTF-8.",
        "path-length": "A path has at most 4094 bytes, each of its components at most 255.",
        "min-memory-range": "Memory is a number of bytes from 0 to 2^64 - 1.",
        "duplicate-environment-name": "A variable has one value.",
        "empty-needle": "A needle has at least one byte.",
        "input-reserved": "At the root, where an empty inputs_dir puts inputs, dev, proc and tmp are the sandbox's.",
        "inputs-dir-reserved": "Inputs are not placed in dev or proc.",
        "shell-conflict": "With provide_bin_sh nothing else stands at bin/sh, over it or under it.",
        "additional-file-empty": "An additional file has a path.",
        "additional-file-repeated": "An additional file is given once.",
        "additional-file-in-input": "Inputs stay as they are: no additional file takes their place or lies below.",
        "additional-file-reserved": "No additional file lies in dev or proc, or takes their place.",
        "additional-file-conflict": "No additional file stands where a directory has to be.",
        "scratch-path-in-input": "Inputs are read-only: no scratch path takes their place or lies below.",
        "scratch-path-reserved": "No scratch path lies in dev or proc, or holds them.",
        "etc-conflict": "Nothing but an additional file takes the place of a file of kiln's own in etc.",
        "output-outside-scratch": "An output is a scratch path or lies in one.",
        "output-overlaps-input": "An output is no input, nor above or below one.",
        "output-overlaps-output": "An output is no other output, nor above or below one.",
        "output-overlaps-file": "An output is no additional file, nor above or below one.",
        "ro-path-conflict": "An available path covers no other part of the build's root, and stands in no output.",
        "working-dir-absent": "The working directory is in a scratch path, or is there from the start.",
    }
)

# What kiln puts into etc (kiln-contract-1), as far as an input called etc does not replace it whole.
ETC_FILES = frozenset({"etc/passwd", "etc/group", "etc/hosts", "etc/nsswitch.conf", "etc/resolv.conf"})
SHELL = "bin/sh"
_RESERVED = ("dev", "proc")


def refuse(rule: str, field: str, index: int, value: str | bytes, wrong: str) -> NoReturn:
    """Raise `RequestInvalid`: in `field`, at `index`, `value` is `wrong`, and what `rule` says would be right."""
    shown = printable(value) if isinstance(value, bytes) else _shown(value)
    raise RequestInvalid(field=field, index=index, rule=rule, why=f"{shown} {wrong}. {RULES[rule]}")


def _shown(text: str) -> str:
    return printable(text.encode("utf-8", "surrogatepass"))


def check_request(request: "BuildRequest") -> None:
    """Raise `RequestInvalid` for the first rule that `request` breaks."""
    _check_as_snix(request)
    _check_strings(request)
    _check_layout(request)
    _check_outputs(request)
    _check_working_dir(request)


def check_outputs_sorted(request: "BuildRequest") -> None:
    """Raise `RequestInvalid` where Snix's server would, and kiln's only under --strict: outputs out of order."""
    _check_sorted("outputs-sorted", "outputs", request.outputs)


def is_clean(path: str) -> bool:
    """Whether `path` is relative and in its shortest form; the empty path is the root."""
    return not path or not any(component in {"", ".", ".."} for component in path.split("/"))


def is_within(path: str, top: str) -> bool:
    """Whether `path` is `top` or lies below it."""
    return not top or path == top or path.startswith(top + "/")


def _check_as_snix(request: "BuildRequest") -> None:
    last: bytes | None = None
    for index, (name, _) in enumerate(request.inputs):
        try:
            check_name(name)
        except NameInvalid as error:
            refuse("input-name", "inputs", index, name, error.why)
        if last is not None and name <= last:
            refuse("inputs-sorted", "inputs", index, name, "is repeated" if name == last else "is out of order")
        last = name
    _check_clean("working-dir-clean", "working_dir", request.working_dir)
    _check_all_clean("scratch-path-clean", "scratch_paths", request.scratch_paths)
    _check_sorted("scratch-paths-sorted", "scratch_paths", request.scratch_paths)
    _check_clean("inputs-dir-clean", "inputs_dir", request.inputs_dir)
    _check_all_clean("output-clean", "outputs", request.outputs)
    for index, (key, value) in enumerate(request.environment):
        if not key:
            refuse("environment-name", "environment_vars", index, key, "is empty")
        if "=" in key or "\0" in key:
            refuse("environment-name", "environment_vars", index, key, "has a forbidden character")
        if b"\0" in value:
            refuse("environment-value", "environment_vars", index, key, "has a NUL byte in its value")
    _check_sorted("environment-sorted", "environment_vars", [key for key, _ in request.environment])
    _check_constraints(request)
    files = [path for path, _ in request.additional_files]
    _check_all_clean("additional-file-clean", "additional_files", files)
    _check_sorted("additional-files-sorted", "additional_files", files)


def _check_constraints(request: "BuildRequest") -> None:
    asked = request.constraints
    if asked.system is None:
        # There is no way to write constraints without a system: their message would be refused.
        if asked.min_memory or asked.available_ro_paths or asked.network_access or asked.provide_bin_sh:
            refuse("constraints-system", "constraints.system", -1, "", "is missing beside other constraints")
    elif not asked.system:
        refuse("constraints-system", "constraints.system", -1, "", "is empty")
    for index, path in enumerate(asked.available_ro_paths):
        if not path.startswith("/") or not is_clean(path[1:]):
            refuse("ro-path-clean", "constraints.available_ro_paths", index, path, "is not a clean absolute path")
    _check_sorted("ro-paths-sorted", "constraints.available_ro_paths", asked.available_ro_paths)


def _check_clean(rule: str, field: str, path: str, index: int = -1) -> None:
    if not is_clean(path):
        refuse(rule, field, index, path, "is not a clean relative path")


def _check_all_clean(rule: str, field: str, paths: Iterable[str]) -> None:
    for index, path in enumerate(paths):
        _check_clean(rule, field, path, index)


def _check_sorted(rule: str, field: str, values: Sequence[str]) -> None:
    # Code points compare as their UTF-8 bytes do.
    for index in range(1, len(values)):
        if values[index] < values[index - 1]:
            refuse(rule, field, index, values[index], f"stands after {_shown(values[index - 1])}")


def _paths(request: "BuildRequest") -> Iterator[tuple[str, int, str]]:
    yield "working_dir", -1, request.working_dir
    yield from (("scratch_paths", index, path) for index, path in enumerate(request.scratch_paths))
    yield "inputs_dir", -1, request.inputs_dir
    yield from (("outputs", index, path) for index, path in enumerate(request.outputs))
    ro_paths = request.constraints.available_ro_paths
    yield from (("constraints.available_ro_paths", index, path) for index, path in enumerate(ro_paths))
    yield from (("additional_files", index, path) for index, (path, _) in enumerate(request.additional_files))


def _ro_paths(request: "BuildRequest") -> list[str]:
    """Where the available paths stand in the build's root."""
    return [absolute[1:] for absolute in request.constraints.available_ro_paths]


def _check_strings(request: "BuildRequest") -> None:
    """What each string by itself has to be, beyond Snix's checks."""
    if not request.command or not request.command[0]:
        refuse("empty-command", "command_args", 0 if request.command else -1, "", "names no program")
    arguments = [("command_args", index, argument) for index, argument in enumerate(request.command)]
    for field, index, text in (*arguments, *_paths(request)):
        if "\0" in text:
            refuse("nul-byte", field, index, text, "has a NUL byte")
    for field, index, text in _paths(request):
        components = _encoded(field, index, text).split(b"/")
        if max(map(len, components)) > NAME_BYTES_MAX or len(text.encode()) > PATH_BYTES_MAX:
            refuse("path-length", field, index, text, "is too long")
    for field, index, text in arguments:
        _encoded(field, index, text)
    _encoded("constraints.system", -1, request.constraints.system or "")
    if not 0 <= request.constraints.min_memory <= MEMORY_MAX:
        refuse("min-memory-range", "constraints.min_memory", -1, str(request.constraints.min_memory), "is out of range")
    last: str | None = None
    for index, (key, _) in enumerate(request.environment):
        _encoded("environment_vars", index, key)
        if key == last:
            refuse("duplicate-environment-name", "environment_vars", index, key, "is repeated")
        last = key
    for index, needle in enumerate(request.refscan_needles):
        _encoded("refscan_needles", index, needle)
        if not needle:
            refuse("empty-needle", "refscan_needles", index, needle, "is empty")


def _encoded(field: str, index: int, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        refuse("not-unicode", field, index, text, "has no UTF-8 encoding")


class Paths:
    """Some paths, for questions in time that grows with neither their number nor their depth.

    Each ends in a slash here, so that whatever is in a directory begins with it and stands right behind it. No set of
    ancestors: those of one path of 4 KiB can be 2,000, and take 4 MiB.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._all = sorted({_as_prefix(path) for path in paths})
        self._outermost: list[str] = []
        for path in self._all:
            if not self._outermost or not path.startswith(self._outermost[-1]):
                self._outermost.append(path)

    def any_above(self, path: str) -> bool:
        """Whether `path` or a directory above it is among them."""
        path = _as_prefix(path)
        place = bisect_right(self._outermost, path)
        return place > 0 and path.startswith(self._outermost[place - 1])

    def any_below(self, path: str) -> bool:
        """Whether `path` or something in it is among them."""
        path = _as_prefix(path)
        place = bisect_left(self._all, path)
        return place < len(self._all) and self._all[place].startswith(path)

    def any_inside(self, path: str) -> bool:
        """Whether something in `path`, not itself, is among them."""
        path = _as_prefix(path)
        place = bisect_right(self._all, path)
        return place < len(self._all) and self._all[place].startswith(path)


def _as_prefix(path: str) -> str:
    return f"{path}/" if path else ""


class _Inputs:
    """Where the inputs stand, for questions in time that does not grow with their number."""

    def __init__(self, request: "BuildRequest") -> None:
        self._dir = request.inputs_dir
        self._nodes = dict(request.inputs)

    def above(self, path: str) -> bytes | None:
        """The name of the input that stands at `path` or above it."""
        if self._dir and not path.startswith(self._dir + "/"):
            return None
        name = path[len(self._dir) + 1 if self._dir else 0 :].partition("/")[0].encode()
        return name if name in self._nodes else None

    def below(self, path: str) -> bool:
        """Whether an input lies strictly below `path`."""
        return bool(self._nodes) and is_within(self._dir, path)

    def may_be_directory(self, path: str) -> bool:
        """Whether `path`, at or below an input, can be a directory: what is in a tree, its digest does not tell."""
        name = self.above(path)
        return name is not None and not isinstance(self._nodes[name], FileNode)


def _check_layout(request: "BuildRequest") -> None:
    """Inputs, shell, scratch paths and files, each in a place of its own."""
    inputs = _Inputs(request)
    if not request.inputs_dir:
        for index, (name, _) in enumerate(request.inputs):
            if name in {b"dev", b"proc", b"tmp"}:
                refuse("input-reserved", "inputs", index, name, "cannot stand at the root")
    if any(is_within(request.inputs_dir, top) for top in _RESERVED):
        refuse("inputs-dir-reserved", "inputs_dir", -1, request.inputs_dir, "is the sandbox's own")
    etc = set() if inputs.above("etc") is not None else ETC_FILES
    if any(is_within(request.inputs_dir, own) for own in etc):
        refuse("etc-conflict", "inputs_dir", -1, request.inputs_dir, "is a file")
    shell = request.constraints.provide_bin_sh
    if shell:
        if (taken := inputs.above(SHELL)) is not None:
            index = next(index for index, (name, _) in enumerate(request.inputs) if name == taken)
            refuse("shell-conflict", "inputs", index, taken, "stands at bin or bin/sh")
        if is_within(request.inputs_dir, SHELL):
            refuse("shell-conflict", "inputs_dir", -1, request.inputs_dir, "is in the shell's place")
    for index, path in enumerate(request.scratch_paths):
        if inputs.above(path) is not None:
            refuse("scratch-path-in-input", "scratch_paths", index, path, "is in an input")
        if any(is_within(path, top) or is_within(top, path) for top in _RESERVED):
            refuse("scratch-path-reserved", "scratch_paths", index, path, "is the sandbox's own")
        if any(is_within(path, own) for own in etc):
            refuse("etc-conflict", "scratch_paths", index, path, "is a file")
        if shell and is_within(path, SHELL):
            refuse("shell-conflict", "scratch_paths", index, path, "is in the shell's place")
    _check_additional_files(request, inputs, etc)
    _check_ro_paths(request, inputs)


def _check_additional_files(request: "BuildRequest", inputs: _Inputs, etc: Iterable[str]) -> None:
    shell = request.constraints.provide_bin_sh
    directories = Paths(["tmp", "etc", request.inputs_dir, *request.scratch_paths])
    placed = Paths([path for path, _ in request.additional_files] + _ro_paths(request))
    last: str | None = None
    for index, (path, _) in enumerate(request.additional_files):
        if not path:
            refuse("additional-file-empty", "additional_files", index, path, "is the root")
        if path == last:
            refuse("additional-file-repeated", "additional_files", index, path, "is repeated")
        last = path
        if inputs.above(path) is not None:
            refuse("additional-file-in-input", "additional_files", index, path, "is in an input")
        if any(is_within(path, top) for top in _RESERVED):
            refuse("additional-file-reserved", "additional_files", index, path, "is the sandbox's own")
        if shell and (is_within(path, SHELL) or is_within(SHELL, path)):
            refuse("shell-conflict", "additional_files", index, path, "is in the shell's place")
        if directories.any_below(path) or placed.any_inside(path):
            refuse("additional-file-conflict", "additional_files", index, path, "has to be a directory")
        # Below such a file, not in its place: that is what additional files may take.
        if any(path.startswith(f"{own}/") for own in etc):
            refuse("etc-conflict", "additional_files", index, path, "is below a file")


def _check_ro_paths(request: "BuildRequest", inputs: _Inputs) -> None:
    field = "constraints.available_ro_paths"
    own = ["tmp", *_RESERVED, *([SHELL] if request.constraints.provide_bin_sh else [])]
    placed = Paths([*own, *request.scratch_paths, *(path for path, _ in request.additional_files)])
    outputs = Paths(request.outputs)
    for index, absolute in enumerate(request.constraints.available_ro_paths):
        path = absolute[1:]
        if inputs.below(path) or placed.any_below(path):
            refuse("ro-path-conflict", field, index, absolute, "covers a part of the build's root")
        if inputs.above(path) is not None:
            refuse("ro-path-conflict", field, index, absolute, "is in an input")
        if outputs.any_above(path) or outputs.any_below(path):
            refuse("ro-path-conflict", field, index, absolute, "overlaps an output")


def _check_outputs(request: "BuildRequest") -> None:
    inputs = _Inputs(request)
    scratch = Paths(request.scratch_paths)
    files = Paths(path for path, _ in request.additional_files)
    outputs = Paths(filter(None, request.outputs))
    first = {path: index for index, path in reversed(list(enumerate(request.outputs)))}
    for index, path in enumerate(request.outputs):
        if not scratch.any_above(path):
            refuse("output-outside-scratch", "outputs", index, path, "is in no scratch path")
        if inputs.above(path) is not None or inputs.below(path):
            refuse("output-overlaps-input", "outputs", index, path, "overlaps an input")
        if first[path] != index:
            refuse("output-overlaps-output", "outputs", index, path, "is repeated")
        if outputs.any_above(path.rpartition("/")[0]):
            refuse("output-overlaps-output", "outputs", index, path, "is in another output")
        if files.any_above(path) or files.any_below(path):
            refuse("output-overlaps-file", "outputs", index, path, "overlaps an additional file")


def _check_working_dir(request: "BuildRequest") -> None:
    path = request.working_dir
    inputs = _Inputs(request)
    if inputs.above(path) is not None:
        if not inputs.may_be_directory(path):
            refuse("working-dir-absent", "working_dir", -1, path, "is in an input that is a file")
        return
    if any(is_within(path, file) for file, _ in request.additional_files):
        refuse("working-dir-absent", "working_dir", -1, path, "is in an additional file")
    if any(is_within(path, top) for top in request.scratch_paths):
        return
    # Below an available path the host decides.
    if any(is_within(path, other) for other in _ro_paths(request)):
        return
    directories = {"", "etc", "tmp", "dev", "dev/pts", "dev/shm", "proc"}
    if request.constraints.provide_bin_sh:
        directories.add("bin")
    if request.inputs_dir:
        directories.add(request.inputs_dir)
    placed = [request.inputs_dir, *request.scratch_paths, *(path for path, _ in request.additional_files)]
    if path not in directories and not Paths(placed + _ro_paths(request)).any_inside(path):
        refuse("working-dir-absent", "working_dir", -1, path, "is not there")
