"""Control groups: limits that hold for all processes of a build together, and what they used.

cgroup v2 is taken where memory and pids are delegated to us, v1 where the host has that; where neither can be written,
a build has no group and rlimits must do. A group is made for one build and never used again: its counters tell an
out-of-memory kill of this build from anything else.
"""

import contextlib
import errno
import os
import select
import signal
from collections.abc import Iterator
from dataclasses import dataclass

_MOUNTS = "/proc/self/mountinfo"
_PREFIX = "kiln-"
# A v1 hierarchy each; `cpu` only where a build's CPU is limited, for each group a process joins costs it 0.3 ms.
_V1_CONTROLLERS = ("memory", "pids", "cpuacct")


@dataclass(frozen=True, slots=True)
class GroupUsage:
    """What a group counted; None where the host does not count it."""

    memory_peak: int | None = None
    memory_now: int | None = None
    cpu_user_s: float | None = None
    cpu_system_s: float | None = None
    processes_peak: int | None = None
    oom_kills: int | None = None
    fork_refusals: int | None = None


@dataclass(frozen=True, slots=True)
class Hierarchies:
    """Where groups can be made: `v2` is a directory with the controllers enabled, `v1` one directory a controller."""

    v2: str | None = None
    v1: tuple[tuple[str, str], ...] = ()

    @property
    def enforced(self) -> frozenset[str]:
        """The limits that groups here enforce."""
        if self.v2 is not None:
            return frozenset({"memory", "processes", "cpu"})
        names = {"memory": "memory", "pids": "processes", "cpu": "cpu"}
        return frozenset(names[controller] for controller, _ in self.v1 if controller in names)


def detect() -> Hierarchies:
    """What this process can use. Enables v2's controllers for groups below its own where they are delegated."""
    v1: dict[str, str] = {}
    v2: str | None = None
    with open(_MOUNTS, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            left, _, right = line.partition(" - ")
            fields, (kind, _, options) = left.split(), right.split(" ", 2)
            where = fields[4].encode().decode("unicode_escape")
            if kind == "cgroup":
                for controller in (*_V1_CONTROLLERS, "cpu"):
                    if controller in options.strip().split(","):
                        v1.setdefault(controller, where)
            elif kind == "cgroup2":
                v2 = v2 or where
    own = _own_groups()
    if v2 is not None and (base := _delegated_v2(v2 + own.get("", "/"))) is not None:
        return Hierarchies(v2=base)
    usable = []
    for controller, where in v1.items():
        base = where + own.get(controller, "/").rstrip("/")
        # Below our own group where there is one, so that whoever limits kiln limits its builds with it.
        for candidate in (base, where):
            if os.access(candidate, os.W_OK):
                usable.append((controller, candidate))
                break
    return Hierarchies(v1=tuple(usable))


def _own_groups() -> dict[str, str]:
    """Controller (v2: the empty string) -> the group this process is in."""
    groups = {}
    with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            for controller in controllers.split(","):
                groups[controller] = path
    return groups


def _delegated_v2(base: str) -> str | None:
    """`base` with memory and pids enabled for groups below it, or None.

    A group with processes of its own cannot enable controllers for others: ours move to a leaf first.
    """
    wanted = ("memory", "pids", "cpu")
    try:
        available = _read(f"{base}/cgroup.controllers").split()
        if not {"memory", "pids"} <= set(available) or not os.access(base, os.W_OK):
            return None
        enable = " ".join(f"+{controller}" for controller in wanted if controller in available)
        try:
            _write(f"{base}/cgroup.subtree_control", enable)
        except OSError as error:
            if error.errno != errno.EBUSY:
                return None
            leaf = f"{base}/{_PREFIX}supervisor"
            os.makedirs(leaf, exist_ok=True)
            for process in _read(f"{base}/cgroup.procs").split():
                with contextlib.suppress(ProcessLookupError):
                    _write(f"{leaf}/cgroup.procs", process)
            _write(f"{base}/cgroup.subtree_control", enable)
    except OSError:
        return None
    return base


class Group:
    """The control group of one build."""

    def __init__(self, directories: dict[str, str], *, unified: bool) -> None:
        self._directories = directories
        self._unified = unified

    @property
    def process_files(self) -> list[str]:
        """The files to which a process writes "0" to join."""
        return sorted({f"{directory}/cgroup.procs" for directory in self._directories.values()})

    def limit(self, *, memory_bytes: int, processes: int, cpu_millis: int) -> None:
        """Set its limits (`cpu_millis` 0: none). Raises OSError where the kernel refuses."""
        if self._unified:
            directory = self._directories[""]
            _write(f"{directory}/memory.max", str(memory_bytes))
            _write_if_there(f"{directory}/memory.swap.max", "0")
            _write_if_there(f"{directory}/memory.oom.group", "1")
            _write(f"{directory}/pids.max", str(processes))
            if cpu_millis:
                _write_if_there(f"{directory}/cpu.max", f"{cpu_millis * 100} 100000")
            return
        if memory := self._directories.get("memory"):
            _write(f"{memory}/memory.limit_in_bytes", str(memory_bytes))
            _write_if_there(f"{memory}/memory.memsw.limit_in_bytes", str(memory_bytes))
        if pids := self._directories.get("pids"):
            _write(f"{pids}/pids.max", str(processes))
        if cpu_millis and (cpu := self._directories.get("cpu")):
            _write(f"{cpu}/cpu.cfs_quota_us", str(cpu_millis * 100))

    def processes(self) -> list[int]:
        """The processes that are in it now; none where there is no group."""
        for directory in self._directories.values():
            with contextlib.suppress(OSError):
                return [int(process) for process in _read(f"{directory}/cgroup.procs").split()]
        return []

    def usage(self) -> GroupUsage:
        """What it counted so far."""
        if not self._directories:
            return GroupUsage()
        if self._unified:
            return _usage_v2(self._directories[""])
        return _usage_v1(self._directories)

    def remove(self) -> None:
        """Kill what is left in it and remove it; gone already is fine."""
        for directory in self._directories.values():
            remove_group(directory)


@contextlib.contextmanager
def group(
    hierarchies: Hierarchies, store_id: str, build_id: str, *, memory_bytes: int, processes: int, cpu_millis: int
) -> Iterator[Group]:
    """A new group with these limits (`cpu_millis` 0: none), removed at the end with all that is left in it.

    Its name says whose it is, should nobody be there at the end. Raises OSError where the kernel refuses.
    """
    name = f"{_PREFIX}{store_id}-{build_id}"
    made = Group({}, unified=hierarchies.v2 is not None)
    bases = {"": hierarchies.v2} if hierarchies.v2 is not None else dict(hierarchies.v1)
    try:
        for controller, base in bases.items():
            if controller == "cpu" and not cpu_millis:  # Of v1's hierarchies, one less for the process to join.
                continue
            made._directories[controller] = directory = f"{base}/{name}"
            with contextlib.suppress(FileExistsError):  # Two controllers may share a hierarchy.
                os.mkdir(directory)
        made.limit(memory_bytes=memory_bytes, processes=processes, cpu_millis=cpu_millis)
        yield made
    finally:
        made.remove()


def groups_of_store(hierarchies: Hierarchies, store_id: str) -> list[tuple[str, str]]:
    """(build id, directory) of every group there is of this store's builds."""
    prefix = f"{_PREFIX}{store_id}-"
    found = []
    for base in {hierarchies.v2, *(base for _, base in hierarchies.v1)} - {None}:
        assert base is not None
        with contextlib.suppress(OSError):
            found += [(n.removeprefix(prefix), f"{base}/{n}") for n in os.listdir(base) if n.startswith(prefix)]
    return found


def remove_group(directory: str) -> None:
    """Kill every process in the group and remove it."""
    while True:
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        else:
            return
        pidfds = []
        for process in _read(f"{directory}/cgroup.procs").split():
            with contextlib.suppress(ProcessLookupError):
                pidfds.append(os.pidfd_open(int(process)))
                signal.pidfd_send_signal(pidfds[-1], signal.SIGKILL)
        for pidfd in pidfds:
            _wait_for_end(pidfd)
            os.close(pidfd)


def _wait_for_end(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll()


def _usage_v2(directory: str) -> GroupUsage:
    cpu = _fields(f"{directory}/cpu.stat")
    events = _fields(f"{directory}/memory.events")
    return GroupUsage(
        memory_peak=_number(f"{directory}/memory.peak"),  # Since Linux 5.19.
        memory_now=_number(f"{directory}/memory.current"),
        cpu_user_s=cpu["user_usec"] / 1e6 if "user_usec" in cpu else None,
        cpu_system_s=cpu["system_usec"] / 1e6 if "system_usec" in cpu else None,
        processes_peak=_number(f"{directory}/pids.peak"),  # Since Linux 6.1.
        oom_kills=events.get("oom_kill"),
        fork_refusals=_fields(f"{directory}/pids.events").get("max"),
    )


def _usage_v1(directories: dict[str, str]) -> GroupUsage:
    memory, pids, cpuacct = (directories.get(name, "") for name in _V1_CONTROLLERS)
    cpu = _fields(f"{cpuacct}/cpuacct.stat")
    ticks = os.sysconf("SC_CLK_TCK")
    return GroupUsage(
        memory_peak=_number(f"{memory}/memory.max_usage_in_bytes"),
        memory_now=_number(f"{memory}/memory.usage_in_bytes"),
        cpu_user_s=cpu["user"] / ticks if "user" in cpu else None,
        cpu_system_s=cpu["system"] / ticks if "system" in cpu else None,
        processes_peak=None,
        oom_kills=_fields(f"{memory}/memory.oom_control").get("oom_kill"),
        fork_refusals=_fields(f"{pids}/pids.events").get("max"),
    )


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def _write(path: str, value: str) -> None:
    # One write: the kernel takes each write(2) to such a file as a value of its own.
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, value.encode())
    finally:
        os.close(descriptor)


def _write_if_there(path: str, value: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        _write(path, value)


def _number(path: str) -> int | None:
    try:
        return int(_read(path))
    except (OSError, ValueError):
        return None


def _fields(path: str) -> dict[str, int]:
    """A file of `name number` lines; empty where it is not there."""
    try:
        lines = _read(path).splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
