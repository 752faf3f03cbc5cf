"""What a host promises of its builds, on a small builder; `test_recovery.py` and `test_hosted.py` have the real one."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from kiln.aio import Emit
from kiln.build.events import (
    Accepted,
    Assigned,
    AttemptEnded,
    BuilderInfo,
    BuildEvent,
    Cancelling,
    Event,
    Failure,
    Finished,
    Heartbeat,
    Log,
    Notice,
    Phase,
    PhaseKind,
    Progress,
    Reason,
    Retry,
    Sample,
    Success,
    Usage,
)
from kiln.build.model import BuildOptions, BuildRequest
from kiln.build.service import BuildService, Capabilities
from kiln.builders.cached import Keys
from kiln.builders.errors import BeyondHead, BuildAmbiguous, BuildNotFound, HostClosing, PageInvalid, RunsElsewhere
from kiln.builders.host import Host
from kiln.castore.local.store import LocalStore
from kiln.castore.model import Digest, Directory, FileNode

OPTIONS = BuildOptions()
Hosting = Callable[..., Host]
Requests = Callable[..., BuildRequest]
Scripted = Callable[..., Any]


async def watched(host: Host, build_id: str, **how: Any) -> list[Event]:
    async with host.watch(build_id, **how) as events:
        return [event async for event in events]


async def log_of(host: Host, build_id: str, **how: Any) -> bytes:
    return b"".join([data async for _, data in host.read_log(build_id, **how)])


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def verdict(event: Event) -> Success | Failure:
    assert isinstance(event.body, Finished)
    return event.body.verdict


def blocked(until_set: asyncio.Event) -> Any:
    async def script(_request: BuildRequest, _options: BuildOptions, emit: Emit[BuildEvent]) -> None:
        await emit(Assigned(BuilderInfo(worker="scripted")))
        await emit(Log(b"begun\n", 0))
        await until_set.wait()
        await emit(Log(b"done\n", 6))
        await emit(Finished(Success((), cacheable=True)))

    return script


@pytest.fixture
def gate() -> asyncio.Event:
    return asyncio.Event()


async def test_accepted_comes_first_finished_last_and_numbers_have_no_gaps(
    hosting: Hosting, scripted: Scripted, a_request: Requests, keys: Keys
) -> None:
    async with hosting(scripted()) as host:
        build_id = await host.submit(a_request(), OPTIONS)
        events = await watched(host, build_id)
    assert [type(event.body) for event in events] == [Accepted, Assigned, Log, Finished]
    assert [event.seq for event in events] == [1, 2, 3, 4]
    assert {event.build_id for event in events} == {build_id}
    accepted = events[0].body
    assert isinstance(accepted, Accepted)
    assert accepted.cache_key == keys.key(a_request())
    assert accepted.effective is not None
    assert accepted.effective.wall_s == 60.0, "the service's maximum holds where nobody asked"


async def test_an_ended_build_can_be_watched_and_read_again_also_by_another_host(
    hosting: Hosting, scripted: Scripted, a_request: Requests
) -> None:
    async with hosting(scripted()) as host:
        build_id = await host.submit(a_request(), OPTIONS)
        live = await watched(host, build_id)
        assert await watched(host, build_id) == live
    async with hosting(scripted()) as other:
        assert await watched(other, build_id) == live
        assert await watched(other, build_id, after_seq=2) == live[2:]
        assert await watched(other, build_id, after_seq=4) == []
        assert await watched(other, build_id, without_log=True) == [live[0], live[1], live[3]]
        assert await log_of(other, build_id) == b"hello\n"


async def test_each_follower_gets_all_events_however_slow_it_is(
    hosting: Hosting, scripted: Scripted, a_request: Requests
) -> None:
    lines = [b"%d\n" % number for number in range(500)]

    async def talk(_request: BuildRequest, _options: BuildOptions, emit: Emit[BuildEvent]) -> None:
        for line in lines:
            await emit(Log(line, 0))
        await emit(Finished(Success(())))

    async def slow(host: Host, build_id: str) -> list[Event]:
        found = []
        async with host.watch(build_id) as events:
            async for event in events:
                found.append(event)
                if event.seq % 100 == 0:
                    await asyncio.sleep(0.01)
        return found

    async with hosting(scripted(talk)) as host:
        build_id = await host.submit(a_request(), OPTIONS)
        quick, *others = await asyncio.gather(watched(host, build_id), *(slow(host, build_id) for _ in range(20)))
        assert [event.seq for event in quick] == list(range(1, 503))
        assert all(other == quick for other in others)
        data = [event.body.data for event in quick if isinstance(event.body, Log)]
        assert data == lines
        offsets = [event.body.offset for event in quick if isinstance(event.body, Log)]
        assert offsets == [len(b"".join(lines[:i])) for i in range(500)]


async def test_a_build_goes_on_without_followers(
    hosting: Hosting, scripted: Scripted, a_request: Requests, gate: asyncio.Event
) -> None:
    async with hosting(scripted(blocked(gate))) as host:
        build_id = await host.submit(a_request(), OPTIONS)
        async with host.watch(build_id) as events:
            assert isinstance((await anext(events)).body, Accepted)
        gate.set()
        assert isinstance(verdict((await watched(host, build_id))[-1]), Success)


async def test_it_is_cancelled_with_its_last_follower_where_that_was_asked_for(
    hosting: Hosting, scripted: Scripted, a_request: Requests, gate: asyncio.Event
) -> None:
    builder = scripted(blocked(gate))
    async with hosting(builder) as host:
        build_id = await host.submit(a_request(), BuildOptions(cancel_on_disconnect=True))
        async with host.watch(build_id) as stays:
            assert isinstance((await anext(stays)).body, Accepted)
            async with host.watch(build_id) as leaves:
                assert isinstance((await anext(leaves)).body, Accepted)
            await asyncio.sleep(0.05)
            assert builder.running == 1, "one follower is left"
        failure = verdict((await watched(host, build_id))[-1])
        assert isinstance(failure, Failure)
        assert failure.reason is Reason.CANCELLED
        assert builder.running == 0


async def test_who_comes_back_within_the_grace_finds_the_build_running(
    hosting: Hosting, scripted: Scripted, a_request: Requests, gate: asyncio.Event
) -> None:
    async with hosting(scripted(blocked(gate))) as host:
        options = BuildOptions(cancel_on_disconnect=True, disconnect_grace_s=0.1)
        build_id = await host.submit(a_request(), options)
        async with host.watch(build_id) as events:
            assert isinstance((await anext(events)).body, Accepted)
        async with host.watch(build_id) as events:
            await asyncio.sleep(0.2)
            gate.set()
            *_, last = [event async for event in events]
        assert isinstance(verdict(last), Success)


async def test_cancel_returns_when_nothing_runs_and_says_by_whom(
    hosting: Hosting, scripted: Scripted, a_request: Requests, gate: asyncio.Event
) -> None:
    builder = scripted(blocked(gate))
    async with hosting(builder) as host:
        build_id = await host.submit(a_request(), OPTIONS)
        await until(lambda: builder.running == 1)
        info = await host.cancel(build_id, by="ann", why="lunch")
        assert builder.running == 0
        assert info.last is not None
        failure = verdict(info.last)
        assert isinstance(failure, Failure)
        assert (failure.reason, failure.message) == (Reason.CANCELLED, "cancelled by ann: lunch")
        events = await watched(host, build_id)
        assert [type(e.body) for e in events[-2:]] == [Cancelling, Finished]
        assert await host.cancel(build_id, by="bob") == info, "an ended build stays as it is"


async def test_cancel_right_after_submit_runs_nothing(
    hosting: Hosting, scripted: Scripted, a_request: Requests
) -> None:
    builder = scripted()
    async with hosting(builder) as host:
        build_id = await host.submit(a_request(), OPTIONS)
        info = await host.cancel(build_id, by="ann")
        assert builder.started == 0
        assert info.last is not None
        assert isinstance(info.last.body, Finished)


async def broken_by_a_bug(_request: BuildRequest, _options: BuildOptions, emit: Emit[BuildEvent]) -> None:
    await emit(Log(b"so far\n", 0))
    raise ZeroDivisionError("oh")


async def broken_by_the_disk(_request: BuildRequest, _options: BuildOptions, _emit: Emit[BuildEvent]) -> None:
    raise OSError(28, "No space left on device")


async def without_verdict(_request: BuildRequest, _options: BuildOptions, emit: Emit[BuildEvent]) -> None:
    await emit(Phase(PhaseKind.STAGE))


@pytest.mark.parametrize("script", [broken_by_a_bug, broken_by_the_disk, without_verdict])
async def test_a_builder_that_breaks_ends_the_build_as_infrastructure(
    hosting: Hosting, scripted: Scripted, a_request: Requests, script: Any
) -> None:
    async with hosting(scripted(script)) as host:
        events = await watched(host, await host.submit(a_request(), OPTIONS))
        assert [type(event.body) for event in events].count(Finished) == 1
        failure = verdict(events[-1])
        assert isinstance(failure, Failure)
        assert (failure.reason, failure.retry) == (Reason.INFRASTRUCTURE, Retry.ELSEWHERE)
        if script is broken_by_a_bug:
            assert failure.log_tail == b"so far\n"


async def test_a_host_that_closes_drains_or_cancels(
    hosting: Hosting, scripted: Scripted, a_request: Requests, gate: asyncio.Event, store: LocalStore
) -> None:
    async with hosting(scripted(blocked(gate))) as host:
        drained = await host.submit(a_request(), OPTIONS)
        closing = asyncio.create_task(host.close(cancel=False))
        await asyncio.sleep(0.02)
        with pytest.raises(HostClosing):
            await host.submit(a_request(), OPTIONS)
        assert not closing.done()
        gate.set()
        await closing
        assert isinstance(verdict((await watched(host, drained))[-1]), Success)
    gate.clear()
    async with hosting(scripted(blocked(gate))) as host:
        cancelled = await host.submit(a_request(), OPTIONS)
    async with hosting(scripted()) as host:
        failure = verdict((await watched(host, cancelled))[-1])
    assert isinstance(failure, Failure)
    assert failure.reason is Reason.CANCELLED
    assert os.listdir(store.builds_dir) == []


async def test_a_host_torn_down_by_an_exception_still_ends_its_builds(
    hosting: Hosting, scripted: Scripted, a_request: Requests, gate: asyncio.Event, store: LocalStore
) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async with hosting(scripted(blocked(gate))) as host:
            build_id = await host.submit(a_request(), OPTIONS)
            await asyncio.sleep(0.02)
            raise ZeroDivisionError
    row = store.builds.get(build_id)
    assert row is not None
    assert row.ended is not None


async def test_any_range_of_the_log_can_be_read_while_it_grows_and_after(
    hosting: Hosting, scripted: Scripted, a_request: Requests, gate: asyncio.Event
) -> None:
    async with hosting(scripted(blocked(gate))) as host:
        build_id = await host.submit(a_request(), OPTIONS)
        async with host.watch(build_id) as events:
            async for event in events:
                if isinstance(event.body, Log):
                    break
            assert await log_of(host, build_id) == b"begun\n"
            following = asyncio.create_task(log_of(host, build_id, offset=2, follow=True))
            await asyncio.sleep(0.02)
            assert not following.done()
            gate.set()
            assert await following == b"gun\ndone\n"
            await watched(host, build_id)
        assert await log_of(host, build_id, offset=-5) == b"done\n"
        assert await log_of(host, build_id, offset=-500) == b"begun\ndone\n"
        assert await log_of(host, build_id, offset=1, limit=3) == b"egu"
        assert await log_of(host, build_id, offset=11) == b""
        assert [offset async for offset, _ in host.read_log(build_id, offset=4)] == [4]
        with pytest.raises(BeyondHead):
            await log_of(host, build_id, offset=12)


async def test_a_large_log_becomes_a_blob_and_a_slow_follower_reads_it_from_there(
    hosting: Hosting, scripted: Scripted, a_request: Requests, store: LocalStore
) -> None:
    chunk = bytes(range(256)) * 256

    async def talk(_request: BuildRequest, _options: BuildOptions, emit: Emit[BuildEvent]) -> None:
        for _ in range(40):
            await emit(Log(chunk, 0))
        await emit(Finished(Success(())))

    async with hosting(scripted(talk)) as host:
        build_id = await host.submit(a_request(), OPTIONS)
        async with host.watch(build_id) as events:
            assert isinstance((await anext(events)).body, Accepted)
            await watched(host, build_id)
            rest = [event async for event in events]
    data = b"".join(event.body.data for event in rest if isinstance(event.body, Log))
    assert data == chunk * 40
    finished = rest[-1].body
    assert isinstance(finished, Finished)
    assert finished.log == FileNode(store.scheme.digest_of(data), len(data))
    assert await store.blobs.has(finished.log.digest)
    assert os.listdir(store.builds_dir) == []
    assert await store.fsck() == []


async def test_a_log_that_is_gone_from_the_store_is_a_gap_that_is_told(
    hosting: Hosting, scripted: Scripted, a_request: Requests, store: LocalStore
) -> None:
    async with hosting(scripted()) as host:
        build_id = await host.submit(a_request(), OPTIONS)
        await watched(host, build_id)
        digest = store.scheme.digest_of(b"hello\n").raw.hex()
        os.unlink(f"{store.path}/blobs/{digest[:2]}/{digest[2:]}")
        events = await watched(host, build_id)
        assert [event.seq for event in events] == [1, 2, 3, 4]
        notice = events[2].body
        assert isinstance(notice, Notice)
        assert notice.kind == "LOG_TRUNCATED"


async def test_passing_events_are_conflated_and_never_replayed(
    hosting: Hosting, scripted: Scripted, a_request: Requests, gate: asyncio.Event
) -> None:
    async def busy(_request: BuildRequest, _options: BuildOptions, emit: Emit[BuildEvent]) -> None:
        for number in range(100):
            await emit(Progress(PhaseKind.STAGE, done=number))
        await emit(Sample(Usage(memory=7)))
        await gate.wait()
        await emit(Finished(Success(())))

    builder = scripted(busy)
    async with hosting(builder) as host:
        build_id = await host.submit(a_request(), OPTIONS)
        await asyncio.sleep(0.05)
        async with host.watch(build_id) as events:
            seen = [(await anext(events)) for _ in range(3)]
        assert [event.body for event in seen[1:]] == [Progress(PhaseKind.STAGE, done=99), Sample(Usage(memory=7))]
        assert [event.seq for event in seen] == [1, 0, 0]
        recorded = asyncio.create_task(watched(host, build_id, recorded_only=True))
        gate.set()
        assert [event.seq for event in await recorded] == [1, 2]
        assert [event.seq for event in await watched(host, build_id)] == [1, 2]


async def test_a_silent_build_has_a_heartbeat_with_the_head(
    hosting: Hosting, scripted: Scripted, a_request: Requests, gate: asyncio.Event
) -> None:
    async with hosting(scripted(blocked(gate)), heartbeat_s=0.02) as host:
        build_id = await host.submit(a_request(), OPTIONS)
        async with host.watch(build_id) as events:
            async for event in events:
                if isinstance(event.body, Heartbeat) and event.body.head_seq == 3:
                    assert event.seq == 0
                    assert event.body.log_size == 6
                    break


async def test_attempts_are_counted_and_phases_timed(hosting: Hosting, scripted: Scripted, a_request: Requests) -> None:
    async def twice(_request: BuildRequest, _options: BuildOptions, emit: Emit[BuildEvent]) -> None:
        await emit(Phase(PhaseKind.STAGE))
        await emit(AttemptEnded(Failure(Reason.INFRASTRUCTURE, "lost", Retry.ELSEWHERE)))
        await emit(Phase(PhaseKind.RUN))
        await emit(Finished(Success(())))

    async with hosting(scripted(twice)) as host:
        events = await watched(host, await host.submit(a_request(), OPTIONS))
    assert [event.attempt for event in events] == [1, 1, 1, 2, 2]
    finished = events[-1].body
    assert isinstance(finished, Finished)
    assert [span.kind for span in finished.spans] == [PhaseKind.STAGE, PhaseKind.RUN]
    assert finished.spans[0].to_us == finished.spans[1].from_us
    assert finished.spans[1].to_us <= events[-1].elapsed_us


async def test_positions_beyond_the_head_and_unknown_ids_are_refused(
    hosting: Hosting, scripted: Scripted, a_request: Requests
) -> None:
    async with hosting(scripted()) as host:
        build_id = await host.submit(a_request(), OPTIONS)
        await watched(host, build_id)
        with pytest.raises(BeyondHead) as beyond:
            await watched(host, build_id, after_seq=5)
        assert beyond.value.head == 4
        for wrong in ("", "nosuchbuild"):
            with pytest.raises(BuildNotFound):
                await watched(host, wrong)
            with pytest.raises(BuildNotFound):
                await host.get(wrong)
        other = await host.submit(a_request("b"), OPTIONS)
        await watched(host, other)
        assert (await host.get(build_id[:-1])).build_id in {build_id, other}
        with pytest.raises(BuildAmbiguous):
            await host.get(build_id[:1])  # Of the time, and both are of this century.


async def test_the_same_token_and_request_are_the_same_build(
    hosting: Hosting, scripted: Scripted, a_request: Requests
) -> None:
    builder = scripted()
    async with hosting(builder) as host:
        first = await host.submit(a_request(), OPTIONS, client_token="t")
        assert await host.submit(a_request(), OPTIONS, client_token="t") == first
        assert await host.submit(a_request("x"), OPTIONS, client_token="t") != first
        assert await host.submit(a_request(), OPTIONS) != first
        await watched(host, first)
        assert await host.submit(a_request(), OPTIONS, client_token="t") == first, "also once it ended"


async def test_list_is_newest_first_paged_and_filtered(
    hosting: Hosting, scripted: Scripted, a_request: Requests, gate: asyncio.Event
) -> None:
    async with hosting(scripted(blocked(gate))) as host:
        running = [await host.submit(a_request(), BuildOptions(labels={"n": str(n % 2)})) for n in range(7)]
        seen: list[str] = []
        page = ""
        while True:
            infos, page = await host.list(limit=3, page=page)
            seen += [info.build_id for info in infos]
            if not page:
                break
        assert seen == running[::-1]
        odd, _ = await host.list(labels={"n": "1"})
        assert {info.build_id for info in odd} == {running[1], running[3], running[5]}
        assert len((await host.list(running_only=True))[0]) == 7
        first, page = await host.list(running_only=True, limit=4)
        rest, last = await host.list(running_only=True, limit=4, page=page)
        assert (len(first), len(rest), last) == (4, 3, "")
        gate.set()
        await watched(host, running[0])
        info = await host.get(running[0], with_request=True)
        assert info.request == a_request()
        assert (info.labels, info.first_seq, info.head_seq) == ({"n": "0"}, 1, 5)
        with pytest.raises(PageInvalid):
            await host.list(page="elsewhere")


async def test_find_missing_names_what_is_lacking_also_below(
    hosting: Hosting, scripted: Scripted, store: LocalStore
) -> None:
    absent, there = Digest(bytes(32)), (await store.add_blob(b"x")).digest
    async with hosting(scripted()) as host:
        assert await host.find_missing(blobs=[absent, there], directories=[absent]) == (
            frozenset({absent}),
            frozenset({absent}),
        )
        directory = Directory(((b"a", FileNode(absent, 1)), (b"b", FileNode(there, 1))))
        root = await store.directories.put([directory])
        assert await host.find_missing(blobs=[], directories=[root]) == (frozenset(), frozenset())
        assert await host.find_missing(blobs=[], directories=[root], closure=True) == (
            frozenset({absent}),
            frozenset(),
        )


async def test_another_process_can_follow_but_not_cancel(
    store: LocalStore, keys: Keys, scripted: Scripted, a_request: Requests, gate: asyncio.Event
) -> None:
    beside = LocalStore.open(store.path)
    try:
        async with Host(scripted(blocked(gate)), store, keys) as host, Host(scripted(), beside, keys) as other:
            build_id = await host.submit(a_request(), OPTIONS)
            log = asyncio.create_task(log_of(other, build_id, follow=True))
            events = asyncio.create_task(watched(other, build_id))
            with pytest.raises(RunsElsewhere):
                await other.cancel(build_id, by="ann")
            await asyncio.sleep(0.1)
            assert [info.build_id for info in (await other.list(running_only=True))[0]] == [build_id]
            gate.set()
            assert await events == await watched(host, build_id)
            assert await log == b"begun\ndone\n"
    finally:
        beside.close()


async def test_a_full_disk_ends_the_build_and_followers_still_hear_of_it(
    hosting: Hosting, scripted: Scripted, a_request: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = scripted()
    async with hosting(builder) as host:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        build_id = await host.submit(a_request(), OPTIONS)
        monkeypatch.setattr("kiln.builders.recording.write_all", full)
        events = await watched(host, build_id)
        monkeypatch.undo()
        failure = verdict(events[-1])
        assert isinstance(failure, Failure)
        assert failure.reason is Reason.INFRASTRUCTURE
        assert "No space left" in failure.message
        assert builder.running == 0
        info = await host.get(build_id)
        assert info.last == events[-1]


async def test_half_a_record_on_a_full_disk_hides_nothing_that_follows(
    hosting: Hosting, scripted: Scripted, a_request: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosting(scripted()) as host:

        def full(descriptor: int, data: bytes) -> None:
            monkeypatch.undo()
            os.write(descriptor, data[: len(data) // 2])
            raise OSError(28, "No space left on device")

        build_id = await host.submit(a_request(), OPTIONS)
        monkeypatch.setattr("kiln.builders.recording.write_all", full)
        events = await watched(host, build_id)
        assert [type(event.body) for event in events] == [Accepted, Finished]
        assert await watched(host, build_id) == events, "from the archive"


async def test_builds_that_wait_hold_no_descriptor_each(
    hosting: Hosting, a_request: Requests, gate: asyncio.Event
) -> None:
    async with hosting(BlockedBuilder(gate)) as host:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(1000):
            await host.submit(a_request(), OPTIONS)
        assert len(os.listdir("/proc/self/fd")) - before < 10
        gate.set()
        await host.close(cancel=False)


class BlockedBuilder(BuildService):
    """Says nothing until the gate opens, without a task a build."""

    def __init__(self, gate: asyncio.Event) -> None:
        self._gate = gate

    async def capabilities(self) -> Capabilities:
        return Capabilities()

    @contextlib.asynccontextmanager
    async def build(self, _request: BuildRequest, _options: BuildOptions) -> AsyncIterator[AsyncIterator[BuildEvent]]:
        async def events() -> AsyncIterator[BuildEvent]:
            await self._gate.wait()
            yield Finished(Success(()))

        yield events()
