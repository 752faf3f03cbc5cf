"""The launcher process: starts runtimes under other uids, completes their root file systems, and sees them end.

One of these runs beside each kiln process that builds. It exists because the serving process must not fork once gRPC
has threads, and because only a single-threaded process may change its uid, its file system uid and its namespaces.
It trusts its one client, the process that started it; when that goes away, it kills every build and ends.

Orders and reports are JSON on a seqpacket socket. An order's body travels in a memory file, so it may have any size:

    {"order": "stand_by", "standby": number, "cgroups": [file, …]}   a process for a build to come
    {"order": "dismiss", "standby": number}
    {"order": "launch"}, and in the body {"id", "standby", "argv", "descriptors": [target, …], "attach": […], …}
    {"order": "kill", "id"}
    report: {"id", "event": "running" | "killed" | "failed" | "ended", …}

How the root is completed. bwrap is given one last file to copy whose contents come through a pipe of one slot. The pipe
becomes writable at the moment bwrap reads from it; until the pipe is closed, bwrap waits, its new root assembled at
/newroot, the host's at /oldroot, and no command started. In that pause the launcher enters bwrap's mount namespace and
makes the rest: directories, files, and one mount for each input, which costs microseconds each where bwrap's own
--ro-bind rereads the whole mount table for each (500 inputs: 11 ms against 82 and more).
"""

import array
import contextlib
import fcntl
import itertools
import json
import os
import resource
import select
import selectors
import signal
import socket
import sys
import termios
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from kiln.sandbox import mounts

Order = Mapping[str, Any]

_ORDER_BYTES_MAX = 4096
_DESCRIPTORS_MAX = 16
_DESCRIPTORS_END = 1 << 20
_F_SETPIPE_SZ = 1031
_ONE_SLOT = 4096
_COMPANION_READY_S = 10
_NEW_ROOT = b"/newroot"
_OLD_ROOT = b"/oldroot"
_IN_THE_ROOTS_TMPFS = frozenset({"dir", "file", "link", "remove"})


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Standby:
    """A process that waits for an order; what keeps it from becoming the runtime comes out of `trouble`."""

    pid: int
    socket: socket.socket
    trouble: int


class Build:
    """One runtime process, from its start until nothing of it is left."""

    def __init__(self, order: Order, standby: Standby, status: int, pause: int | None) -> None:
        self.order = order
        self.id: int = order["id"]
        self.pid = standby.pid
        self.pidfd = os.pidfd_open(standby.pid)
        self.trouble = standby.trouble
        self.status = status
        self.status_text = b""
        self.pause = pause
        self.init_pidfd: int | None = None
        self.init_pid: int | None = None
        self.companions: list[int] = []
        self.failure: str | None = None

    def read_status(self) -> list[dict[str, Any]]:
        """What the runtime has said of itself so far, one JSON document each."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.status, 65536):
                self.status_text += chunk
        documents, decoder, text = [], json.JSONDecoder(), self.status_text.decode()
        while text := text.lstrip():
            try:
                document, end = decoder.raw_decode(text)
            except ValueError:
                break  # Not yet complete.
            documents.append(document)
            text = text[end:]
        return documents

    def find_init(self) -> None:
        """Get hold of the sandbox's first process, by whose death the kernel ends all others in it."""
        if self.init_pidfd is not None:
            return
        for document in self.read_status():
            if "child-pid" in document:
                self.init_pid = document["child-pid"]
                with contextlib.suppress(ProcessLookupError):
                    self.init_pidfd = os.pidfd_open(self.init_pid)

    def kill(self) -> None:
        """Send SIGKILL to all of it."""
        self.find_init()
        for pidfd in (self.init_pidfd, self.pidfd):
            if pidfd is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def drop_pause(self) -> None:
        """Close our end: a runtime that waits goes on."""
        if self.pause is not None:
            os.close(self.pause)
            self.pause = None

    def close(self) -> None:
        """Release every descriptor."""
        for descriptor in (self.pidfd, self.status, self.trouble, self.pause, self.init_pidfd):
            if descriptor is not None:
                os.close(descriptor)
        self.pause = self.init_pidfd = None


class LauncherProcess:
    """The loop: orders in, reports out."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.selector = selectors.DefaultSelector()
        self.builds: dict[int, Build] = {}
        self.standbys: dict[int, Standby] = {}
        self.own_mounts = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        self.is_root = os.geteuid() == 0
        self.ended = False

    def run(self) -> None:
        """Serve until the client is gone, then leave nothing behind."""
        self.selector.register(self.client, selectors.EVENT_READ, self.on_order)
        while not self.ended:
            for key, _ in self.selector.select():
                callback: Callable[[], None] = key.data
                callback()
        for build in self.builds.values():
            build.kill()
        for build in list(self.builds.values()):
            self.reap(build)
        for number in list(self.standbys):
            self.dismiss(number)

    def report(self, **fields: object) -> None:
        """Tell the client; one that is gone is noticed by the loop."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.client.send(json.dumps(fields).encode())

    def on_order(self) -> None:
        """Take one order."""
        message, descriptors = _receive(self.client)
        if not message:
            self.ended = True
            return
        head = json.loads(message)
        try:
            match head["order"]:
                case "stand_by":
                    self.stand_by(head["standby"], head["cgroups"])
                case "dismiss":
                    self.dismiss(head["standby"])
                case "kill":
                    if (build := self.builds.get(head["id"])) is not None:
                        build.kill()
                        self.report(id=build.id, event="killed")
                case "launch":
                    self.launch(_read_order(descriptors[0]), descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def stand_by(self, number: int, groups: list[str]) -> Standby:
        """Fork the process of a build to come, which joins its control groups and waits there for its order."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        trouble, trouble_writer = os.pipe()
        launcher = os.getpid()
        pid = os.fork()
        if pid == 0:
            _await_order(theirs, trouble_writer, groups, launcher)
        theirs.close()
        os.close(trouble_writer)
        self.standbys[number] = standby = Standby(pid, ours, trouble)
        return standby

    def launch(self, order: Order, descriptors: list[int]) -> None:
        """Hand the order to its standby process, which becomes the runtime; failing to is reported, never raised."""
        standby = self.standbys.pop(order["standby"])
        status, status_writer = os.pipe()
        os.set_blocking(status, False)
        theirs = [status_writer]
        pause = None
        if "pause" in order:
            reader, pause = os.pipe()
            fcntl.fcntl(pause, _F_SETPIPE_SZ, _ONE_SLOT)
            os.write(pause, _raw(order["pause"]["contents"]))
            theirs.append(reader)
        # One that is dead already is noticed below, by its pidfd.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(standby.socket, [b"go"], [*descriptors, *theirs])
        standby.socket.close()
        for descriptor in theirs:
            os.close(descriptor)
        build = Build(order, standby, status, pause)
        self.builds[build.id] = build
        self.selector.register(build.pidfd, selectors.EVENT_READ, lambda: self.on_exit(build))
        if pause is not None:
            self.selector.register(pause, selectors.EVENT_WRITE, lambda: self.on_pause(build))
        else:
            self.report(id=build.id, event="running")

    def dismiss(self, number: int) -> None:
        """End a standby process that is not wanted any more."""
        standby = self.standbys.pop(number)
        standby.socket.close()
        os.close(standby.trouble)
        os.waitpid(standby.pid, 0)

    def on_pause(self, build: Build) -> None:
        """The runtime waits with its root assembled: complete it, then let the runtime go on."""
        if build.pause is None:
            return  # It ended, and `on_exit` came first.
        self.selector.unregister(build.pause)
        if not _is_awaited(build.pause):
            build.drop_pause()  # The runtime ended before it came this far; `on_exit` tells of that.
            return
        build.find_init()
        if build.init_pidfd is None:
            build.failure = f"the runtime did not say which process it made: {build.status_text!r}"
        else:
            try:
                self.attach_all(build)
                self.start_companions(build)
            except OSError as error:
                build.failure = str(error)
        if build.failure is not None:
            build.kill()
        build.drop_pause()
        if build.failure is None:
            self.report(id=build.id, event="running")

    def attach_all(self, build: Build) -> None:
        """Carry out the order's attachments in the sandbox's mount namespace."""
        process = f"/proc/{build.init_pid}/ns/"
        namespace = os.open(process + "mnt", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if self.is_root:
                mounts.enter(namespace, mounts.CLONE_NEWNS)
                try:
                    complete_root(build.order["attach"], build.order["uid"], build.order["gid"])
                finally:
                    mounts.act_as(0, 0)
                    mounts.enter(self.own_mounts, mounts.CLONE_NEWNS)
            else:  # Who has joined the sandbox's user namespace cannot come back: a child does, and ends there.
                owner = os.open(process + "user", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    _in_child(lambda: _complete_from_outside(owner, namespace, build.order["attach"]))
                finally:
                    os.close(owner)
        finally:
            os.close(namespace)

    def start_companions(self, build: Build) -> None:
        """Start what serves the sandbox from outside (a user-mode network), and wait until it is ready."""
        for companion in build.order["companions"]:
            ready, ready_writer = os.pipe()
            argv = [
                word.replace("{pid}", str(build.init_pid)).replace("{ready}", str(ready_writer))
                for word in companion["argv"]
            ]
            ids = None if companion["as_launcher"] or not self.is_root else build.order
            if ids is not None:  # Else it could not open it again by name, which is how pasta wants it.
                os.fchown(ready_writer, ids["uid"], ids["gid"])
            pid = os.fork()
            if pid == 0:
                os.set_inheritable(ready_writer, True)
                _run_companion(argv, ids)
            os.close(ready_writer)
            build.companions.append(pid)
            with os.fdopen(ready, "rb") as reader:
                if not select.select([reader], [], [], _COMPANION_READY_S)[0]:
                    raise OSError(f"{argv[0]} was not ready within {_COMPANION_READY_S} s: {' '.join(argv)}")
                if not reader.read(1):
                    raise OSError(f"{argv[0]} ended before it was ready: {' '.join(argv)}")

    def on_exit(self, build: Build) -> None:
        """The runtime is gone, so the command is; end what it left running. Others go on while that dies."""
        self.selector.unregister(build.pidfd)
        if build.pause is not None:
            self.selector.unregister(build.pause)
        build.kill()
        build.drop_pause()
        if build.init_pidfd is None:
            self.reap(build)
        else:
            self.selector.register(build.init_pidfd, selectors.EVENT_READ, lambda: self.on_init_exit(build))

    def on_init_exit(self, build: Build) -> None:
        """The sandbox's first process is gone, and before it all others in there."""
        assert build.init_pidfd is not None
        self.selector.unregister(build.init_pidfd)
        self.reap(build)

    def reap(self, build: Build) -> None:
        """Wait until every process of the build is gone, and say how it went."""
        _, status, used = os.wait4(build.pid, 0)
        spent = [used.ru_utime, used.ru_stime, used.ru_maxrss]
        build.find_init()
        if build.init_pidfd is not None and build.init_pid is not None:
            # Orphaned by the runtime, adopted here. The kernel lets it be waited for only after all others are gone.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(build.init_pidfd, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                _, _, used = os.wait4(build.init_pid, 0)
                spent = [spent[0] + used.ru_utime, spent[1] + used.ru_stime, max(spent[2], used.ru_maxrss)]
        for pid in build.companions:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        del self.builds[build.id]
        self.end_orphans()
        said = {key: value for document in build.read_status() for key, value in document.items()}
        if trouble := os.read(build.trouble, _ORDER_BYTES_MAX):
            build.failure = trouble.decode(errors="replace")
        build.close()
        if build.failure is not None:
            self.report(id=build.id, event="failed", message=build.failure)
        else:
            self.report(
                id=build.id, event="ended", status=os.waitstatus_to_exitcode(status), exit_code=said.get("exit-code"),
                user_s=spent[0], system_s=spent[1], peak_bytes=spent[2] * 1024,
            )  # fmt: skip

    def end_orphans(self) -> None:
        """End what is our child by adoption only: a runtime killed before it named the process it had just made."""
        known: set[int | None] = {standby.pid for standby in self.standbys.values()}
        for build in self.builds.values():
            known |= {build.pid, build.init_pid, *build.companions}
        while orphans := _children() - known:
            for pid in orphans:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _children() -> set[int]:
    """Our child processes; none where the kernel does not list them (CONFIG_PROC_CHILDREN, proc(5))."""
    with contextlib.suppress(FileNotFoundError), open(f"/proc/self/task/{os.getpid()}/children") as pids:
        return {int(pid) for pid in pids.read().split()}
    return set()


def _receive(peer: socket.socket) -> tuple[bytes, list[int]]:
    """The next message, empty at the end, and its descriptors, which `socket.recv_fds` would leave to be inherited."""
    room = socket.CMSG_SPACE(_DESCRIPTORS_MAX * array.array("i").itemsize)
    message, ancillary, _, _ = peer.recvmsg(_ORDER_BYTES_MAX, room, socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data)
    return message, list(descriptors)


def _read_order(body: int) -> dict[str, Any]:
    """The order in the memory file `body`, which stays open."""
    with open(body, "rb", closefd=False) as file:
        file.seek(0)
        order: dict[str, Any] = json.load(file)
    return order


def _is_awaited(pipe: int) -> bool:
    """Whether the other end of `pipe`, to which we could write, is still open."""
    poll = select.poll()
    poll.register(pipe, select.POLLOUT)
    return not any(events & select.POLLERR for _, events in poll.poll(0))


def _await_order(orders: socket.socket, trouble: int, groups: list[str], launcher: int) -> NoReturn:
    """In the new process: join the control groups ahead of time, for the kernel makes that wait; then take an order."""
    try:
        # Whatever else the launcher had open is not ours; a pause held open here would never end.
        ours = sorted((orders.fileno(), trouble))
        for low, high in itertools.pairwise((2, *ours, _DESCRIPTORS_END)):
            os.closerange(low + 1, high)
        for group in groups:
            with open(group, "w") as processes:
                processes.write("0")
        mounts.leave_session_keyring()
        message, descriptors = _receive(orders)
        if not message:
            os._exit(0)
        orders.close()
        order = _read_order(descriptors[0])
        pause = [order["pause"]["descriptor"]] if "pause" in order else []
        targets = [*order["descriptors"], order["status"], *pause]
        _become(order, dict(zip(targets, descriptors[1:], strict=True)), trouble, launcher)
    except BaseException as error:  # noqa: BLE001  # Whatever it is, it must not run on as a second launcher.
        with contextlib.suppress(OSError):  # Dismissed meanwhile, its group is gone, and nobody wants to know.
            os.write(trouble, str(error).encode(errors="replace"))
    os._exit(127)


def _become(order: Order, inherited: Mapping[int, int], trouble: int, launcher: int) -> NoReturn:
    """Take on the build's limits and ids and become the runtime; what is in the way goes to `trouble`."""
    try:
        # Out of the way of the targets first: a source may have the number of another's target.
        floor = max(*inherited, *inherited.values(), trouble) + 1
        moved = {target: fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, floor) for target, source in inherited.items()}
        trouble = fcntl.fcntl(trouble, fcntl.F_DUPFD_CLOEXEC, floor)
        for target, source in moved.items():
            os.dup2(source, target, inheritable=True)
        if order["terminal"]:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        for name, (soft, hard) in order["rlimits"].items():
            _set_rlimit(getattr(resource, name), soft, hard)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
            score.write(str(order["oom_score_adj"]))
        if order["cpus"]:
            os.sched_setaffinity(0, order["cpus"])
        os.umask(0o022)
        _default_signals()
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(order["gid"], order["gid"], order["gid"])
            os.setresuid(order["uid"], order["uid"], order["uid"])
        mounts.set_personality(order["personality"])
        os.chdir("/")
        mounts.die_with_parent(signal.SIGKILL)  # bwrap sees to that itself, but only once it has begun.
        if os.getppid() != launcher:
            os._exit(127)
        os.execve(order["argv"][0], [_raw(word) for word in order["argv"]], {})  # noqa: S606  # No shell is wanted.
    except OSError as error:
        os.write(trouble, f"{order['argv'][0]}: {error}".encode(errors="replace"))
    os._exit(127)


def _default_signals() -> None:
    """Undo what Python and the launcher ignore, and what kiln's own caller blocks: both stay so over execve."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in range(1, signal.NSIG):
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)


def _set_rlimit(which: int, soft: int, hard: int) -> None:
    """Set a limit, or as much of it as the host's own hard limit allows where we may not raise that; -1 is no limit."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(which, (soft, hard))
        return
    _, ceiling = resource.getrlimit(which)
    if ceiling != resource.RLIM_INFINITY:
        hard = ceiling if hard == resource.RLIM_INFINITY else min(hard, ceiling)
        soft = hard if soft == resource.RLIM_INFINITY else min(soft, hard)
    resource.setrlimit(which, (soft, hard))


def _run_companion(argv: list[str], ids: Order | None) -> None:
    """In the new process: take on the order's `uid` and `gid`, if one is given, and become the program."""
    try:
        _default_signals()
        silence = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        for descriptor in (1, 2):  # It chats about its file descriptors, on the terminal of whoever runs the build.
            os.dup2(silence, descriptor)
        if ids is not None:
            os.setgroups([])
            os.setresgid(ids["gid"], ids["gid"], ids["gid"])
            os.setresuid(ids["uid"], ids["uid"], ids["uid"])
        mounts.die_with_parent(signal.SIGKILL)  # After the ids: changing those clears it.
        os.execve(argv[0], argv, {})  # noqa: S606  # No shell is wanted.
    finally:
        os._exit(127)


def _in_child(work: Callable[[], None]) -> None:
    """Run `work` in a child process; what it raises is raised here, as OSError."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # The child must end here in any case.
            os.write(writer, str(error).encode(errors="replace"))
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as problems:
        problem = problems.read()
    os.waitpid(pid, 0)
    if problem:
        raise OSError(problem.decode(errors="replace"))


def _complete_from_outside(owner: int, namespace: int, steps: list[list[Any]]) -> None:
    mounts.enter(owner, mounts.CLONE_NEWUSER)
    mounts.enter(namespace, mounts.CLONE_NEWNS)
    complete_root(steps, 0, 0)


def complete_root(steps: list[list[Any]], uid: int, gid: int) -> None:
    """Carry out `steps` below /newroot. What is made in the root's own tmpfs is made as `uid`, the only one it knows.

    Steps: ["dir", path, mode] ["file", path, mode, contents] ["link", path, target] ["remove", path]
    ["bind", source, path, attributes, recursive] ["tmpfs", path, attributes, options] ["attributes", path, attributes]
    """
    os.umask(0)
    acting = (0, 0)

    def act(wanted: tuple[int, int]) -> None:
        nonlocal acting
        if wanted != acting:
            mounts.act_as(*wanted)
            acting = wanted

    for step in steps:
        kind = step[0]
        path = _NEW_ROOT + b"/" + _raw(step[2] if kind == "bind" else step[1])
        act((uid, gid) if kind in _IN_THE_ROOTS_TMPFS else (0, 0))
        try:
            match kind:
                case "dir":
                    os.mkdir(path, step[2])
                case "file":
                    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, step[2])
                    with os.fdopen(descriptor, "wb") as file:
                        file.write(_raw(step[3]))
                case "link":
                    os.symlink(_raw(step[2]), path)
                case "remove":
                    os.unlink(path)
                case "bind":
                    mounts.bind(_OLD_ROOT + _raw(step[1]), path, step[3], recursive=step[4])
                case "tmpfs":
                    mounts.tmpfs(path, step[2], step[3])
                case "attributes":
                    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
                    mounts.set_attributes(descriptor, step[2])
                    os.close(descriptor)
        except OSError as error:
            where = os.fsdecode(path.removeprefix(_NEW_ROOT))
            source = f" (from {step[1]})" if kind == "bind" else ""
            raise OSError(f"cannot make {kind} {where}{source}: {error}") from error
    act((0, 0))


def main() -> None:
    """Serve the socket whose descriptor is the one argument."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # The client decides when builds end, and its own end is noticed.
    client = socket.socket(fileno=int(sys.argv[1]))
    client.set_inheritable(False)  # It came by inheritance; no build may have it.
    mounts.adopt_orphans()
    LauncherProcess(client).run()
