"""Renders a root plan for bubblewrap.

bwrap makes the namespaces, maps the ids, mounts /proc and /dev, drops capabilities, loads the filter and reaps; the
launcher completes the root while bwrap waits (see `launcher_process`). bwrap's options come through a descriptor, so
that the build's environment never is the environment of a process outside the sandbox.
"""

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from kiln.sandbox import mounts
from kiln.sandbox.errors import RuntimeMissing
from kiln.sandbox.launcher import Order, memory_file
from kiln.sandbox.network import NetworkHelper
from kiln.sandbox.plan import (
    BUILD_GID,
    BUILD_UID,
    HOSTNAME,
    HostPath,
    Input,
    Mount,
    Network,
    RootPlan,
    Scratch,
    Shell,
)
from kiln.sandbox.runtime import Runtime, RuntimeInfo, Sources, Streams
from kiln.sandbox.seccomp import filter_program
from kiln.sandbox.uids import Identity

_STDIN, _STDOUT, _STDERR, _ARGS, _SECCOMP, _PAUSE, _STATUS, _GATE = 0, 1, 2, 10, 11, 12, 13, 14
_PAUSE_FILE = ".kiln-pause"
_OLDEST = (0, 8)  # The first with --disable-userns.
_READ_ONLY = mounts.RDONLY | mounts.NOSUID | mounts.NODEV
_WRITABLE = mounts.NOSUID | mounts.NODEV


def bwrap_options(plan: RootPlan, *, terminal: bool = False) -> list[str]:
    """The options for `plan` (pure); `--file` makes bwrap wait for the launcher."""
    options = ["--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup"]
    if plan.network is not Network.HOST:
        options.append("--unshare-net")
    if not plan.user_namespaces:
        options.append("--disable-userns")
    if not terminal:  # The launcher makes the session, and the terminal its own.
        options.append("--new-session")
    options += ["--uid", str(BUILD_UID), "--gid", str(BUILD_GID), "--hostname", HOSTNAME]
    options.append("--clearenv")
    for key, value in plan.environment:
        options += ["--setenv", key, os.fsdecode(value)]
    options += ["--chdir", "/" + plan.working_dir, "--proc", "/proc", "--dev", "/dev"]
    options += ["--seccomp", str(_SECCOMP), "--json-status-fd", str(_STATUS)]
    options += ["--file", str(_PAUSE), "/" + _PAUSE_FILE, "--remount-ro", "/"]
    return options


def attachments(plan: RootPlan, sources: Sources) -> list[list[object]]:
    """The steps that complete bwrap's root (pure); see `complete_root`."""
    # bwrap has made /proc and /dev. Its /dev/core names a file that only the host's root may read, and Nix has none.
    steps: list[list[object]] = [["remove", _PAUSE_FILE], ["remove", "dev/core"]]
    steps += [["dir", path, 0o755] for path in plan.directories if path not in {"proc", "dev"}]
    scratch_roots = tuple(root.root for root in plan.scratch)
    made = {*plan.directories}
    for mount in plan.mounts:
        if not _is_in(mount.target, scratch_roots) and mount.target not in made:
            steps.append(["dir", mount.target, 0o755] if mount.is_directory else ["file", mount.target, 0o444, ""])
    steps += [["file", file.path, file.mode, os.fsdecode(file.contents)] for file in plan.files]
    steps += [["link", link.path, os.fsdecode(link.target)] for link in plan.links]
    steps += [_bind(mount, sources) for mount in plan.mounts]
    steps.append(["tmpfs", "dev/shm", _WRITABLE, {"mode": "1777", "size": "50%"}])
    steps.append(["attributes", "dev", mounts.RDONLY])
    return steps


def _is_in(path: str, roots: tuple[str, ...]) -> bool:
    return any(path == root or path.startswith(root + "/") for root in roots)


def _bind(mount: Mount, sources: Sources) -> list[object]:
    match mount.source:
        case Input(index):
            source = sources.inputs[index]
        case Scratch(path):
            source = sources.scratch[path]
        case Shell():
            source = sources.shell
        case HostPath(path):
            source = os.path.realpath(path)
    attributes = _WRITABLE if mount.writable else _READ_ONLY
    if mount.device:
        attributes &= ~mounts.NODEV
    return ["bind", source, mount.target, attributes, isinstance(mount.source, HostPath) and mount.is_directory]


class Bwrap(Runtime):
    """bubblewrap, by the path of its program."""

    def __init__(self, program: str, network_helper: NetworkHelper | None = None) -> None:
        self._program = program
        self._network_helper = network_helper
        version = _version_of(program)
        self._info = RuntimeInfo(name="bwrap", version=version, builder_id="https://kiln.build/builders/bwrap/v1")
        self._machine = platform.machine()
        self._filter = filter_program(self._machine)

    @property
    def info(self) -> RuntimeInfo:
        return self._info

    @contextmanager
    def order(self, plan: RootPlan, sources: Sources, identity: Identity | None, streams: Streams) -> Iterator[Order]:
        options = bwrap_options(plan, terminal=streams.terminal)
        private = plan.network is Network.PRIVATE
        persona = mounts.ADDR_NO_RANDOMIZE | (mounts.PER_LINUX32 if plan.is_32_bit else 0)
        with (
            memory_file("bwrap-args", b"".join(os.fsencode(word) + b"\0" for word in options)) as arguments,
            memory_file("seccomp", self._filter) as seccomp,
        ):
            yield Order(
                argv=[self._program, "--args", str(_GATE), "--args", str(_ARGS), "--", *plan.command],
                uid=os.getuid() if identity is None else identity.uid,
                gid=os.getgid() if identity is None else identity.uid,
                status_descriptor=_STATUS,
                descriptors={
                    _STDIN: streams.stdin,
                    _STDOUT: streams.stdout,
                    _STDERR: streams.stderr,
                    _ARGS: arguments,
                    _SECCOMP: seccomp,
                },
                gate_descriptor=_GATE,
                gate_contents="--die-with-parent\0--unsetenv\0",
                gate_rest="KILN\0",
                pause_descriptor=_PAUSE,
                pause_contents="-",
                attach=attachments(plan, sources),
                personality=persona,
                companions=[self._network_helper.companion] if private and self._network_helper else [],
                terminal=streams.terminal,
            )


def _version_of(program: str) -> str:
    """What `program --version` says. Raises RuntimeMissing where it is missing, broken or too old."""
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except FileNotFoundError:
        raise RuntimeMissing(
            f"{program} is not there: install bubblewrap (Debian: apt-get install bubblewrap)"
        ) from None
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeMissing(f"{program} does not run: {error}") from error
    found = re.search(r"(\d+)\.(\d+)(?:\.\d+)?", said)
    if found is None or (int(found[1]), int(found[2])) < _OLDEST:
        raise RuntimeMissing(f"{program} is {said.strip()!r}; bubblewrap 0.8 or newer is needed")
    return found[0]
