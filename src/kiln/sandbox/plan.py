"""The root plan: what one build sees, as plain data (pure).

Every runtime renders this same plan; none decides anything about inputs, scratch, files, devices or ids again. What the
plan holds is `kiln-contract-1`; a change of it is a new contract.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from kiln.build.model import BuildRequest
from kiln.build.validate import is_within
from kiln.castore.model import SymlinkNode

T = TypeVar("T")

BUILD_UID = 1000
BUILD_GID = 100
HOSTNAME = "localhost"
TMP = "tmp"

# What Nix's sandbox has in /etc: src/libstore/unix/build/linux-derivation-builder.cc of Nix 2.34.
ETC_FILES: tuple[tuple[str, bytes], ...] = (
    ("etc/group", b"root:x:0:\nnixbld:!:100:\nnogroup:x:65534:\n"),
    ("etc/hosts", b"127.0.0.1 localhost\n::1 localhost\n"),
    ("etc/nsswitch.conf", b"hosts: files dns\nservices: files\n"),
    (
        "etc/passwd",
        (
            b"root:x:0:0:Nix build user:/build:/noshell\n"
            b"nixbld:x:1000:100:Nix build user:/build:/noshell\n"
            b"nobody:x:65534:65534:Nobody:/:/noshell\n"
        ),
    ),
)


class Network(Enum):
    """NONE: loopback only; PRIVATE: an own namespace with a way out; HOST: the host's own, where nothing better is."""

    NONE = 0
    PRIVATE = 1
    HOST = 2


@dataclass(frozen=True, slots=True)
class Input:
    """The node of input `index` as the store shows it."""

    index: int


@dataclass(frozen=True, slots=True)
class Scratch:
    """The host directory behind the outermost scratch path `path`."""

    path: str


@dataclass(frozen=True, slots=True)
class Shell:
    """The static shell."""


@dataclass(frozen=True, slots=True)
class HostPath:
    """A path of the host, as the operator's policy allows."""

    path: str


Source = Input | Scratch | Shell | HostPath


@dataclass(frozen=True, slots=True)
class Mount:
    """`source` is visible at `target` (relative to the root); read-only, nosuid and nodev unless said otherwise."""

    source: Source
    target: str
    is_directory: bool
    writable: bool = False
    device: bool = False


@dataclass(frozen=True, slots=True)
class File:
    """A file with fixed contents."""

    path: str
    contents: bytes
    mode: int


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link."""

    path: str
    target: bytes


@dataclass(frozen=True, slots=True)
class HostDirectory:
    """What is there already when the build starts, in one host directory that it may write (`root`).

    Paths are relative to the build's root, parents first. `mount_points` become empty files or directories, which are
    covered in the sandbox and skipped at capture.
    """

    root: str
    directories: tuple[str, ...]
    files: tuple[File, ...]
    links: tuple[Link, ...]
    mount_points: tuple[tuple[str, bool], ...]
    holds_inputs: bool


@dataclass(frozen=True, slots=True)
class RootPlan:
    """The whole of it. `directories`, `files` and `links` make up the read-only root; parents come first."""

    directories: tuple[str, ...]
    files: tuple[File, ...]
    links: tuple[Link, ...]
    mounts: tuple[Mount, ...]
    scratch: tuple[HostDirectory, ...]
    command: tuple[str, ...]
    environment: tuple[tuple[str, bytes], ...]
    working_dir: str
    network: Network
    user_namespaces: bool = False
    is_32_bit: bool = False


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What planning needs to know of the host and its policy: `ro_paths` are (absolute path, whether a directory)."""

    ro_paths: tuple[tuple[str, bool], ...] = ()
    network: Network = Network.NONE
    network_files: tuple[tuple[str, bytes], ...] = ()
    """resolv.conf and the CA bundle, under their paths in the root; used only with network."""
    user_namespaces: bool = False
    devices: frozenset[str] = frozenset()
    """Those of `ro_paths` that are device nodes."""


def parents(path: str) -> list[str]:
    """The directories above `path`, outermost first, without the root."""
    parts = path.split("/")[:-1]
    return ["/".join(parts[: n + 1]) for n in range(len(parts))]


def outermost(paths: Sequence[str]) -> tuple[str, ...]:
    """Those of `paths` that are within no other."""
    found: list[str] = []
    for path in sorted(set(paths), key=lambda path: path.split("/")):
        if not found or not is_within(path, found[-1]):
            found.append(path)
    return tuple(found)


def plan_root(request: BuildRequest, host: HostFacts) -> RootPlan:
    """The plan of `request` on a host as `host` describes it."""
    constraints = request.constraints
    inputs_prefix = request.inputs_dir + "/" if request.inputs_dir else ""
    input_names = {inputs_prefix + name.decode("utf-8", "surrogateescape") for name, _ in request.inputs}
    scratch_roots = outermost([TMP, *request.scratch_paths])

    files = [File(path, contents, 0o444) for path, contents in request.additional_files]
    given = {file.path for file in files}
    own = ETC_FILES + (host.network_files if constraints.network_access else ())
    # An input `etc` replaces kiln's own whole; an additional file replaces the one of its name.
    files += [
        File(path, contents, 0o444)
        for path, contents in own
        if path not in given and path not in input_names and input_names.isdisjoint(parents(path))
    ]

    mounts: list[Mount] = []
    links: list[Link] = []
    for index, (name, node) in enumerate(request.inputs):
        target = inputs_prefix + name.decode("utf-8", "surrogateescape")
        if isinstance(node, SymlinkNode):
            links.append(Link(target, node.target))
        else:
            mounts.append(Mount(Input(index), target, is_directory=not hasattr(node, "executable")))
    if constraints.provide_bin_sh:
        mounts.append(Mount(Shell(), "bin/sh", is_directory=False))
    mounts += [
        Mount(HostPath(path), path.lstrip("/"), is_directory, device=path in host.devices)
        for path, is_directory in host.ro_paths
    ]

    # Every directory that has to exist so that something can stand in it.
    wanted = {TMP, "proc", "dev", *request.scratch_paths}
    if request.inputs_dir:
        wanted.add(request.inputs_dir)
    wanted.update(mount.target for mount in mounts if mount.is_directory)
    for path in [
        *wanted,
        *(mount.target for mount in mounts),
        *(file.path for file in files),
        *(link.path for link in links),
    ]:
        wanted.update(parents(path))

    def in_input(path: str) -> bool:
        name, inside, _ = path[len(inputs_prefix) :].partition("/")
        return bool(inside) and path.startswith(inputs_prefix) and inputs_prefix + name in input_names

    wanted = {path for path in wanted if not in_input(path)}  # Nothing is made inside an input.
    ends = sorted(f"{root}/" for root in scratch_roots)  # None begins with another, so the nearest is the only one.

    def root_of(path: str) -> str | None:
        nearest = bisect_right(ends, f"{path}/") - 1
        return ends[nearest][:-1] if nearest >= 0 and f"{path}/".startswith(ends[nearest]) else None

    def by_root(items: Iterable[T], path_of: Callable[[T], str]) -> Mapping[str, list[T]]:
        found: dict[str, list[T]] = {root: [] for root in scratch_roots}
        for item in items:
            if (root := root_of(path_of(item))) is not None:
                found[root].append(item)
        return found

    covered = {mount.target for mount in mounts}
    directories_in = by_root(sorted(wanted - covered - set(scratch_roots)), str)
    files_in = by_root(files, lambda file: file.path)
    links_in = by_root(links, lambda link: link.path)
    mounts_in = by_root(mounts, lambda mount: mount.target)
    scratch = tuple(
        HostDirectory(
            root,
            directories=tuple(directories_in[root]),
            files=tuple(File(file.path, file.contents, 0o644) for file in files_in[root]),
            links=tuple(links_in[root]),
            mount_points=tuple((mount.target, mount.is_directory) for mount in mounts_in[root]),
            holds_inputs=bool(request.inputs) and is_within(request.inputs_dir, root),
        )
        for root in scratch_roots
    )
    return RootPlan(
        directories=tuple(sorted(path for path in wanted if root_of(path) in (None, path))),
        files=tuple(file for file in files if root_of(file.path) is None),
        links=tuple(link for link in links if root_of(link.path) is None),
        mounts=(*(Mount(Scratch(root), root, is_directory=True, writable=True) for root in scratch_roots), *mounts),
        scratch=scratch,
        command=request.command,
        environment=build_environment(request),
        working_dir=request.working_dir,
        network=host.network if constraints.network_access else Network.NONE,
        user_namespaces=host.user_namespaces,
        is_32_bit=constraints.system is not None and constraints.system.startswith("i686-"),
    )


def build_environment(request: BuildRequest) -> tuple[tuple[str, bytes], ...]:
    """The request's variables in their order, PWD always the working directory, HOME=/ where the request has none."""
    pwd = ("/" + request.working_dir).encode()
    variables = [(key, pwd if key == "PWD" else value) for key, value in request.environment]
    names = {key for key, _ in variables}
    if "PWD" not in names:
        variables.append(("PWD", pwd))
    if "HOME" not in names:
        variables.append(("HOME", b"/"))
    return tuple(variables)
