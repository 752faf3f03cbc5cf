"""The launcher process: starts runtimes under other uids, completes their root file systems, and sees them end.

One of these runs beside each kiln process that builds. It exists because the serving process must not fork once gRPC
has threads, and because only a single-threaded process may change its uid, its file system uid and its namespaces.
It trusts its one client, the process that started it; when that goes away, it kills every build and ends.

Orders and reports are JSON on a seqpacket socket. An order's body travels in a memory file, so it may have any size:

    {"order": "launch"}, and in the body {"id", "argv", "descriptors": [target, …], "attach": […], "cgroups", …}
    {"order": "kill", "id"}
    report: {"id", "event": "running" | "killed" | "failed" | "ended", …}

How a runtime is started and completed. bwrap is made to wait twice, each time by a pipe of one slot, filled
beforehand, from which it has to read to the end. The pipe becomes writable when bwrap has begun to read; until it is
closed, bwrap waits. Nothing polls, and no time limit is involved.

At the *gate* it reads the first of its options, of which the last lacks its value: should the launcher die and the pipe
end, bwrap ends too. It has been spawned, not forked, for a fork of this process and an exec out of it take longer than
all of bwrap. What can be set only for a process that exists (control groups, limits, CPUs) is set now.

In the *pause* it copies a file, as the last of its set-up. Its new root is assembled at /newroot, the host's is at
/oldroot, and no command has started. The launcher enters bwrap's mount namespace and makes the rest: directories,
files, and one mount for each input, which costs microseconds each where bwrap's own --ro-bind rereads the whole mount
table for each (500 inputs: 11 ms against 82 and more).
"""

import array
import contextlib
import fcntl
import json
import os
import resource
import select
import selectors
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kiln.sandbox import mounts
from kiln.sandbox.complete_root import complete_root, raw

Order = Mapping[str, Any]

_ORDER_BYTES_MAX = 4096
_DESCRIPTORS_MAX = 16
_SIGNALS = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
_ONE_SLOT = 4096
_COMPANION_READY_S = 10


class Build:
    """One runtime process, from its start until nothing of it is left."""

    def __init__(self, order: Order, pid: int, status: int, *, gate: int, pause: int) -> None:
        self.order = order
        self.id: int = order["id"]
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.status = status
        self.status_text = b""
        self.gate: int | None = gate
        self.pause: int | None = pause
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

    def drop(self, name: str) -> None:
        """Close our end of the pipe `name`: a runtime that waits there goes on."""
        if (pipe := getattr(self, name)) is not None:
            os.close(pipe)
            setattr(self, name, None)

    def close(self) -> None:
        """Release every descriptor."""
        for descriptor in (self.pidfd, self.status, self.gate, self.pause, self.init_pidfd):
            if descriptor is not None:
                os.close(descriptor)
        self.gate = self.pause = self.init_pidfd = None


class LauncherProcess:
    """The loop: orders in, reports out."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.selector = selectors.DefaultSelector()
        self.builds: dict[int, Build] = {}
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
                case "kill":
                    if (build := self.builds.get(head["id"])) is not None:
                        build.kill()
                        self.report(id=build.id, event="killed")
                case "launch":
                    self.launch(_read_order(descriptors[0]), descriptors[1:])
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def launch(self, order: Order, descriptors: list[int]) -> None:
        """Start the runtime; failing to is reported, never raised."""
        status, status_writer = os.pipe()
        os.set_blocking(status, False)
        gate_reader, gate = _awaited_pipe(order["gate"]["contents"])
        pause_reader, pause = _awaited_pipe(order["pause"]["contents"])
        inherited = {
            **dict(zip(order["descriptors"], descriptors, strict=True)),
            order["status"]: status_writer,
            order["gate"]["descriptor"]: gate_reader,
            order["pause"]["descriptor"]: pause_reader,
        }
        try:
            pid = self.spawn(order, inherited)
        except OSError as error:
            for descriptor in (status, gate, pause):
                os.close(descriptor)
            self.report(id=order["id"], event="failed", message=f"{order['argv'][0]}: {error}")
            return
        finally:
            for descriptor in (status_writer, gate_reader, pause_reader):
                os.close(descriptor)
        self.builds[order["id"]] = build = Build(order, pid, status, gate=gate, pause=pause)
        self.selector.register(build.pidfd, selectors.EVENT_READ, lambda: self.on_exit(build))
        self.selector.register(gate, selectors.EVENT_WRITE, lambda: self.on_gate(build))

    def on_gate(self, build: Build) -> None:
        """The runtime waits for the rest of its options: confine it, then let it go on."""
        if self.waits_at(build, "gate"):
            assert build.gate is not None
            assert build.pause is not None
            try:
                self.confine(build)
                os.write(build.gate, raw(build.order["gate"]["rest"]))
            except OSError as error:
                build.failure = f"cannot confine the runtime: {error}"
                build.kill()
            self.selector.register(build.pause, selectors.EVENT_WRITE, lambda: self.on_pause(build))
        build.drop("gate")

    def waits_at(self, build: Build, name: str) -> bool:
        """Whether the runtime is there, waiting at the pipe `name`; if it has ended, `on_exit` tells or has told."""
        pipe = getattr(build, name)
        if pipe is None:
            return False
        self.selector.unregister(pipe)
        return _is_awaited(pipe)

    def spawn(self, order: Order, inherited: Mapping[int, int]) -> int:
        """A new process that is the runtime, under the order's ids; `inherited` maps its descriptors to ours."""
        # Out of the way of the targets first: a source may have the number of another's target.
        floor = max(*inherited, *inherited.values()) + 1
        moved = {target: fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, floor) for target, source in inherited.items()}
        actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
            (os.POSIX_SPAWN_DUP2, source, target) for target, source in moved.items()
        ]
        if order["terminal"]:  # A session's first terminal becomes the one that controls it, by being opened.
            actions.append((os.POSIX_SPAWN_OPEN, 0, f"/proc/self/fd/{moved[0]}", os.O_RDWR, 0))
        mounts.leave_session_keyring()  # A new one for each build, or builds could leave each other keys.
        with self.acting(order, real_only=True):
            mounts.set_personality(order["personality"])
            try:
                return os.posix_spawn(
                    order["argv"][0],
                    [raw(word) for word in order["argv"]],
                    {},
                    file_actions=actions,
                    resetids=True,
                    setsid=order["terminal"],
                    setsigdef=_SIGNALS,
                    setsigmask=(),
                )
            finally:
                mounts.set_personality(0)
                for descriptor in moved.values():
                    os.close(descriptor)

    def confine(self, build: Build) -> None:
        """Put the runtime, which waits at its gate, into its control groups and under its limits."""
        order, pid = build.order, build.pid
        for group in order["cgroups"]:
            _write(group, str(pid))
        with contextlib.suppress(OSError):
            _write(f"/proc/{pid}/oom_score_adj", str(order["oom_score_adj"]))
        if order["cpus"]:
            os.sched_setaffinity(pid, order["cpus"])
        for name, (soft, hard) in order["rlimits"].items():
            which = getattr(resource, name)
            try:
                resource.prlimit(pid, which, (soft, hard))
            except (PermissionError, ValueError):  # Without CAP_SYS_RESOURCE: as its user, and no more than it has.
                with self.acting(order, real_only=False):
                    resource.prlimit(pid, which, _attainable(pid, which, soft, hard))

    @contextlib.contextmanager
    def acting(self, order: Order, *, real_only: bool) -> Iterator[None]:
        """Have the order's ids for the block, where we are root: as real ids only, or as effective ones, too."""
        if not self.is_root:
            yield
            return
        uid, gid = order["uid"], order["gid"]
        os.setresgid(gid, 0 if real_only else gid, 0)
        os.setresuid(uid, 0 if real_only else uid, 0)
        try:
            yield
        finally:
            os.setresuid(0, 0, 0)
            os.setresgid(0, 0, 0)

    def on_pause(self, build: Build) -> None:
        """The runtime waits with its root assembled: complete it, then let it go on."""
        if not self.waits_at(build, "pause"):
            build.drop("pause")
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
        build.drop("pause")
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
        for pipe in (build.gate, build.pause):
            if pipe is not None and pipe in self.selector.get_map():
                self.selector.unregister(pipe)
        build.kill()
        build.drop("gate")
        build.drop("pause")
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
        known: set[int | None] = set()
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


def _awaited_pipe(contents: str) -> tuple[int, int]:
    """A pipe that is full with `contents`, at most a page: it becomes writable when its reader has begun to read."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _ONE_SLOT)
    os.write(writer, raw(contents))
    return reader, writer


def _is_awaited(pipe: int) -> bool:
    """Whether the other end of `pipe`, to which we could write, is still open."""
    poll = select.poll()
    poll.register(pipe, select.POLLOUT)
    return not any(events & select.POLLERR for _, events in poll.poll(0))


def _default_signals() -> None:
    """Undo what Python and the launcher ignore, and what kiln's own caller blocks: both stay so over execve."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in range(1, signal.NSIG):
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)


def _attainable(pid: int, which: int, soft: int, hard: int) -> tuple[int, int]:
    """As much of a limit as the process's present hard limit allows; -1 is no limit."""
    _, ceiling = resource.prlimit(pid, which)
    if ceiling != resource.RLIM_INFINITY:
        hard = ceiling if hard == resource.RLIM_INFINITY else min(hard, ceiling)
        soft = hard if soft == resource.RLIM_INFINITY else min(soft, hard)
    return soft, hard


def _write(path: str, value: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, value.encode())
    finally:
        os.close(descriptor)


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


def main() -> None:
    """Serve the socket whose descriptor is the one argument."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # The client decides when builds end, and its own end is noticed.
    client = socket.socket(fileno=int(sys.argv[1]))
    client.set_inheritable(False)  # It came by inheritance; no build may have it.
    os.umask(0o022)
    if os.geteuid() == 0:
        os.setgroups([])
    mounts.adopt_orphans()
    os.chdir("/")
    LauncherProcess(client).run()
