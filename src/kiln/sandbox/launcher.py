"""Starts processes through the launcher process (`launcher_process`), and tells how they end."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kiln.sandbox.errors import LauncherGone, LaunchFailed

_REPORT_BYTES_MAX = 65536
_PATIENCE_S = 30.0  # Longer than anything for which the launcher process ever pauses (a network that comes up: 10 s).
# -I: nothing of the caller's environment or directory; -S: no site-packages, which would cost more than all the rest.
_PROGRAM = "import sys; sys.path.append(sys.argv.pop(1)); from kiln.sandbox.launcher_process import main; main()"


@dataclass(frozen=True, slots=True)
class Companion:
    """A program beside the sandbox; `{pid}` is its first process, `{ready}` a descriptor to write one byte to.

    It runs as the build's user, unless `as_launcher` leaves it the launcher's own ids.
    """

    argv: tuple[str, ...]
    as_launcher: bool = False


@dataclass(frozen=True, slots=True)
class Order:
    """What the launcher process is to start. Strings carry file names as `os.fsdecode` gives them."""

    argv: Sequence[str]
    uid: int
    gid: int
    status_descriptor: int
    """Where the runtime writes its JSON status (bwrap's --json-status-fd)."""
    descriptors: Mapping[int, int]
    """Descriptor in the new process -> one of ours."""
    gate_descriptor: int
    gate_contents: str
    gate_rest: str
    """From where it reads its first options, without which it ends, and waits for the rest (see `launcher_process`)."""
    pause_descriptor: int
    """From where it reads `pause_contents` once its root stands, and waits for their end."""
    pause_contents: str
    attach: Sequence[Sequence[object]] = ()
    cgroups: Sequence[str] = ()
    rlimits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    cpus: Sequence[int] = ()
    personality: int = 0
    oom_score_adj: int = 0
    companions: Sequence[Companion] = ()
    terminal: bool = False
    """Descriptor 0 is a terminal, to become the controlling one of a session of its own."""


@dataclass(frozen=True, slots=True)
class Ended:
    """All processes are gone. `exit_code` is the command's; None where it was never started."""

    status: int
    exit_code: int | None
    user_s: float
    system_s: float
    peak_bytes: int


class Launch:
    """One order under way."""

    def __init__(self, launcher: "Launcher", number: int) -> None:
        loop = asyncio.get_running_loop()
        self._launcher = launcher
        self._number = number
        self.running: asyncio.Future[None] = loop.create_future()
        """Done once the runtime was let go; raises LaunchFailed."""
        self.ended: asyncio.Future[Ended] = loop.create_future()
        """Done once nothing of it is left; raises LaunchFailed or LauncherGone."""
        self._patience: asyncio.TimerHandle | None = None

    def kill(self) -> None:
        """End all its processes; `ended` tells when that is done.

        A launcher process that does not obey in time is ended itself.
        """
        if self.ended.done():
            return
        self._launcher.send({"order": "kill", "id": self._number}, [])
        if self._patience is None:
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(self._launcher.patience_s, self._launcher.give_up)
            self.ended.add_done_callback(lambda _: self.obeyed())

    def obeyed(self) -> None:
        """The launcher process has taken the order to kill."""
        if self._patience is not None:
            self._patience.cancel()

    def fail(self, error: Exception) -> None:
        """Both futures raise `error`; whoever waits for neither is not warned of that."""
        for future in (self.running, self.ended):
            if not future.done():
                future.set_exception(error)
                future.exception()


class Launcher:
    """The one launcher process of this kiln process; started on first use, and again should it ever die."""

    def __init__(self, *, patience_s: float = _PATIENCE_S) -> None:
        self.patience_s = patience_s
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._launches: dict[int, Launch] = {}
        self._count = 0

    def start(self) -> None:
        """Start the process now, to save the first build its 20 ms."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-X", "utf8", "-c", _PROGRAM, package, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # A Ctrl-C at the terminal is for kiln, which then ends its builds in order.
                env={"PATH": os.defpath},
            )
        self._socket = ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self._on_report)

    async def close(self) -> None:
        """Kill all builds and end the process."""
        if self._socket is None or self._process is None:
            return
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        self._socket = None
        await asyncio.to_thread(self._process.wait)
        for launch in self._launches.values():
            launch.fail(LauncherGone())
        self._launches.clear()

    @property
    def process_id(self) -> int | None:
        """The process, while there is one."""
        return self._process.pid if self._process is not None and self._socket is not None else None

    def launch(self, order: Order) -> Launch:
        """Start what `order` says. Descriptors in it may be closed as soon as this returns."""
        if self._socket is None:
            self.start()
        self._count += 1
        launch = Launch(self, self._count)
        body = {
            "id": self._count,
            "argv": list(order.argv),
            "uid": order.uid,
            "gid": order.gid,
            "status": order.status_descriptor,
            "descriptors": list(order.descriptors),
            "attach": [list(step) for step in order.attach],
            "gate": {"descriptor": order.gate_descriptor, "contents": order.gate_contents, "rest": order.gate_rest},
            "pause": {"descriptor": order.pause_descriptor, "contents": order.pause_contents},
            "cgroups": list(order.cgroups),
            "rlimits": {name: list(limit) for name, limit in order.rlimits.items()},
            "cpus": list(order.cpus),
            "personality": order.personality,
            "oom_score_adj": order.oom_score_adj,
            "terminal": order.terminal,
            "companions": [
                {"argv": list(companion.argv), "as_launcher": companion.as_launcher} for companion in order.companions
            ],
        }
        with memory_file("order", json.dumps(body).encode()) as descriptor:
            self._launches[self._count] = launch
            self.send({"order": "launch"}, [descriptor, *order.descriptors.values()])
        if self._socket is None:
            launch.fail(LauncherGone())
        return launch

    def give_up(self) -> None:
        """End a launcher process that hangs; its builds end with it."""
        if self._socket is not None:
            self._on_gone()

    def send(self, head: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        """Send one order."""
        if self._socket is None:
            return  # It is gone, and whoever waits for it has been told.
        message = json.dumps(head).encode()
        try:
            if descriptors:
                socket.send_fds(self._socket, [message], list(descriptors))
            else:
                self._socket.send(message)
        except (BrokenPipeError, ConnectionResetError):
            self._on_gone()

    def _on_report(self) -> None:
        assert self._socket is not None
        try:
            message = self._socket.recv(_REPORT_BYTES_MAX, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except ConnectionResetError:
            message = b""
        if not message:
            self._on_gone()
            return
        report = json.loads(message)
        launch = self._launches[report["id"]]
        match report["event"]:
            case "running":
                if not launch.running.done():
                    launch.running.set_result(None)
            case "killed":
                launch.obeyed()
            case "failed":
                del self._launches[report["id"]]
                launch.fail(LaunchFailed(report["message"]))
            case "ended":
                del self._launches[report["id"]]
                if not launch.running.done():
                    launch.running.set_result(None)
                if not launch.ended.done():
                    launch.ended.set_result(
                        Ended(
                            status=report["status"],
                            exit_code=report["exit_code"],
                            user_s=report["user_s"],
                            system_s=report["system_s"],
                            peak_bytes=report["peak_bytes"],
                        )
                    )

    def _on_gone(self) -> None:
        """The process died: so did its builds, whose parent it was."""
        assert self._socket is not None
        assert self._process is not None
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        self._socket = None
        self._process.kill()
        self._process.wait()
        launches, self._launches = self._launches, {}
        for launch in launches.values():
            launch.fail(LauncherGone())


@contextlib.contextmanager
def memory_file(name: str, contents: bytes) -> Iterator[int]:
    """A descriptor of an anonymous file with `contents`, at its start; closed on leaving."""
    descriptor = os.memfd_create(name)
    try:
        view = memoryview(contents)
        while view:
            view = view[os.write(descriptor, view) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)
