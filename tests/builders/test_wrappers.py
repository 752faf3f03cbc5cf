"""What every wrapper promises, and what each adds."""

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest

from kiln.aio import Emit
from kiln.build.events import (
    Assigned,
    BuilderInfo,
    BuildEvent,
    CacheHit,
    Failure,
    Finished,
    Log,
    Notice,
    Output,
    Phase,
    PhaseKind,
    Progress,
    Queued,
    Reason,
    Stream,
    Success,
    Wait,
)
from kiln.build.model import BuildOptions, BuildRequest, CacheUse
from kiln.build.service import BuildService
from kiln.builders.admission import Admission
from kiln.builders.cached import Cached, Keys
from kiln.builders.deduplicated import Deduplicated
from kiln.builders.dummy import DummyBuilder
from kiln.builders.limited import Limited
from kiln.castore.local.store import LocalStore
from kiln.castore.model import Directory, DirectoryNode, FileNode

USE = BuildOptions(build_id="the-first")
REFRESH = BuildOptions(build_id="refreshing", cache=CacheUse.REFRESH)
BYPASS = BuildOptions(build_id="bypassing", cache=CacheUse.BYPASS)
MEMORY = 100

Requests = Callable[..., BuildRequest]
Scripted = Callable[..., Any]
Wrap = Callable[[BuildService], BuildService]


def limited(inner: BuildService, slots: int = 2) -> Limited:
    return Limited(inner, Admission(slots=slots, memory_bytes=MEMORY), lambda _, options: options.memory_bytes)


@pytest.fixture(params=["bare", "limited", "deduplicated", "cached", "all"])
def wrap(request: pytest.FixtureRequest, store: LocalStore, keys: Keys) -> Wrap:
    wrappers: dict[str, Wrap] = {
        "bare": lambda inner: inner,
        "limited": limited,
        "deduplicated": lambda inner: Deduplicated(inner, spool_dir=store.tmp_dir),
        "cached": lambda inner: Cached(inner, store, keys),
    }
    wrappers["all"] = lambda inner: wrappers["cached"](wrappers["deduplicated"](wrappers["limited"](inner)))
    return wrappers[request.param]


async def built(service: BuildService, request: BuildRequest, options: BuildOptions = USE) -> list[BuildEvent]:
    async with service.build(request, options) as events:
        return [event async for event in events]


def verdict(events: list[BuildEvent]) -> Success | Failure:
    last = events[-1]
    assert isinstance(last, Finished)
    return last.verdict


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


class Gated:
    """A script that waits for its gate."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()

    async def __call__(self, _request: BuildRequest, _options: BuildOptions, emit: Emit[BuildEvent]) -> None:
        await emit(Assigned(BuilderInfo(worker="scripted")))
        await emit(Log(b"begun\n", 0))
        await emit(Progress(PhaseKind.RUN, done=1))
        await self.gate.wait()
        await emit(Phase(PhaseKind.CAPTURE))
        await emit(Log(b"err\n", 6, Stream.STDERR))
        await emit(Finished(Success((), cacheable=True)))


# Every wrapper.


async def test_events_pass_in_order_and_the_verdict_is_last(
    wrap: Wrap, scripted: Scripted, a_request: Requests
) -> None:
    gated = Gated()
    gated.gate.set()
    events = await built(wrap(scripted(gated)), a_request())
    assert [type(event) for event in events if not isinstance(event, Progress)] == [Assigned, Log, Phase, Log, Finished]
    assert [event.data for event in events if isinstance(event, Log)] == [b"begun\n", b"err\n"]
    assert [event.stream for event in events if isinstance(event, Log)] == [Stream.OUTPUT, Stream.STDERR]


async def test_leaving_the_block_early_leaves_nothing_running(
    wrap: Wrap, scripted: Scripted, a_request: Requests
) -> None:
    builder = scripted(Gated())
    async with wrap(builder).build(a_request(), USE) as events:
        assert isinstance(await anext(events), Assigned)
        assert builder.running == 1
    assert builder.running == 0


async def test_leaving_the_block_before_the_first_event_leaves_nothing_running(
    wrap: Wrap, scripted: Scripted, a_request: Requests
) -> None:
    builder = scripted(Gated())
    async with wrap(builder).build(a_request(), USE):
        pass
    assert builder.running == 0


async def test_a_cancelled_caller_leaves_nothing_running(wrap: Wrap, scripted: Scripted, a_request: Requests) -> None:
    builder = scripted(Gated())
    task = asyncio.create_task(built(wrap(builder), a_request()))
    await until(lambda: builder.running == 1)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert builder.running == 0


async def test_an_error_from_below_arrives_above(wrap: Wrap, scripted: Scripted, a_request: Requests) -> None:
    async def broken(_request: BuildRequest, _options: BuildOptions, emit: Emit[BuildEvent]) -> None:
        await emit(Phase(PhaseKind.STAGE))
        raise ZeroDivisionError

    builder = scripted(broken)
    service = wrap(builder)
    for _ in range(3):  # And takes no slot with it.
        with pytest.raises(ZeroDivisionError):
            await built(service, a_request())
    assert builder.running == 0


async def test_capabilities_are_those_of_the_builder(wrap: Wrap, scripted: Scripted) -> None:
    builder = scripted()
    assert await wrap(builder).capabilities() == await builder.capabilities()


# Limited.


async def test_no_more_run_than_there_are_slots_and_who_waits_is_told(scripted: Scripted, a_request: Requests) -> None:
    gated = Gated()
    builder = scripted(gated)
    service = limited(builder)
    builds = [asyncio.create_task(built(service, a_request(str(number)))) for number in range(5)]
    await until(lambda: builder.running == 2)
    await asyncio.sleep(0.05)
    assert builder.running == 2
    gated.gate.set()
    results = await asyncio.gather(*builds)
    assert builder.running_most == 2
    queued = [[event for event in events if isinstance(event, Queued)] for events in results]
    assert [[(q.wait, q.ahead) for q in said] for said in queued] == [
        [],
        [],
        [(Wait.SLOT, 0)],
        [(Wait.SLOT, 1)],
        [(Wait.SLOT, 2)],
    ]


async def test_builds_wait_for_memory(scripted: Scripted, a_request: Requests) -> None:
    gated = Gated()
    builder = scripted(gated)
    service = limited(builder)
    big = BuildOptions(memory_bytes=80)
    builds = [asyncio.create_task(built(service, a_request(str(number)), big)) for number in range(2)]
    await until(lambda: builder.running == 1)
    await asyncio.sleep(0.05)
    gated.gate.set()
    _, second = await asyncio.gather(*builds)
    assert builder.running_most == 1
    assert isinstance(second[0], Queued)
    assert second[0].wait is Wait.MEMORY


async def test_who_gives_up_waiting_frees_the_line(scripted: Scripted, a_request: Requests) -> None:
    gated = Gated()
    builder = scripted(gated)
    service = limited(builder, slots=1)
    running = asyncio.create_task(built(service, a_request("a")))
    await until(lambda: builder.running == 1)
    async with service.build(a_request("b"), USE) as events:
        assert isinstance(await anext(events), Queued)
    gated.gate.set()
    await running
    await built(service, a_request("c"))
    assert builder.started == 2


# Deduplicated.


@pytest.fixture
def share(store: LocalStore) -> Wrap:
    return lambda inner: Deduplicated(inner, spool_dir=store.tmp_dir)


async def test_equal_requests_share_one_run_and_all_get_all_of_it(
    share: Wrap, scripted: Scripted, a_request: Requests
) -> None:
    gated = Gated()
    builder = scripted(gated)
    service = share(builder)
    first = asyncio.create_task(built(service, a_request()))
    await until(lambda: builder.running == 1)
    others = [
        asyncio.create_task(built(service, a_request(), BuildOptions(build_id=str(n), priority=n))) for n in range(3)
    ]
    await asyncio.sleep(0.02)
    gated.gate.set()
    led = [event for event in await first if not isinstance(event, Progress)]
    for other in await asyncio.gather(*others):
        assert other[0] == Queued(Wait.MERGED, "the-first")
        assert [event for event in other[1:] if not isinstance(event, Progress)] == led
    assert builder.started == 1


@pytest.mark.parametrize(
    "options",
    [BYPASS, BuildOptions(wall_s=1.0), BuildOptions(memory_bytes=1), BuildOptions(split_stderr=True), REFRESH],
)
async def test_what_might_end_otherwise_is_not_shared(
    share: Wrap, scripted: Scripted, a_request: Requests, options: BuildOptions
) -> None:
    gated = Gated()
    builder = scripted(gated)
    service = share(builder)
    builds = [asyncio.create_task(built(service, a_request(), each)) for each in (USE, options)]
    await until(lambda: builder.running == 2)
    gated.gate.set()
    await asyncio.gather(*builds)


async def test_a_shared_run_ends_with_the_last_who_wants_it(
    share: Wrap, scripted: Scripted, a_request: Requests
) -> None:
    gated = Gated()
    builder = scripted(gated)
    service = share(builder)
    async with service.build(a_request(), BuildOptions(build_id="second-leaver")) as stays:
        async with service.build(a_request(), USE) as leaves:
            assert isinstance(await anext(leaves), Queued)
        assert isinstance(await anext(stays), Assigned)
        assert builder.running == 1
    assert builder.running == 0
    gated.gate.set()
    assert isinstance(verdict(await built(service, a_request())), Success), "the next one runs anew"
    assert builder.started == 2


async def test_a_long_log_is_shared_from_its_first_byte_in_bounded_memory(
    share: Wrap, scripted: Scripted, a_request: Requests, store: LocalStore
) -> None:
    gate, said = asyncio.Event(), asyncio.Event()
    chunk = os.urandom(65536)

    async def talk(_request: BuildRequest, _options: BuildOptions, emit: Emit[BuildEvent]) -> None:
        for number in range(40):
            await emit(Log(chunk, number * len(chunk)))
        said.set()
        await gate.wait()
        await emit(Finished(Success(())))

    service = share(scripted(talk))
    first = asyncio.create_task(built(service, a_request()))
    await said.wait()
    late = asyncio.create_task(built(service, a_request()))
    await asyncio.sleep(0.02)
    gate.set()
    for events in await asyncio.gather(first, late):
        assert b"".join(event.data for event in events if isinstance(event, Log)) == chunk * 40
        offsets = [event.offset for event in events if isinstance(event, Log)]
        assert offsets == sorted(offsets)
    assert [name for name in os.listdir(store.tmp_dir) if name != "since"] == []


# Cached.


class Making:
    """A script that makes what it is told to, and counts."""

    def __init__(self, *outputs: Output, cacheable: bool = True) -> None:
        self.outputs = outputs
        self.cacheable = cacheable

    async def __call__(self, request: BuildRequest, _options: BuildOptions, emit: Emit[BuildEvent]) -> None:
        await emit(Log(b"making\n", 0))
        outputs = dict(zip(sorted(request.outputs), self.outputs, strict=True))
        made = tuple(outputs[path] for path in request.outputs)
        await emit(Finished(Success(made, cacheable=self.cacheable), builder=BuilderInfo(worker="w")))


async def two_outputs(store: LocalStore) -> tuple[Output, Output]:
    first = await store.add_blob(b"first")
    inner = await store.add_blob(b"inner")
    root = await store.directories.put([Directory(((b"inner", inner),))])
    return Output(first, needles=(0,)), Output(DirectoryNode(root, 2), needles=(1,))


def with_outputs(outputs: tuple[str, ...], needles: tuple[str, ...]) -> BuildRequest:
    return BuildRequest(
        command=("/bin/true",), working_dir="b", scratch_paths=("b",), outputs=outputs, refscan_needles=needles
    )


async def test_what_was_made_once_is_given_again_in_the_order_of_each_request(
    scripted: Scripted, store: LocalStore, keys: Keys
) -> None:
    one, two = await two_outputs(store)
    builder = scripted(Making(one, two))
    made = await built(Cached(builder, store, keys), with_outputs(("b/1", "b/2"), ("needle-x", "needle-y")))
    again = Cached(builder, store, keys, time_s=lambda: 5.0)  # Another process, so to speak.
    hit = await built(again, with_outputs(("b/1", "b/2"), ("needle-x", "needle-y")))
    assert builder.started == 1
    assert [type(event) for event in hit] == [Finished]
    first, second = verdict(made), verdict(hit)
    assert isinstance(first, Success)
    assert isinstance(second, Success)
    assert second.outputs == first.outputs
    assert isinstance(second.cached, CacheHit)
    assert second.cached.origin_build_id == "the-first"
    turned = verdict(await built(again, with_outputs(("b/2", "b/1"), ("needle-y", "needle-x", "needle-y"))))
    assert isinstance(turned, Success)
    assert [output.node for output in turned.outputs] == [two.node, one.node]
    assert [output.needles for output in turned.outputs] == [(0, 2), (1,)]
    assert builder.started == 1


async def test_failures_and_what_is_not_cacheable_are_not_kept(
    scripted: Scripted, store: LocalStore, keys: Keys, a_request: Requests
) -> None:
    async def fail(_request: BuildRequest, _options: BuildOptions, emit: Emit[BuildEvent]) -> None:
        await emit(Finished(Failure(Reason.COMMAND_FAILED, "no")))

    for script in (fail, Making(cacheable=False)):
        builder = scripted(script)
        service = Cached(builder, store, keys)
        await built(service, a_request())
        await built(service, a_request())
        assert builder.started == 2


@pytest.mark.parametrize("lost", ["first", "inner"])
async def test_a_hit_whose_closure_is_not_whole_is_made_again(
    scripted: Scripted, store: LocalStore, keys: Keys, lost: str
) -> None:
    one, two = await two_outputs(store)
    builder = scripted(Making(one, two))
    request = with_outputs(("b/1", "b/2"), ("needle-x", "needle-y"))
    await built(Cached(builder, store, keys), request)
    assert isinstance(two.node, DirectoryNode)
    await store.stage([two.node])  # Its tree is there, whatever happens to the blobs.
    digest = store.scheme.digest_of(lost.encode()).raw.hex()
    os.unlink(f"{store.path}/blobs/{digest[:2]}/{digest[2:]}")
    await built(Cached(builder, store, keys), request)
    assert builder.started == 2


async def test_refresh_runs_and_compares_and_never_replaces(scripted: Scripted, store: LocalStore, keys: Keys) -> None:
    request = with_outputs(("b/1",), ())
    first, other = await store.add_blob(b"1"), await store.add_blob(b"2")
    builder = scripted(Making(Output(first)))
    service = Cached(builder, store, keys)
    assert Notice not in [type(e) for e in await built(service, request, REFRESH)], "nothing to compare with"
    assert Notice not in [type(e) for e in await built(service, request, REFRESH)], "the same again"
    builder.script = Making(Output(other))
    events = await built(service, request, REFRESH)
    assert builder.started == 3
    *_, notice, finished = events
    assert isinstance(notice, Notice)
    assert notice.kind == "CACHE_DIFFERS"
    assert notice.fields["b/1"] == f"{first.digest} -> {other.digest}"
    assert isinstance(finished, Finished)
    assert isinstance(finished.verdict, Success)
    assert finished.verdict.outputs == (Output(other),)
    hit = verdict(await built(service, request))
    assert isinstance(hit, Success)
    assert hit.outputs == (Output(first),), "the cache keeps what it had"


async def test_a_file_that_became_executable_differs(scripted: Scripted, store: LocalStore, keys: Keys) -> None:
    request = with_outputs(("b/1",), ())
    plain = await store.add_blob(b"1")
    builder = scripted(Making(Output(plain)))
    service = Cached(builder, store, keys)
    await built(service, request)
    builder.script = Making(Output(FileNode(plain.digest, plain.size, executable=True)))
    notice = (await built(service, request, REFRESH))[-2]
    assert isinstance(notice, Notice)
    assert notice.fields["b/1"] == f"{plain.digest} -> {plain.digest} (executable)"


async def test_bypass_neither_looks_nor_keeps(
    scripted: Scripted, store: LocalStore, keys: Keys, a_request: Requests
) -> None:
    builder = scripted()
    service = Cached(builder, store, keys)
    await built(service, a_request(), BYPASS)
    await built(service, a_request())
    await built(service, a_request(), BYPASS)
    assert builder.started == 3


async def test_another_salt_is_another_cache(scripted: Scripted, store: LocalStore, a_request: Requests) -> None:
    builder = scripted()
    for salt in ("a", "b", "a"):
        await built(Cached(builder, store, Keys(store.scheme, salt=salt)), a_request())
    assert builder.started == 2


# Dummy.


async def test_dummy_builds_nothing(a_request: Requests) -> None:
    failure = verdict(await built(DummyBuilder("blake3/doubled"), a_request()))
    assert isinstance(failure, Failure)
    assert failure.reason is Reason.UNSATISFIABLE
