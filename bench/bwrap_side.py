"""bubblewrap alone: the namespaces, ids and mounts of a kiln build on its own command line, and nothing around it."""

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from kiln.sandbox.launcher import memory_file
from kiln.sandbox.plan import BUILD_GID, BUILD_UID, ETC_FILES, HOSTNAME
from kiln.sandbox.seccomp import filter_program

_STATUS_BYTES_MAX = 65536


def found(program: str) -> str:
    """The path of a program that benchmarks cannot do without."""
    path = shutil.which(program)
    assert path is not None, f"{program} is not installed: run ./dev setup"
    return path


class Bwrap:
    """Runs scripts in /build of a sandbox, with files of `directory` for what kiln keeps elsewhere."""

    def __init__(self, directory: str) -> None:
        self._bwrap = found("bwrap")
        self._shell = found("busybox")
        self._directory = directory
        os.mkdir(directory)
        os.mkdir(f"{directory}/etc")
        for path, contents in ETC_FILES:
            self.file(path, contents)
        self._filter = filter_program(platform.machine())
        self._count = 0

    def file(self, name: str, contents: bytes) -> str:
        """A file to be an input; returns its path."""
        path = f"{self._directory}/{name}"
        with open(path, "wb") as file:
            file.write(contents)
        return path

    def run(self, script: str, inputs: Sequence[tuple[str, str]] = ()) -> bytes:
        """Run `script` once; returns what it wrote. `inputs`: name in /inputs and path here."""
        self._count += 1
        scratch = f"{self._directory}/{self._count}"
        for path in (scratch, f"{scratch}/build", f"{scratch}/tmp"):
            os.mkdir(path)
        with memory_file("seccomp", self._filter) as seccomp:
            status, status_writer = os.pipe()
            try:
                done = subprocess.run(
                    self._argv(script, inputs, scratch, seccomp=seccomp, status=status_writer),
                    pass_fds=(seccomp, status_writer),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    check=True,
                )
                os.read(status, _STATUS_BYTES_MAX)
            finally:
                os.close(status)
                os.close(status_writer)
        return done.stdout

    def _argv(
        self, script: str, inputs: Sequence[tuple[str, str]], scratch: str, *, seccomp: int, status: int
    ) -> list[str]:
        argv = [
            self._bwrap, "--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup",
            "--unshare-net", "--disable-userns", "--new-session", "--die-with-parent",
            "--uid", str(BUILD_UID), "--gid", str(BUILD_GID), "--hostname", HOSTNAME,
            "--clearenv", "--setenv", "HOME", "/", "--chdir", "/build", "--proc", "/proc", "--dev", "/dev",
            "--tmpfs", "/dev/shm", "--bind", f"{scratch}/build", "/build", "--bind", f"{scratch}/tmp", "/tmp",
            "--ro-bind", self._shell, "/bin/sh",
        ]  # fmt: skip
        for path, _ in ETC_FILES:
            argv += ["--ro-bind", f"{self._directory}/{path}", f"/{path}"]
        for name, path in inputs:
            argv += ["--ro-bind", path, f"/inputs/{name}"]
        argv += [
            "--seccomp",
            str(seccomp),
            "--json-status-fd",
            str(status),
            "--remount-ro",
            "/dev",
            "--remount-ro",
            "/",
        ]
        return [*argv, "--", "/bin/sh", "-c", script]

    def run_two_at_a_time(self, scripts: Sequence[str]) -> None:
        """All of `scripts`, from two threads: they wait for processes, and need no interpreter for that."""
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self.run, scripts))
