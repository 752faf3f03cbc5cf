"""What a build sees and what comes out, each sentence of the contract tried with a real sandbox."""

import asyncio
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from tests.sandbox.real_builder import Bench, MakeBench

from kiln.build.events import (
    Assigned,
    ExitDetail,
    LimitDetail,
    Log,
    MissingDetail,
    OutputReady,
    PathDetail,
    Phase,
    PhaseKind,
    Reason,
    Retry,
    Sample,
    Stream,
    UnmetDetail,
)
from kiln.build.model import BuildOptions, Constraints
from kiln.castore.model import Digest, Directory, DirectoryNode, FileNode, SymlinkNode
from kiln.sandbox.cgroups import groups_of_store
from kiln.sandbox.policy import GIB, MIB, Policy


async def lines(bench: Bench, script: str, **fields: Any) -> list[str]:
    outcome = await bench.run(script, **fields)
    assert outcome.outputs == () or outcome.outputs, outcome.log
    return outcome.log.splitlines()


class TestRoot:
    async def test_only_the_planned_names_are_there(self, bench: Bench) -> None:
        assert await lines(bench, "ls -A / /etc /dev /tmp /build /bin") == [
            "/:", "bin", "build", "dev", "etc", "inputs", "proc", "tmp", "",
            "/bin:", "sh", "",
            "/build:", "",
            "/dev:", "fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty",
            "urandom", "zero", "",
            "/etc:", "group", "hosts", "nsswitch.conf", "passwd", "",
            "/tmp:",
        ]  # fmt: skip

    async def test_nothing_but_scratch_tmp_and_shm_is_writable(self, bench: Bench) -> None:
        script = "for d in / /bin /dev /etc /inputs /proc /build /tmp /dev/shm; do touch $d/x 2>/dev/null && echo $d; done; true"
        assert await lines(bench, script) == ["/build", "/tmp", "/dev/shm"]

    async def test_who_one_is(self, bench: Bench) -> None:
        script = "id -u; id -g; id -G; hostname; cat /proc/sys/kernel/domainname; pwd; umask; grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status"
        assert await lines(bench, script) == [
            "1000", "100", "100", "localhost", "(none)", "/build", "0022",
            "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2",
        ]  # fmt: skip

    async def test_the_host_runs_it_under_a_uid_that_owns_no_store(self, bench: Bench) -> None:
        outcome = await bench.run("cat /proc/self/uid_map; : > out", outputs=("build/out",))
        inside, _, count = outcome.log.split()
        assert (inside, count) == ("1000", "1")
        if os.geteuid() == 0:
            held = {int(name) for name in os.listdir(Path(bench.store.path).parent / "uids")}
            assert held
            assert os.geteuid() not in held

    async def test_three_descriptors_and_no_stdin(self, bench: Bench) -> None:
        assert await lines(bench, "ls /proc/$$/fd; readlink /proc/$$/fd/0; wc -c") == ["0", "1", "2", "/dev/null", "0"]

    async def test_the_environment_is_the_requests_then_pwd_and_home(self, bench: Bench) -> None:
        outcome = await bench.run(
            "", command=("/inputs/busybox", "env"), inputs=((b"busybox", bench.shell),),
            environment=(("A", b"1"), ("B", b"two words\xff"), ("PWD", b"/lie"), ("Z", b"")),
        )  # fmt: skip
        assert outcome.bytes_of(Stream.OUTPUT).splitlines() == [
            b"A=1", b"B=two words\xff", b"PWD=/build", b"Z=", b"HOME=/",
        ]  # fmt: skip

    async def test_no_network_but_loopback(self, bench: Bench) -> None:
        assert await lines(
            bench,
            "ls /sys 2>/dev/null; cat /proc/net/dev | grep -c :; ping -c1 -W1 127.0.0.1 >/dev/null 2>&1; grep -c lo: /proc/net/dev",
        ) == ["1", "1"]

    async def test_no_further_user_namespaces(self, bench: Bench) -> None:
        assert await lines(bench, "unshare -U true 2>/dev/null || echo refused") == ["refused"]

    async def test_addresses_are_not_randomised(self, bench: Bench) -> None:
        one = await lines(bench, "grep -E 'stack|vdso' /proc/self/maps")
        assert one == await lines(bench, "grep -E 'stack|vdso' /proc/self/maps")

    async def test_other_processes_are_not_seen(self, bench: Bench) -> None:
        outcome = await bench.run("ls -d /proc/[0-9]*; cat /proc/1/cmdline | tr '\\0' ' ' | cut -c1-12")
        assert len(outcome.log.split("/proc/")) <= 6

    async def test_setuid_and_attributes_are_refused_by_the_filter(self, bench: Bench) -> None:
        assert await lines(
            bench,
            ": > f; chmod 4755 f 2>/dev/null || echo no; chmod 2755 f 2>/dev/null || echo no; chmod 755 f && echo yes",
        ) == ["no", "no", "yes"]


class TestInputs:
    async def test_files_trees_and_links_are_read_only_with_fixed_modes_and_times(
        self, bench: Bench, tmp_path: Path
    ) -> None:
        tree = tmp_path / "tree"
        (tree / "sub").mkdir(parents=True)
        (tree / "sub/plain").write_text("same")
        (tree / "twin").write_text("same")
        (tree / "tool").write_text("#!/bin/sh\necho ran\n")
        (tree / "tool").chmod(0o755)
        (tree / "dangling").symlink_to("/nowhere/at/all")
        node = await bench.imported(tree)
        script = """
          cd /inputs
          stat -c '%n %a %Y %F' tree tree/sub tree/sub/plain tree/tool tree/dangling link
          readlink link; readlink tree/dangling; tree/tool
          [ tree/twin -ef tree/sub/plain ] && echo one inode
          for f in tree/new tree/sub/plain; do ( : > $f ) 2>/dev/null && echo wrote $f; done
          rm -f tree/twin link 2>/dev/null; chmod 700 tree 2>/dev/null; ls tree
        """
        outcome = await bench.run(script, inputs=((b"link", SymlinkNode(b"tree/sub")), (b"tree", node)))
        assert outcome.log.splitlines() == [
            "tree 555 1 directory", "tree/sub 555 1 directory", "tree/sub/plain 444 1 regular file",
            "tree/tool 555 1 regular file", f"tree/dangling 777 {outcome.log.splitlines()[4].split()[2]} symbolic link",
            f"link 777 {outcome.log.splitlines()[5].split()[2]} symbolic link",
            "tree/sub", "/nowhere/at/all", "ran", "dangling", "sub", "tool", "twin",
        ]  # fmt: skip

    async def test_any_name_will_do(self, bench: Bench, tmp_path: Path) -> None:
        (tmp_path / "f").write_text("x")
        node = await bench.imported(tmp_path / "f")
        names = sorted([b"a b", b"new\nline", b"\xff\xfe", b"-rf", b"x" * 255, b"quote'\"", b"..."])
        outcome = await bench.run('for f in /inputs/*; do cat -- "$f"; done', inputs=tuple((n, node) for n in names))
        assert outcome.log == "x" * 6  # The shell's * leaves out the one that begins with a dot.

    async def test_inputs_at_the_root(self, bench: Bench, tmp_path: Path) -> None:
        (tmp_path / "data").write_text("x")
        node = await bench.imported(tmp_path / "data")
        assert await lines(bench, "cat /data; ls /", inputs_dir="", inputs=((b"data", node),)) == [
            "xbin", "build", "data", "dev", "etc", "proc", "tmp",
        ]  # fmt: skip

    async def test_scratch_over_inputs_dir_takes_new_names_and_keeps_inputs_read_only(
        self, bench: Bench, tmp_path: Path
    ) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in/f").write_text("x")
        node = await bench.imported(tmp_path / "in")
        outcome = await bench.run(
            "cd /nix/store; echo y > new; echo z > a/f; rm -rf a l; mv a b; echo $(ls) > out; cat a/f >> out; true",
            scratch_paths=("build", "nix/store"), inputs_dir="nix/store", outputs=("nix/store/out",),
            inputs=((b"a", node), (b"l", SymlinkNode(b"a"))),
        )  # fmt: skip
        exported = await bench.exported(outcome.outputs[0].node, tmp_path / "out")
        names = "a l new" if os.geteuid() == 0 else "a new"  # Rootless, a link is the build's own.
        assert exported.read_text() == f"{names}\nx"

    async def test_all_that_is_missing_is_named_at_once(self, bench: Bench) -> None:
        one, other, tree = (Digest(bytes([n]) * 32) for n in (1, 2, 3))
        outcome = await bench.run(
            "true", inputs=((b"a", FileNode(one, 1)), (b"b", FileNode(other, 1)), (b"c", DirectoryNode(tree, 0)))
        )
        assert outcome.failure.reason is Reason.MISSING_INPUT
        assert outcome.failure.retry is Retry.AFTER_UPLOAD
        assert outcome.failure.detail == MissingDetail((one, other), (tree,))

    async def test_what_is_missing_deep_inside_is_no_empty_directory(self, bench: Bench) -> None:
        lost = Directory.of([(b"file", FileNode(Digest(bytes(32)), 1))])
        below = DirectoryNode(await bench.store.directories.put([lost]), bench.store.scheme.size_of(lost))
        top = Directory.of([(b"lost", below)])
        node = DirectoryNode(await bench.store.directories.put([top]), bench.store.scheme.size_of(top))
        of_blob = (await bench.run("ls -R /inputs", inputs=((b"top", node),))).failure
        assert of_blob.detail == MissingDetail((Digest(bytes(32)),), ())
        bench.store._database.write("delete from directories where digest = ?", [(below.digest.raw,)])
        of_directory = (await bench.run("ls -R /inputs", inputs=((b"top", node),))).failure
        assert (of_directory.reason, of_directory.detail) == (Reason.MISSING_INPUT, MissingDetail((), (below.digest,)))

    async def test_a_few_directories_that_are_many_on_disk_are_refused(self, bench: Bench) -> None:
        directory = Directory()
        for _ in range(40):  # Each holds the last one twice.
            size = bench.store.scheme.size_of(directory)
            node = DirectoryNode(await bench.store.directories.put([directory]), size)
            directory = Directory.of([(b"a", node), (b"b", node)])
        failure = (await bench.run("ls -R /inputs", inputs=((b"bomb", node),))).failure
        assert (failure.reason, failure.retry) == (Reason.RESOURCES_EXHAUSTED, Retry.NEVER)
        assert failure.detail == LimitDetail("entries", 4_000_000, 2**40 - 2)

    async def test_five_hundred_inputs(self, bench: Bench, tmp_path: Path) -> None:
        inputs = []
        for number in range(500):
            directory = tmp_path / f"i{number}"
            directory.mkdir()
            (directory / "n").write_text(f"{number}\n")
            inputs.append((b"%03d" % number, await bench.imported(directory)))
        outcome = await bench.run(
            "cat /inputs/*/n | sort -n | md5sum; ls /inputs | wc -l; : > /inputs/007/n", inputs=tuple(inputs)
        )
        assert outcome.log.splitlines()[1] == "500"
        assert "Read-only file system" in outcome.log


class TestOutputs:
    async def test_a_scratch_path_that_the_build_closes_is_an_output_all_the_same(self, bench: Bench) -> None:
        outcome = await bench.run("mkdir d && echo x > d/f && chmod 000 d /build", outputs=("build",))
        assert outcome.outputs[0].files == 1

    async def test_files_trees_and_links_come_out_verbatim(self, bench: Bench, tmp_path: Path) -> None:
        script = "mkdir -p d/e; echo hi > d/f; echo x > d/e/tool; chmod 700 d/e/tool; ln -s /etc/shadow d/host; ln -s gone link; printf abc > file"
        outcome = await bench.run(script, outputs=("build/link", "build/file", "build/d"))
        link, file, tree = (output.node for output in outcome.outputs)
        assert link == SymlinkNode(b"gone")
        assert isinstance(file, FileNode)
        assert file.size == 3
        exported = await bench.exported(tree, tmp_path / "d")
        assert os.readlink(exported / "host") == "/etc/shadow"
        assert os.access(exported / "e/tool", os.X_OK)
        assert not os.access(exported / "f", os.X_OK)
        assert [e.index for e in outcome.events if isinstance(e, OutputReady)] == [0, 1, 2]

    async def test_an_output_can_be_the_scratch_itself_and_holds_no_mount_point(
        self, bench: Bench, tmp_path: Path
    ) -> None:
        outcome = await bench.run("echo 1 > a", outputs=("build",))
        assert sorted(os.listdir(await bench.exported(outcome.outputs[0].node, tmp_path / "o"))) == ["a"]
        outcome = await bench.run("echo 1 > /bin/a", scratch_paths=("bin",), working_dir="", outputs=("bin",))
        assert sorted(os.listdir(await bench.exported(outcome.outputs[0].node, tmp_path / "p"))) == ["a"]

    async def test_a_missing_output_names_what_lies_near(self, bench: Bench) -> None:
        outcome = await bench.run("mkdir dir; echo > dir/other", outputs=("build/dir/wanted",))
        assert outcome.failure.reason is Reason.OUTPUT_MISSING
        assert outcome.failure.detail == PathDetail("build/dir/wanted")
        assert outcome.failure.near == ("build/dir/other",)

    async def test_a_parent_swapped_for_a_link_is_never_followed(self, bench: Bench) -> None:
        outcome = await bench.run("ln -s /etc dir", outputs=("build/dir/passwd",))
        assert outcome.failure.reason is Reason.OUTPUT_MISSING
        assert "is no directory" in outcome.failure.message

    async def test_a_fifo_is_refused_by_path(self, bench: Bench) -> None:
        outcome = await bench.run("mkdir out; mkfifo out/x", outputs=("build/out",))
        assert outcome.failure.reason is Reason.OUTPUT_INVALID
        assert outcome.failure.detail == PathDetail("build/out/x")
        assert "fifo" in outcome.failure.message

    async def test_a_socket_is_refused_by_path(self, bench: Bench) -> None:
        # busybox can make none, so it is made in the build's scratch from outside, while the build waits for it.
        task = asyncio.create_task(
            bench.run("mkdir out; while [ ! -S out/x ]; do sleep 0.01; done", outputs=("build/out",))
        )
        while not (found := list(Path(bench.store.builds_dir).glob("*/scratch/*/out"))):
            await asyncio.sleep(0.01)
        short = f"/proc/self/fd/{os.open(found[0], os.O_PATH)}/x"
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(short)
            failure = (await task).failure
        assert failure.reason is Reason.OUTPUT_INVALID
        assert failure.detail == PathDetail("build/out/x")
        assert "socket" in failure.message

    async def test_a_directory_of_mode_000_is_no_obstacle(self, bench: Bench, tmp_path: Path) -> None:
        outcome = await bench.run(
            "mkdir -p out/shut; echo x > out/shut/f; chmod 000 out/shut/f out/shut", outputs=("build/out",)
        )
        exported = await bench.exported(outcome.outputs[0].node, tmp_path / "o")
        assert (exported / "shut/f").read_text() == "x\n"

    async def test_needles_are_found_in_contents_targets_and_names(self, bench: Bench) -> None:
        outcome = await bench.run(
            "mkdir out; echo xx-alpha-xx > out/f; ln -s /s/beta out/l; : > out/gamma.txt",
            outputs=("build/out",), refscan_needles=("absent", "alpha", "beta", "gamma", "a", "alpha"),
        )  # fmt: skip
        assert outcome.outputs[0].needles == (1, 2, 3, 4, 5)

    async def test_an_output_is_an_input_of_the_next_build_without_a_copy(self, bench: Bench) -> None:
        first = await bench.run("mkdir out; echo data > out/f", outputs=("build/out",))
        second = await bench.run("cat /inputs/x/f", inputs=((b"x", first.outputs[0].node),))
        assert second.log == "data\n"

    async def test_the_same_build_twice_gives_the_same_nodes(self, bench: Bench) -> None:
        script = "mkdir out; for i in 1 2 3; do echo $i > out/$i; done; ls -la / > /dev/null; env > out/env"
        one, two = [await bench.run(script, outputs=("build/out",)) for _ in range(2)]
        assert one.outputs == two.outputs


class TestEnds:
    async def test_order_of_events(self, bench: Bench) -> None:
        outcome = await bench.run("echo hi; : > out", outputs=("build/out",))
        kinds = [e.kind if isinstance(e, Phase) else type(e).__name__ for e in outcome.events]
        assert kinds == [
            "Assigned",
            PhaseKind.STAGE,
            PhaseKind.RUN,
            "Log",
            PhaseKind.CAPTURE,
            "OutputReady",
            "Finished",
        ]
        assert isinstance(outcome.events[0], Assigned)
        assert [span.kind for span in outcome.finished.spans] == [PhaseKind.STAGE, PhaseKind.RUN, PhaseKind.CAPTURE]

    @pytest.mark.parametrize(
        ("script", "code", "signal"), [("exit 3", 3, 0), ("kill -TERM $$", 143, 15), ("exit 255", 255, 0)]
    )
    async def test_exit_codes_and_signals(self, bench: Bench, script: str, code: int, signal: int) -> None:
        failure = (await bench.run(f"echo said; {script}")).failure
        assert failure.reason is Reason.COMMAND_FAILED
        assert failure.detail == ExitDetail(code=code, signal=signal)
        assert failure.log_tail == b"said\n"
        assert failure.retry is Retry.NEVER

    async def test_a_command_that_is_not_there(self, bench: Bench) -> None:
        failure = (await bench.run("", command=("/no/such/thing",))).failure
        assert failure.reason is Reason.COMMAND_FAILED
        assert "/no/such/thing" in failure.message
        assert "No such file" in failure.message

    async def test_a_working_directory_that_the_input_lacks_is_said(self, bench: Bench, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        node = await bench.imported(tmp_path / "d")
        failure = (await bench.run("true", working_dir="inputs/d/none", inputs=((b"d", node),))).failure
        assert failure.reason is Reason.INFRASTRUCTURE or "none" in failure.message

    async def test_stderr_and_stdout_keep_their_order_or_are_split(self, bench: Bench) -> None:
        script = "for i in 1 2 3 4 5; do echo o$i; echo e$i >&2; done; echo x > /dev/stderr"
        assert (await bench.run(script)).log.split() == [
            "o1",
            "e1",
            "o2",
            "e2",
            "o3",
            "e3",
            "o4",
            "e4",
            "o5",
            "e5",
            "x",
        ]
        split = await bench.run(script, BuildOptions(split_stderr=True))
        assert split.bytes_of(Stream.OUTPUT).split() == b"o1 o2 o3 o4 o5".split()
        assert split.bytes_of(Stream.STDERR).split() == b"e1 e2 e3 e4 e5 x".split()

    async def test_log_offsets_are_without_gaps(self, bench: Bench) -> None:
        outcome = await bench.run("i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done")
        position = 0
        for event in outcome.events:
            if isinstance(event, Log):
                assert event.offset == position
                position += len(event.data)
        assert position == sum(len(f"line {i}\n") for i in range(20000))

    async def test_wall_limit(self, bench: Bench) -> None:
        began = time.monotonic()
        failure = (await bench.run("trap '' TERM; echo on; sleep 60", BuildOptions(wall_s=0.5))).failure
        assert failure.reason is Reason.TIMED_OUT
        assert isinstance(failure.detail, LimitDetail)
        assert (failure.detail.what, failure.detail.limit) == ("wall", 500)
        assert failure.log_tail == b"on\n"
        assert time.monotonic() - began < 30

    async def test_silence_limit(self, bench: Bench) -> None:
        failure = (await bench.run("echo a; sleep 0.3; echo b; sleep 60", BuildOptions(silence_s=0.8))).failure
        assert failure.detail is not None
        assert (failure.reason, failure.detail.what) == (Reason.TIMED_OUT, "silence")  # type: ignore[union-attr]
        assert failure.log_tail == b"a\nb\n"

    async def test_log_limit_keeps_exactly_as_much(self, bench: Bench) -> None:
        outcome = await bench.run("yes", BuildOptions(log_bytes=100_001))
        assert outcome.failure.reason is Reason.RESOURCES_EXHAUSTED
        assert outcome.failure.detail.what == "log"  # type: ignore[union-attr]
        assert len(outcome.log) == 100_001

    async def test_memory_limit_is_told_from_any_other_kill(self, bench: Bench) -> None:
        outcome = await bench.run("x=a; while :; do x=$x$x; done", BuildOptions(memory_bytes=64 * MIB))
        if "memory" in bench.host.hierarchies.enforced:
            assert outcome.failure.reason is Reason.RESOURCES_EXHAUSTED, outcome.failure
            assert outcome.failure.detail.what == "memory"  # type: ignore[union-attr]
            assert outcome.finished.usage.memory_peak > 32 * MIB
        else:
            assert outcome.failure.reason is Reason.COMMAND_FAILED
        assert (await bench.run("kill -KILL $$")).failure.reason is Reason.COMMAND_FAILED

    async def test_a_fork_bomb_ends_at_the_process_limit(self, bench: Bench) -> None:
        outcome = await bench.run("f() { f | f & f; }; f; wait; exit 1", BuildOptions(processes=64, wall_s=20))
        assert outcome.failure.reason in {Reason.RESOURCES_EXHAUSTED, Reason.COMMAND_FAILED, Reason.TIMED_OUT}
        if "processes" in bench.host.hierarchies.enforced:
            assert outcome.failure.detail.what in {"processes", "wall"}  # type: ignore[union-attr]

    async def test_disk_limit(self, bench: Bench) -> None:
        script = (
            "i=0; while :; do dd if=/dev/zero of=f$i bs=1M count=4 2>/dev/null || exit 1; i=$((i+1)); sleep 0.05; done"
        )
        failure = (await bench.run(script, BuildOptions(disk_bytes=32 * MIB))).failure
        assert failure.reason is Reason.RESOURCES_EXHAUSTED
        assert failure.detail.what == "disk"  # type: ignore[union-attr]

    async def test_one_file_beyond_the_disk_limit(self, bench: Bench) -> None:
        failure = (
            await bench.run("exec dd if=/dev/zero of=f bs=1M count=64", BuildOptions(disk_bytes=8 * MIB))
        ).failure
        assert failure.reason is Reason.RESOURCES_EXHAUSTED
        assert failure.detail.what == "disk"  # type: ignore[union-attr]

    async def test_what_is_left_running_dies_with_the_command(self, bench: Bench) -> None:
        token = f"1{os.getpid()}{time.time_ns() % 10**8}"
        outcome = await bench.run(f"(setsid sleep {token} &) ; sleep {token} & echo started")
        assert outcome.log == "started\n"
        assert not processes_with(token)

    async def test_leaving_the_block_kills_and_removes(self, bench: Bench) -> None:
        token = f"2{os.getpid()}{time.time_ns() % 10**8}"
        request = bench.request(f"echo on; trap '' TERM; sleep {token}")
        async with bench.builder.build(request, BuildOptions()) as events:
            async for event in events:
                if isinstance(event, Log):
                    assert processes_with(token)
                    break
        assert not processes_with(token)
        assert os.listdir(bench.store.builds_dir) == []

    async def test_cancellation_at_any_moment_leaves_nothing(self, bench: Bench) -> None:
        for milliseconds in (0, 2, 5, 8, 12, 20, 40):
            token = f"3{os.getpid()}{time.time_ns() % 10**8}"
            task = asyncio.create_task(bench.run(f"sleep {token}"))
            await asyncio.sleep(milliseconds / 1000)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not processes_with(token)
            assert os.listdir(bench.store.builds_dir) == []
        assert (await bench.run("echo fine")).log == "fine\n"

    async def test_two_at_a_time_do_not_see_each_other(self, bench: Bench) -> None:
        script = "echo $$ > /tmp/mine; sleep 0.3; ls /tmp; ls -d /proc/[0-9]* > list; wc -l < list"
        one, two = await asyncio.gather(bench.run(script), bench.run(script))
        assert one.log == two.log

    async def test_samples_come_when_asked_for(self, bench: Bench) -> None:
        outcome = await bench.run("sleep 0.5", BuildOptions(sample_every_s=0.1))
        assert [e for e in outcome.events if isinstance(e, Sample)]

    async def test_cpu_limit_bounds_the_visible_cpus(self, bench: Bench) -> None:
        assert await lines(bench, "nproc") == [str(len(os.sched_getaffinity(0)))]
        assert (await bench.run("nproc", BuildOptions(cpu_millis=1000))).log == "1\n"

    async def test_a_launcher_that_is_killed_costs_the_builds_it_had_and_no_others(self, bench: Bench) -> None:
        task = asyncio.create_task(bench.run("sleep 60"))
        while not (started := bench.launcher.process_id) or not os.listdir(f"/proc/{started}/task"):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        os.kill(started, 9)
        failure = (await task).failure
        assert failure.reason is Reason.INFRASTRUCTURE
        assert failure.retry is Retry.ELSEWHERE
        assert (await bench.run("echo again")).log == "again\n"


class TestConstraints:
    async def test_a_foreign_system_is_unsatisfiable(self, bench: Bench) -> None:
        failure = (await bench.run("true", constraints=Constraints(system="sparc-none"))).failure
        assert failure.reason is Reason.UNSATISFIABLE
        assert isinstance(failure.detail, UnmetDetail)
        assert failure.detail.refusals[0].constraint == "system"
        assert "x86_64-linux" in failure.message

    async def test_more_memory_than_there_is(self, bench: Bench) -> None:
        constraints = Constraints(system="x86_64-linux", min_memory=1 << 50)
        assert (await bench.run("true", constraints=constraints)).failure.reason is Reason.UNSATISFIABLE

    async def test_network_and_paths_are_denied_by_default(self, bench: Bench) -> None:
        net = Constraints(system="x86_64-linux", network_access=True)
        assert (await bench.run("true", constraints=net)).failure.reason is Reason.DENIED
        path = Constraints(system="x86_64-linux", available_ro_paths=("/etc/hostname",))
        failure = (await bench.run("true", constraints=path)).failure
        assert failure.reason is Reason.DENIED
        assert "--allow-path /etc/hostname" in failure.message

    async def test_allowed_paths_are_visible_and_read_only(self, make_bench: MakeBench, tmp_path: Path) -> None:
        shared = tmp_path / "shared"
        shared.mkdir(mode=0o755)
        (shared / "f").write_text("from the host\n")
        bench = await make_bench(
            Policy(memory_bytes=GIB, allowed_paths=(str(shared), "/dev/fuse"), keep_on_failure_s=0)
        )
        constraints = Constraints(
            system="x86_64-linux", provide_bin_sh=True, available_ro_paths=("/dev/fuse", str(shared))
        )
        outcome = await bench.run(f"cat {shared}/f; touch {shared}/g; ls /dev/fuse", constraints=constraints)
        assert outcome.log.startswith("from the host\n")
        assert "Read-only file system" in outcome.log
        assert "/dev/fuse" in outcome.log
        assert not outcome.finished.verdict.cacheable  # type: ignore[union-attr]

    async def test_with_the_network_it_is_a_private_one(self, make_bench: MakeBench) -> None:
        bench = await make_bench(Policy(memory_bytes=GIB, allow_network=True, keep_on_failure_s=0))
        constraints = Constraints(system="x86_64-linux", provide_bin_sh=True, network_access=True)
        outcome = await bench.run(
            "grep -c : /proc/net/dev; cat /etc/resolv.conf; : > out", constraints=constraints, outputs=("build/out",)
        )
        assert outcome.outputs
        if bench.host.network_helper:
            assert outcome.log.startswith("2\nnameserver ")
        assert not outcome.finished.verdict.cacheable  # type: ignore[union-attr]

    async def test_a_result_of_weaker_isolation_is_not_cacheable(self, make_bench: MakeBench) -> None:
        for weaker, cacheable in (({}, True), ({"limits": "no group"}, True), ({"foreign-binaries": "binfmt"}, False)):
            bench = await make_bench(weaker=weaker)
            outcome = await bench.run(": > out", outputs=("build/out",))
            assert outcome.outputs
            assert outcome.finished.verdict.cacheable is cacheable  # type: ignore[union-attr]
            assert ("foreign-binaries" in outcome.finished.verdict.why_not) is not cacheable  # type: ignore[union-attr]

    async def test_a_32_bit_build_believes_so(self, bench: Bench) -> None:
        if "i686-linux" not in bench.host.systems:
            failure = (await bench.run("true", constraints=Constraints(system="i686-linux"))).failure
            assert failure.reason is Reason.UNSATISFIABLE
            return
        constraints = Constraints(system="i686-linux", provide_bin_sh=True)
        assert await lines(bench, "uname -m", constraints=constraints) == ["i686"]
        assert await lines(bench, "uname -m") == ["x86_64"]


def processes_with(token: str) -> list[str]:
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and token.encode() in (process / "cmdline").read_bytes():
                found.append(process.name)
        except OSError:
            continue
    return found


class TestStart:
    async def test_a_runtime_that_does_not_come_up_is_infrastructure_in_its_own_words(
        self, make_bench: MakeBench, reachable: Path
    ) -> None:
        broken = reachable / "bwrap"
        broken.write_text(
            '#!/bin/sh\n[ "$1" = --version ] && echo bubblewrap 0.8.0 && exit\necho "bwrap: no room" >&2; exit 1\n'
        )
        broken.chmod(0o755)
        bench = await make_bench(program=str(broken))
        failure = (await bench.run("true")).failure
        assert failure.reason is Reason.INFRASTRUCTURE
        assert failure.retry is Retry.ELSEWHERE
        assert "no room" in failure.message

    async def test_a_program_that_cannot_be_executed_is_infrastructure(
        self, make_bench: MakeBench, reachable: Path
    ) -> None:
        vanishing = reachable / "bwrap"
        vanishing.write_text("#!/bin/sh\necho bubblewrap 0.8.0\n")
        vanishing.chmod(0o755)
        bench = await make_bench(program=str(vanishing))
        vanishing.unlink()
        failure = (await bench.run("true")).failure
        assert failure.reason is Reason.INFRASTRUCTURE
        assert "No such file" in failure.message

    async def test_no_control_group_outlives_its_build(self, make_bench: MakeBench) -> None:
        bench = await make_bench()
        task = asyncio.create_task(bench.run("echo on; sleep 60"))
        while not groups_of_store(bench.host.hierarchies, bench.store_id) and bench.host.hierarchies.enforced:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert groups_of_store(bench.host.hierarchies, bench.store_id) == []
