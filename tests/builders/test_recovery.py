"""What is left of a kiln process that was killed, and that the next one finds nothing of it. Builds are real ones."""

import asyncio
import dataclasses
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kiln.aio import Emit
from kiln.build.events import Accepted, BuildEvent, Event, Failure, Finished, Log, Reason, Retry, Success
from kiln.build.model import BuildOptions, BuildRequest, Constraints
from kiln.builders.host import Host
from kiln.builders.kept import KeptFailures, kept_failures, kept_until
from kiln.builders.recovery import Recovered, recover
from kiln.castore.local.database import BuildRow
from kiln.castore.local.store import LocalStore
from kiln.protos.kiln.build.v1 import build_pb2
from kiln.protos.snix.build.protos import build_pb2 as snix_pb2
from kiln.sandbox import cgroups
from kiln.sandbox.cgroups import groups_of_store
from kiln.sandbox.claims import Claims, is_held, release
from kiln.sandbox.mounts import bind
from kiln.server.compose import composed, id_of
from kiln.server.config import BuilderConfig

GIB = 1 << 30
SYSTEM = f"{platform.machine()}-linux"
MARK = "kiln-recovery-test-sleeper"
KILLED = f"""
import asyncio, sys
from kiln.build.model import BuildOptions, BuildRequest, Constraints
from kiln.castore.local.store import LocalStore
from kiln.server.compose import composed
from kiln.server.config import BuilderConfig

async def main():
    store = LocalStore.open(sys.argv[1])
    async with composed(BuilderConfig(), store) as composition:
        host = composition.host
        def request(number):
            script = f"echo begun; sleep {{1000 + number}}" if number else "echo over; exit 3"
            return BuildRequest(
                command=("/bin/sh", "-c", script), working_dir="build",
                scratch_paths=("build",), outputs=("build/out",), environment=(("MARK", b"{MARK}"),),
                constraints=Constraints(system="{SYSTEM}", provide_bin_sh=True),
            )
        failed = await host.submit(request(0), BuildOptions())
        async with host.watch(failed) as events:
            async for _ in events:
                pass
        running = [await host.submit(request(number), BuildOptions()) for number in range(1, 6)]
        async for _ in host.read_log(running[0], follow=True):
            break
        print(failed, *running, flush=True)
        await asyncio.sleep(1000)

asyncio.run(main())
"""


def sleepers() -> list[int]:
    """Processes of the builds in `KILLED`, known by their environment."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and name != str(os.getpid()):
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    if f"MARK={MARK}".encode() in file.read().split(b"\0"):
                        found.append(int(name))
            except OSError:
                pass
    return found


def mounted_below(path: Path) -> bool:
    return str(path) in Path("/proc/self/mountinfo").read_text()


def append(path: str, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)


@pytest.fixture
def killed(tmp_path: Path) -> tuple[Path, list[str]]:
    """A store whose only user was killed amid five builds, after one that failed; the ids, the failed one first."""
    path = tmp_path / "store"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ids = process.stdout.readline().split()
        assert len(ids) == 6, "the builds did not start"
        assert sleepers()
        process.send_signal(signal.SIGKILL)
    return path, ids


async def watched(host: Any, build_id: str) -> list[Event]:
    async with host.watch(build_id) as events:
        return [event async for event in events]


async def test_after_a_kill_nothing_is_left_and_every_build_has_an_end(killed: tuple[Path, list[str]]) -> None:
    path, (failed, *running) = killed
    store = LocalStore.open(str(path))
    try:
        async with composed(BuilderConfig(), store) as composition:
            assert sleepers() == []
            assert groups_of_store(cgroups.detect(), id_of(store)) == []
            assert not mounted_below(path)
            assert os.listdir(store.builds_dir) == [failed], "a kept failure stays"
            assert os.listdir(path / "tmp") == [os.path.basename(store.tmp_dir)]
            for build_id in running:
                events = await watched(composition.host, build_id)
                assert [event.seq for event in events] == list(range(1, len(events) + 1))
                assert isinstance(events[0].body, Accepted)
                assert isinstance(events[-1].body, Finished)
                failure = events[-1].body.verdict
                assert isinstance(failure, Failure)
                assert (failure.reason, failure.retry) == (Reason.INFRASTRUCTURE, Retry.ELSEWHERE)
            log = [data async for _, data in composition.host.read_log(running[0])]
            assert log == [b"begun\n"]
            assert (await composition.host.list(running_only=True))[0] == ()
            assert store.builds.running() == []
        assert await store.fsck() == []
    finally:
        store.close()
    assert os.listdir(path / "tmp") == []


async def test_builds_of_living_processes_are_left_alone(
    store: LocalStore,
    hosting: Callable[..., Host],
    scripted: Callable[..., Any],
    a_request: Callable[..., BuildRequest],
) -> None:
    gate = asyncio.Event()

    async def wait(_request: BuildRequest, _options: BuildOptions, emit: Emit[BuildEvent]) -> None:
        await emit(Log(b"here\n", 0))
        await gate.wait()
        await emit(Finished(Success(())))

    async with hosting(scripted(wait)) as host:
        build_id = await host.submit(a_request(), BuildOptions())
        beside = LocalStore.open(store.path)
        assert await recover(beside, cgroups.Hierarchies(), "test", kept_bytes_max=GIB) == Recovered()
        beside.close()
        gate.set()
        assert isinstance((await watched(host, build_id))[-1].body, Finished)


async def test_a_journal_torn_by_a_crash_is_ended_after_its_last_whole_event(
    store: LocalStore,
    hosting: Callable[..., Host],
    scripted: Callable[..., Any],
    a_request: Callable[..., BuildRequest],
) -> None:
    """The files a crash leaves, made by a host that is stopped in its tracks: its tasks go, nothing ends them."""

    async def wait(_request: BuildRequest, _options: BuildOptions, emit: Emit[BuildEvent]) -> None:
        await emit(Log(b"said\n", 0))
        await asyncio.sleep(1000)

    async with hosting(scripted(wait)) as host:
        build_id = await host.submit(a_request(), BuildOptions())
        async with host.watch(build_id) as events:
            async for event in events:
                if isinstance(event.body, Log):
                    break
        directory = f"{store.builds_dir}/{build_id}"
        aside = f"{store.path}/aside"
        shutil.copytree(directory, aside)
        row = store.builds.get(build_id)
        assert row is not None
    os.unlink(f"{aside}/lock")
    shutil.move(aside, directory)
    store.builds.put(row)
    append(f"{directory}/log", b"unsaid\n")
    append(f"{directory}/journal", b"\x40\x00\x00\x00half of a record")
    recovered = await recover(store, cgroups.Hierarchies(), "test", kept_bytes_max=GIB)
    assert recovered.builds == (build_id,)
    async with hosting(scripted()) as host:
        said = await watched(host, build_id)
        assert [type(event.body) for event in said] == [Accepted, Log, Log, Finished]
        assert [event.body.data for event in said if isinstance(event.body, Log)] == [b"said\n", b"unsaid\n"]
        assert b"".join([data async for _, data in host.read_log(build_id)]) == b"said\nunsaid\n"
        assert isinstance(said[-1].body, Finished)
        assert isinstance(said[-1].body.verdict, Failure)
        assert said[-1].body.verdict.log_tail == b"said\nunsaid\n"
    assert os.listdir(store.builds_dir) == []


async def test_a_build_whose_request_breaks_a_newer_rule_is_ended_too(
    store: LocalStore, hosting: Callable[..., Host], scripted: Callable[..., Any]
) -> None:
    refused = build_pb2.Submission(request=snix_pb2.BuildRequest(command_args=[""]))  # What an older kiln took.
    parts = (refused.SerializeToString(), b"", b"")
    record = b"".join(struct.pack("<I", len(part)) + part for part in parts)
    store.builds.put(BuildRow("0123456789abcdef", 1.0, bytes(32), None, "{}", record))
    recovered = await recover(store, cgroups.Hierarchies(), "test", kept_bytes_max=GIB)
    assert recovered.builds == ("0123456789abcdef",)
    async with hosting(scripted()) as host:
        assert [type(event.body) for event in await watched(host, "0123456789abcdef")] == [Accepted, Finished]


async def test_a_mount_in_an_abandoned_directory_goes_before_its_files(store: LocalStore, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root mounts")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    target = Path(store.builds_dir) / "0123456789abcdef" / "scratch" / "a b\n"
    target.mkdir(parents=True)
    bind(os.fsencode(precious), os.fsencode(target), 0)
    recovered = await recover(store, cgroups.Hierarchies(), "test", kept_bytes_max=GIB)
    assert recovered.mounts == 1
    assert os.listdir(store.builds_dir) == []
    assert (precious / "file").read_text() == "kept"


# Kept failures.


@pytest.fixture
def keep(store: LocalStore) -> Iterator[Callable[..., str]]:
    claims = Claims(store)

    def make(name: str, *, until_s: float, size: int) -> str:
        directory = claims.make(name)
        os.mkdir(f"{directory}/scratch")
        Path(directory, "scratch", "file").write_bytes(os.urandom(size))
        Path(directory, "kept").write_text(f"{until_s:.0f}\n")
        release(directory)
        return directory

    yield make
    claims.close()


def test_kept_failures_go_when_their_time_is_over_and_the_oldest_when_they_are_too_many(
    store: LocalStore, keep: Callable[..., str]
) -> None:
    for number in range(4):
        keep(f"build-{number}", until_s=1000.0 if number == 3 else 2000.0, size=100_000)
    kept = KeptFailures(store, bytes_max=250_000)
    assert kept.prune(500.0) == ["build-0", "build-1"]
    assert kept.prune(500.0) == []
    assert kept.prune(1500.0) == ["build-3"]
    assert [failure.build_id for failure in kept_failures(store)] == ["build-2"]


def test_a_kept_failure_somebody_is_in_stays(store: LocalStore, keep: Callable[..., str]) -> None:
    directory = keep("build-0", until_s=1000.0, size=10)
    holder = Claims(store)
    os.link(os.path.join(holder.make("another"), "lock"), f"{directory}/lock")
    kept = KeptFailures(store, bytes_max=0)
    assert kept.prune(2000.0) == []
    assert is_held(directory)
    holder.close()
    assert not is_held(directory)
    assert kept.prune(2000.0) == ["build-0"]


def test_a_mark_that_a_crash_cut_off_means_over(store: LocalStore, keep: Callable[..., str]) -> None:
    directory = keep("build-0", until_s=1e12, size=10)
    Path(directory, "kept").write_text("")
    assert kept_until(directory) == 0.0
    assert KeptFailures(store, bytes_max=GIB).prune(time.time()) == ["build-0"]


async def test_a_failed_build_is_kept_and_a_cancelled_one_leaves_nothing(store: LocalStore) -> None:
    def request(script: str) -> BuildRequest:
        return BuildRequest(
            command=("/bin/sh", "-c", script),
            working_dir="build",
            scratch_paths=("build",),
            outputs=("build/out",),
            constraints=Constraints(system=SYSTEM, provide_bin_sh=True),
        )

    async with composed(BuilderConfig(), store) as composition:
        host = composition.host
        failed = await host.submit(request("echo left > file; exit 3"), BuildOptions())
        await watched(host, failed)
        unkept = await host.submit(request("exit 4"), BuildOptions(keep_on_failure_s=0.0))
        await watched(host, unkept)
        cancelled = await host.submit(request("echo begun; sleep 1000"), BuildOptions())
        async for _ in host.read_log(cancelled, follow=True):
            break
        info = await host.cancel(cancelled, by="ann")
        while os.listdir(store.builds_dir) != [failed]:  # Nobody waits for a directory to go.
            await asyncio.sleep(0.01)
        assert os.listdir(f"{store.builds_dir}/{failed}/scratch/0") == ["file"]
        assert info.last is not None
        assert isinstance(info.last.body, Finished)
        assert info.last.body.builder is not None, "who had it is known also of a cancelled build"
        made = await watched(host, await host.submit(request("echo a > out"), BuildOptions()))
        again = await watched(host, await host.submit(request("echo a > out"), BuildOptions()))
        assert [type(event.body) for event in again] == [Accepted, Finished]
        assert isinstance(made[-1].body, Finished)
        assert isinstance(again[-1].body, Finished)
        first, second = made[-1].body.verdict, again[-1].body.verdict
        assert isinstance(first, Success)
        assert isinstance(second, Success)
        assert second.cached is not None
        assert second.cached.origin_build_id == made[-1].build_id
        assert dataclasses.replace(second, cached=None) == first


async def test_a_merged_build_outlives_the_one_it_was_merged_into(store: LocalStore) -> None:
    request = BuildRequest(
        command=("/bin/sh", "-c", "echo begun; sleep 0.4; echo made > out"),
        working_dir="build",
        scratch_paths=("build",),
        outputs=("build/out",),
        constraints=Constraints(system=SYSTEM, provide_bin_sh=True),
    )
    async with composed(BuilderConfig(), store) as composition:
        host = composition.host
        leader = await host.submit(request, BuildOptions())
        async for _ in host.read_log(leader, follow=True):
            break
        merged = await host.submit(request, BuildOptions())
        async for _ in host.read_log(merged, follow=True):
            break
        await host.cancel(leader, by="ann")
        await asyncio.sleep(0.05)
        assert is_held(f"{store.builds_dir}/{leader}"), "its scratch is still in use"
        events = await watched(host, merged)
        assert isinstance(events[-1].body, Finished)
        assert isinstance(events[-1].body.verdict, Success)
    assert os.listdir(store.builds_dir) == []
    assert await store.fsck() == []
