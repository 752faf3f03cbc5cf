"""Builds that mean harm, and runtimes and launchers that fail at the worst moment."""

import asyncio
import ctypes
import os
import platform
import resource
import signal
from pathlib import Path

import pytest
from tests.sandbox.real_builder import Bench, MakeBench

from kiln.build.events import LimitDetail, Log, PathDetail, Reason
from kiln.build.model import BuildOptions
from kiln.sandbox import mounts
from kiln.sandbox.errors import LaunchFailed
from kiln.sandbox.launcher import Order
from kiln.sandbox.policy import GIB, MIB, Policy
from kiln.sandbox.runtime import Streams

_ADD_KEY = {"x86_64": 248, "aarch64": 217}
_SESSION_KEYRING = -3


def runtime(path: Path, start: str) -> str:
    """A program at `path` that passes for bubblewrap until it is to start something."""
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo bubblewrap 0.8.0 && exit\n{start}\n')
    path.chmod(0o755)
    return str(path)


class TestWhatIsInherited:
    async def test_keys_of_whoever_started_kiln_stay_with_them(self, make_bench: MakeBench, reachable: Path) -> None:
        mounts.leave_session_keyring()  # The test's own, so that it leaves nothing in anybody else's.
        libc = ctypes.CDLL(None, use_errno=True)
        key = libc.syscall(_ADD_KEY[platform.machine()], b"user", b"kiln-secret", b"sesame", 6, _SESSION_KEYRING)
        assert key > 0
        assert "kiln-secret" in Path("/proc/keys").read_text()
        # In a sandbox's user namespace it would not be listed, but could be read nevertheless.
        bench = await make_bench(program=runtime(reachable / "bwrap", "cat /proc/keys; exit 1"))
        assert "kiln-secret" not in (await bench.run("true")).log

    async def test_no_signal_is_blocked(self, bench: Bench) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        try:
            outcome = await bench.run("grep SigBlk /proc/self/status")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert outcome.log.split() == ["SigBlk:", "0" * 16]


class TestHostPaths:
    async def test_a_link_left_in_the_place_of_inputs_leads_nowhere(
        self, make_bench: MakeBench, reachable: Path
    ) -> None:
        bench = await make_bench(Policy(memory_bytes=GIB, keep_on_failure_s=60))
        reachable.chmod(0o777)
        request = bench.request(
            f"cd /nix && mv store gone && ln -s {reachable} store && exit 7",
            inputs=((b"planted", bench.shell),),
            inputs_dir="nix/store",
            scratch_paths=("nix",),
            working_dir="nix",
        )
        build_id = "01harmful"
        outcome = await bench.build(request, BuildOptions(build_id=build_id))
        assert outcome.failure.message == "the command exited with code 7"
        null = os.open(os.devnull, os.O_RDWR)
        try:
            with pytest.raises(LaunchFailed, match="/nix/store/planted"):
                await bench.builder.enter(request, build_id, Streams(null, null, null))
        finally:
            os.close(null)
        assert list(reachable.iterdir()) == []

    async def test_none_is_told_of_an_output_that_is_refused(self, bench: Bench) -> None:
        failure = (await bench.run("mkfifo o", outputs=("build/o",))).failure
        assert failure.reason is Reason.OUTPUT_INVALID
        assert failure.message == "output build/o is a fifo"
        assert failure.detail == PathDetail("build/o")


class TestRequests:
    async def test_a_working_directory_that_an_input_lacks_is_the_requests_own_fault(self, bench: Bench) -> None:
        (made,) = (await bench.run("mkdir o", outputs=("build/o",))).outputs
        outcome = await bench.run("true", inputs=((b"a", made.node),), working_dir="inputs/a/none")
        assert outcome.failure.reason is Reason.COMMAND_FAILED
        assert "working directory /inputs/a/none: No such file" in outcome.failure.message


class TestLimits:
    async def test_memory_that_belongs_to_no_process_is_told_as_memory(self, make_bench: MakeBench) -> None:
        bench = await make_bench(Policy(memory_bytes=64 * MIB, keep_on_failure_s=0))
        if "memory" not in bench.host.hierarchies.enforced:
            return  # Nothing bounds it there, and `Capabilities` says so.
        # In its need the kernel ends one process after another, the runtime among them.
        failure = (await bench.run("dd if=/dev/zero of=/dev/shm/x bs=1M count=200 || exit 1")).failure
        assert failure.reason is Reason.RESOURCES_EXHAUSTED
        assert isinstance(failure.detail, LimitDetail)
        assert failure.detail.what == "memory"

    async def test_files_without_a_name_count_as_disk(self, make_bench: MakeBench) -> None:
        bench = await make_bench(Policy(memory_bytes=GIB, keep_on_failure_s=0, disk_bytes=16 * MIB))
        if not bench.host.hierarchies.enforced:
            return  # Only a control group tells whose they are.
        script = "for n in 3 4; do eval exec $n'>f'; rm f; dd if=/dev/zero bs=1M count=12 >&$n; done; sleep 100"
        failure = (await bench.run(script)).failure
        assert isinstance(failure.detail, LimitDetail)
        assert failure.detail.what == "disk"

    async def test_one_who_is_quick_does_not_get_past_the_disk_limit(self, make_bench: MakeBench) -> None:
        bench = await make_bench(Policy(memory_bytes=GIB, keep_on_failure_s=0, disk_bytes=16 * MIB))
        failure = (await bench.run("for n in 1 2; do dd if=/dev/zero of=f$n bs=1M count=12; done")).failure
        assert isinstance(failure.detail, LimitDetail)
        assert failure.detail.what == "disk"

    async def test_limits_of_processes_are_the_same_whatever_kilns_own_are(self, bench: Bench) -> None:
        before = resource.getrlimit(resource.RLIMIT_MSGQUEUE)
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (4096, before[1]))
        try:
            outcome = await bench.run("grep msgqueue /proc/self/limits")
        finally:
            resource.setrlimit(resource.RLIMIT_MSGQUEUE, before)
        assert outcome.log.split()[3:5] == ["819200", "819200"]

    async def test_an_end_of_the_log_that_others_hold_holds_up_nothing(self, bench: Bench) -> None:
        request = bench.request("stat -L -c %i /proc/self/fd/1; sleep 1; echo last")
        accomplice = -1
        log = b""
        async with asyncio.timeout(30), bench.builder.build(request, BuildOptions()) as events:
            async for event in events:
                if isinstance(event, Log):
                    log += event.data
                    if accomplice < 0:
                        accomplice = _writer_of_pipe(int(event.data))
        os.close(accomplice)
        assert log.endswith(b"last\n")


def _writer_of_pipe(inode: int) -> int:
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        if os.path.exists(path) and os.stat(path).st_ino == inode:
            return os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    raise AssertionError(inode)


class TestRuntimes:
    async def test_one_that_hangs_is_ended_at_the_wall_limit(self, make_bench: MakeBench, reachable: Path) -> None:
        bench = await make_bench(program=runtime(reachable / "bwrap", "exec sleep 1000"))
        outcome = await bench.run("true", BuildOptions(wall_s=0.3))
        assert outcome.failure.reason is Reason.TIMED_OUT

    async def test_one_that_ends_before_what_it_started_takes_no_launcher_with_it(
        self, make_bench: MakeBench, reachable: Path
    ) -> None:
        # The launcher learns in one go that the runtime is gone, and that nobody waits in the pause any more.
        bench = await make_bench(program=runtime(reachable / "bwrap", "sleep 1.2 & sleep 0.6; exit 1"))
        running = asyncio.ensure_future(bench.run("true"))
        while (launcher := bench.launcher.process_id) is None:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.3)
        os.kill(launcher, signal.SIGSTOP)
        await asyncio.sleep(1.5)
        os.kill(launcher, signal.SIGCONT)
        assert "ended with status 1" in (await running).failure.message
        await bench.run("true")
        assert bench.launcher.process_id == launcher

    async def test_one_that_ends_at_once_leaves_no_child(self, bench: Bench, tmp_path: Path) -> None:
        # In no control group, which would end it as well. So does a bwrap that is killed while it starts.
        made = tmp_path / "made"
        program = runtime(tmp_path / "runtime", f"sleep 1000 & echo $! > {made}; exit 1")
        null = os.open(os.devnull, os.O_RDWR)
        order = Order(
            [program], os.getuid(), os.getgid(), status_descriptor=3, descriptors=dict.fromkeys(range(3), null),
            gate_descriptor=4, gate_contents="-", gate_rest="-", pause_descriptor=5, pause_contents="-",
        )  # fmt: skip
        launch = bench.launcher.launch(order)
        os.close(null)
        await launch.ended
        with pytest.raises(ProcessLookupError):
            os.kill(int(made.read_text()), 0)

    async def test_one_that_cannot_be_executed_says_why_whatever_descriptors_there_are(self, bench: Bench) -> None:
        for _ in range(4):  # Made while another runs, the next process has other descriptors.
            await bench.run("sleep 0.1")
            failure = (await bench.run("true " + "x" * 200_000)).failure
            assert "Argument list too long" in failure.message


class TestLaunchers:
    async def test_one_that_hangs_is_ended_and_replaced(self, bench: Bench) -> None:
        bench.launcher.patience_s = 0.5
        running = asyncio.ensure_future(bench.run("sleep 1000", BuildOptions(wall_s=1)))
        while (launcher := bench.launcher.process_id) is None:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        os.kill(launcher, signal.SIGSTOP)
        async with asyncio.timeout(30):
            failure = (await running).failure
        assert failure.reason is Reason.INFRASTRUCTURE
        assert (await bench.run("echo again")).log == "again\n"
        assert bench.launcher.process_id != launcher
