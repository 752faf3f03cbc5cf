"""What clients of the build services depend on, seen on the wire by generated stubs."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc
import grpc.aio
import pytest

from kiln.aio import Emit
from kiln.build.events import (
    BuildEvent,
    ExitDetail,
    Failure,
    FieldDetail,
    Finished,
    Log,
    Output,
    Reason,
    Success,
)
from kiln.build.model import BuildRequest
from kiln.build.unary_status import STATUS_BYTES_MAX, failure_in
from kiln.castore.model import BLAKE3_DOCUMENTED, BLAKE3_DOUBLED, SHA256_DOCUMENTED, Scheme, SymlinkNode
from kiln.protos.kiln.build.v1 import build_pb2
from kiln.protos.snix.build.protos import build_pb2 as snix
from kiln.protos.snix.build.protos.rpc_build_pb2_grpc import BuildServiceStub as SnixStub
from kiln.protos.tvix.build.protos import build_pb2 as tvix
from kiln.protos.tvix.build.protos.rpc_build_pb2_grpc import BuildServiceStub as TvixStub

ServeBuilds = Callable[..., AbstractAsyncContextManager[Any]]
Code = grpc.StatusCode


def request(**fields: Any) -> snix.BuildRequest:
    defaults: dict[str, Any] = {"command_args": ["/bin/true"], "working_dir": "build", "scratch_paths": ["build"]}
    return snix.BuildRequest(**{**defaults, **fields})


async def forever(_request: BuildRequest, emit: Emit[BuildEvent]) -> None:
    await emit(Log(b"begun\n", 0))
    await asyncio.Event().wait()


async def links(asked: BuildRequest, emit: Emit[BuildEvent]) -> None:
    """Each output is a symlink to its own path."""
    outputs = tuple(Output(SymlinkNode(path.encode()), (index,)) for index, path in enumerate(asked.outputs))
    await emit(Finished(Success(outputs)))


def failing(failure: Failure) -> Callable[[BuildRequest, Emit[BuildEvent]], Any]:
    async def fail(_request: BuildRequest, emit: Emit[BuildEvent]) -> None:
        await emit(Finished(failure))

    return fail


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def failure_of(error: grpc.aio.AioRpcError) -> Failure | None:
    details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    assert isinstance(details, bytes)
    assert len((error.details() or "").encode()) + len(details) <= STATUS_BYTES_MAX
    return failure_in(details)


async def all_of(stream: Any) -> list[build_pb2.Event]:
    """What comes from now on. By `read`: gRPC does not let a call be iterated after that."""
    events = []
    while (event := await stream.read()) is not grpc.aio.EOF:
        events.append(event)
    return events


def kinds(events: list[build_pb2.Event]) -> list[str | None]:
    return [event.WhichOneof("event") for event in events]


async def submitted(served: Any, **fields: Any) -> str:
    """The id of a new build that nobody follows."""
    stream = served.kiln.Build(build_pb2.Submission(request=request(**fields)))
    first = await stream.read()
    stream.cancel()
    return str(first.build_id)


class TestDoBuild:
    async def test_outputs_come_in_the_order_of_the_request(self, serve_builds: ServeBuilds) -> None:
        asked = request(outputs=["build/b", "build/a"], refscan_needles=["x", "y"])  # As a real Snix sends them.
        async with serve_builds(links) as served:
            answer = await SnixStub(served.channel).DoBuild(asked)
        assert [found.output.symlink.target for found in answer.outputs] == [b"build/b", b"build/a"]
        assert [list(found.needles) for found in answer.outputs] == [[0], [1]]
        assert {found.output.symlink.name for found in answer.outputs} == {b""}

    @pytest.mark.parametrize("scheme", [BLAKE3_DOUBLED, BLAKE3_DOCUMENTED], ids=lambda scheme: scheme.name)
    async def test_a_strict_server_refuses_outputs_that_are_out_of_order(
        self, scheme: Scheme, serve_builds: ServeBuilds
    ) -> None:
        def call(served: Any, *outputs: str) -> Any:
            if scheme is BLAKE3_DOUBLED:
                return SnixStub(served.channel).DoBuild(request(outputs=[f"build/{name}" for name in outputs]))
            asked = tvix.BuildRequest(command_args=["/bin/true"], store_dir="/store", outputs=outputs)
            return TvixStub(served.channel).DoBuild(asked)

        async with serve_builds(links, scheme=scheme, strict=True) as served:
            await call(served, "a", "b")
            error = await refused(call(served, "b", "a"))
            submission = build_pb2.Submission(request=request(outputs=["build/b", "build/a"]))
            streamed = await refused(served.kiln.Build(submission).read())
        for refusal in (error, streamed):
            found = failure_of(refusal)
            assert found is not None
            assert (refusal.code(), found.detail) == (
                Code.INVALID_ARGUMENT,
                FieldDetail("outputs", 1, "outputs-sorted"),
            )

    async def test_the_build_id_is_there_before_the_answer(self, serve_builds: ServeBuilds) -> None:
        async with serve_builds(forever) as served:
            # As a stream, for gRPC's Python shows the headers of others only with their answer.
            call = served.channel.unary_stream("/snix.build.v1.BuildService/DoBuild")(request().SerializeToString())
            build_id = dict(await call.initial_metadata())["kiln-build-id"]
            watching = served.kiln.Watch(build_pb2.WatchRequest(build_id=build_id))
            assert (await watching.read()).WhichOneof("event") == "accepted"
            await served.kiln.Cancel(build_pb2.CancelRequest(build_id=build_id))
            assert (await refused(call.read())).code() is Code.CANCELLED
            assert kinds(await all_of(watching))[-1] == "finished"

    async def test_a_failure_is_a_status_with_its_details(self, serve_builds: ServeBuilds) -> None:
        failure = Failure(Reason.COMMAND_FAILED, "exit code 3", detail=ExitDetail(3), log_tail=b"oh no\n")
        async with serve_builds(failing(failure)) as served:
            error = await refused(SnixStub(served.channel).DoBuild(request()))
        assert (error.code(), error.details()) == (Code.FAILED_PRECONDITION, "exit code 3")
        assert failure_of(error) == failure

    async def test_a_long_log_does_not_hide_the_reason(self, serve_builds: ServeBuilds) -> None:
        failure = Failure(Reason.COMMAND_FAILED, "exit code 3", detail=ExitDetail(3), log_tail=bytes(100_000))
        async with serve_builds(failing(failure)) as served:
            error = await refused(SnixStub(served.channel).DoBuild(request()))
        found = failure_of(error)
        assert error.code() is Code.FAILED_PRECONDITION
        assert found is not None
        assert found.detail == ExitDetail(3)
        assert found.log_tail

    async def test_a_broken_rule_is_named(self, serve_builds: ServeBuilds) -> None:
        async with serve_builds() as served:
            error = await refused(SnixStub(served.channel).DoBuild(request(outputs=["build/a", "../b"])))
        found = failure_of(error)
        assert error.code() is Code.INVALID_ARGUMENT
        assert found is not None
        assert isinstance(found.detail, FieldDetail)
        assert (found.detail.path, found.detail.index) == ("outputs", 1)

    async def test_a_field_nobody_knows_is_refused(self, serve_builds: ServeBuilds) -> None:
        newer = snix.BuildRequest.FromString(request().SerializeToString() + bytes([0xF8, 0x07, 1]))  # 127: 1
        async with serve_builds() as served:
            error = await refused(SnixStub(served.channel).DoBuild(newer))
            assert served.builder.started == 0
        assert error.code() is Code.INVALID_ARGUMENT
        assert "127" in (error.details() or "")

    @pytest.mark.parametrize("data", [b"\xff", b"\x12\x01\xff"], ids=["no message", "an argument that is not UTF-8"])
    async def test_what_does_not_parse_is_the_clients_fault(self, serve_builds: ServeBuilds, data: bytes) -> None:
        async with serve_builds() as served:
            for path in ("/snix.build.v1.BuildService/DoBuild", "/kiln.build.v1.BuildService/Cancel"):
                error = await refused(served.channel.unary_unary(path)(data))
                assert error.code() is Code.INVALID_ARGUMENT

    @pytest.mark.parametrize(
        "fields",
        [
            {"environment_vars": [snix.BuildRequest.EnvVar(key="A", value=b"\xff")]},
            {"refscan_needles": ["x"]},
            {"inputs_dir": "in", "inputs": [{"symlink": {"name": b"\xff", "target": b"\xfe"}}]},
        ],
        ids=["value", "needle of a byte", "name"],
    )
    async def test_bytes_that_break_a_snix_are_taken(self, serve_builds: ServeBuilds, fields: dict[str, Any]) -> None:
        async with serve_builds() as served:
            await SnixStub(served.channel).DoBuild(request(**fields))

    async def test_a_client_that_goes_away_cancels_its_build(self, serve_builds: ServeBuilds) -> None:
        async with serve_builds(forever) as served:
            for _ in range(4):  # After as many a real Snix answers no more.
                error = await refused(SnixStub(served.channel).DoBuild(request(), timeout=0.15))
                assert error.code() is Code.DEADLINE_EXCEEDED
            await served.builder.idle.wait()
            assert served.builder.started == 4
            served.builder.script = links
            await SnixStub(served.channel).DoBuild(request())
            builds, _ = await served.host.list()
        verdicts = [info.last.body.verdict for info in builds[1:]]
        assert [(verdict.reason, verdict.message) for verdict in verdicts] == [
            (Reason.CANCELLED, "cancelled by disconnect: the last one who watched it left")
        ] * 4

    async def test_tvix_echoes_the_request_and_sorts_outputs(self, serve_builds: ServeBuilds) -> None:
        asked = tvix.BuildRequest(
            command_args=["/bin/true"], working_dir="build", scratch_paths=["build"], store_dir="/s", outputs=["b", "a"]
        )
        async with serve_builds(links, scheme=BLAKE3_DOCUMENTED) as served:
            answer = await TvixStub(served.channel).DoBuild(asked)
        assert answer.build_request == asked
        assert [(node.symlink.name, node.symlink.target) for node in answer.outputs] == [(b"a", b"s/a"), (b"b", b"s/b")]

    async def test_tvix_requests_are_refused_in_their_own_words(self, serve_builds: ServeBuilds) -> None:
        asked = tvix.BuildRequest(command_args=["/bin/true"], store_dir="relative")
        async with serve_builds(links, scheme=BLAKE3_DOCUMENTED) as served:
            error = await refused(TvixStub(served.channel).DoBuild(asked))
        found = failure_of(error)
        assert found is not None
        assert isinstance(found.detail, FieldDetail)
        assert found.detail.path == "store_dir"

    @pytest.mark.parametrize(
        ("scheme", "answers"),
        [
            (BLAKE3_DOUBLED, {"snix.build.v1": Code.INVALID_ARGUMENT, "tvix.build.v1": Code.UNIMPLEMENTED}),
            (BLAKE3_DOCUMENTED, {"snix.build.v1": Code.UNIMPLEMENTED, "tvix.build.v1": Code.INVALID_ARGUMENT}),
            (SHA256_DOCUMENTED, {"snix.build.v1": Code.UNIMPLEMENTED, "tvix.build.v1": Code.UNIMPLEMENTED}),
        ],
        ids=lambda value: value.name if isinstance(value, Scheme) else "",
    )
    async def test_each_castore_scheme_has_its_protocol(
        self, serve_builds: ServeBuilds, scheme: Scheme, answers: dict[str, Code]
    ) -> None:
        async with serve_builds(scheme=scheme) as served:
            for package, code in answers.items():
                method = served.channel.unary_unary(f"/{package}.BuildService/DoBuild")
                assert (await refused(method(b""))).code() is code
            assert kinds(await all_of(served.kiln.Build(build_pb2.Submission(request=request()))))[-1] == "finished"


class TestBuild:
    async def test_a_build_is_told_from_first_to_last(self, serve_builds: ServeBuilds) -> None:
        async with serve_builds() as served:
            events = await all_of(served.kiln.Build(build_pb2.Submission(request=request(), labels={"who": "me"})))
        assert kinds(events) == ["accepted", "assigned", "log", "finished"]
        assert [event.seq for event in events] == [1, 2, 3, 4]
        assert len({event.build_id for event in events}) == 1

    async def test_a_failed_build_is_no_failed_call(self, serve_builds: ServeBuilds) -> None:
        async with serve_builds(failing(Failure(Reason.INFRASTRUCTURE, "the disk burns"))) as served:
            call = served.kiln.Build(build_pb2.Submission(request=request()))
            events = await all_of(call)
            assert await call.code() is Code.OK
        assert events[-1].finished.failure.reason == build_pb2.REASON_INFRASTRUCTURE

    async def test_a_broken_rule_is_named(self, serve_builds: ServeBuilds) -> None:
        async with serve_builds() as served:
            call = served.kiln.Build(build_pb2.Submission(request=request(command_args=[])))
            error = await refused(call.read())
        found = failure_of(error)
        assert error.code() is Code.INVALID_ARGUMENT
        assert found is not None
        assert found.reason is Reason.INVALID_REQUEST

    async def test_unknown_fields_are_refused_in_the_request_only(self, serve_builds: ServeBuilds) -> None:
        unknown = bytes([0xF8, 0x07, 1])
        newer = build_pb2.Submission.FromString(
            build_pb2.Submission(request=request(), options=build_pb2.Options.FromString(unknown)).SerializeToString()
            + unknown
        )
        async with serve_builds() as served:
            assert kinds(await all_of(served.kiln.Build(newer)))[-1] == "finished"
            newer.request.MergeFromString(unknown)
            assert (await refused(served.kiln.Build(newer).read())).code() is Code.INVALID_ARGUMENT

    async def test_what_must_be_understood_is_known_or_refused(self, serve_builds: ServeBuilds) -> None:
        async with serve_builds() as served:
            known = build_pb2.Submission(request=request(), must_understand=["samples"])
            assert kinds(await all_of(served.kiln.Build(known)))[-1] == "finished"
            unknown = build_pb2.Submission(request=request(), must_understand=["samples", "teleport"])
            error = await refused(served.kiln.Build(unknown).read())
            assert served.builder.started == 1
        assert error.code() is Code.FAILED_PRECONDITION
        assert "teleport" in (error.details() or "")

    async def test_a_submission_can_be_repeated(self, serve_builds: ServeBuilds) -> None:
        async with serve_builds() as served:
            submission = build_pb2.Submission(request=request(), client_token="once")
            first, second = [await all_of(served.kiln.Build(submission)) for _ in range(2)]
            assert served.builder.started == 1
        assert first == second

    async def test_it_runs_on_without_followers(self, serve_builds: ServeBuilds) -> None:
        go = asyncio.Event()

        async def when_told(asked: BuildRequest, emit: Emit[BuildEvent]) -> None:
            await go.wait()
            await links(asked, emit)

        async with serve_builds(when_told) as served:
            build_id = await submitted(served)
            await asyncio.sleep(0.2)  # Whatever the going away of its client sets off has happened.
            assert served.builder.running == 1
            go.set()
            events = await all_of(served.kiln.Watch(build_pb2.WatchRequest(build_id=build_id)))
        assert events[-1].finished.HasField("success")

    async def test_unless_it_was_to_end_with_them(self, serve_builds: ServeBuilds) -> None:
        options = build_pb2.Options(on_disconnect=build_pb2.DISCONNECT_CANCEL)
        async with serve_builds(forever) as served:
            stream = served.kiln.Build(build_pb2.Submission(request=request(), options=options))
            build_id = (await stream.read()).build_id
            other = served.kiln.Watch(build_pb2.WatchRequest(build_id=build_id))
            await other.read()
            stream.cancel()
            await asyncio.sleep(0.2)
            assert served.builder.running == 1
            other.cancel()
            await served.builder.idle.wait()


class TestWatch:
    async def test_it_resumes_after_any_event(self, serve_builds: ServeBuilds) -> None:
        async with serve_builds() as served:
            events = await all_of(served.kiln.Build(build_pb2.Submission(request=request())))
            for seq in range(len(events) + 1):
                asked = build_pb2.WatchRequest(build_id=events[0].build_id, after_seq=seq)
                assert await all_of(served.kiln.Watch(asked)) == events[seq:]

    async def test_positions_and_ids_that_are_not_there(self, serve_builds: ServeBuilds) -> None:
        async with serve_builds() as served:
            events = await all_of(served.kiln.Build(build_pb2.Submission(request=request())))
            beyond = build_pb2.WatchRequest(build_id=events[0].build_id, after_seq=5)
            error = await refused(served.kiln.Watch(beyond).read())
            assert error.code() is Code.OUT_OF_RANGE
            assert "4" in (error.details() or "")
            nobody = build_pb2.WatchRequest(build_id="nobody")
            assert (await refused(served.kiln.Watch(nobody).read())).code() is Code.NOT_FOUND

    async def test_the_log_can_be_left_out(self, serve_builds: ServeBuilds) -> None:
        async with serve_builds() as served:
            build_id = await submitted(served)
            asked = build_pb2.WatchRequest(build_id=build_id, without_log=True)
            assert kinds(await all_of(served.kiln.Watch(asked))) == ["accepted", "assigned", "finished"]

    async def test_a_quiet_build_is_heard_of(self, serve_builds: ServeBuilds) -> None:
        async with serve_builds(forever, heartbeat_s=0.05) as served:
            stream = served.kiln.Build(build_pb2.Submission(request=request()))
            heard = [await stream.read() for _ in range(5)]
            stream.cancel()
        beat = heard[-1]
        assert (beat.WhichOneof("event"), beat.seq) == ("heartbeat", 0)
        assert (beat.heartbeat.head_seq, beat.heartbeat.log_size) == (3, 6)

    async def test_a_slow_follower_holds_up_nobody(self, serve_builds: ServeBuilds) -> None:
        chunk, count = bytes(65536), 200

        async def verbose(asked: BuildRequest, emit: Emit[BuildEvent]) -> None:
            for _ in range(count):
                await emit(Log(chunk, 0))
            await links(asked, emit)

        async with serve_builds(verbose) as served:
            slow = served.kiln.Build(build_pb2.Submission(request=request()))
            build_id = (await slow.read()).build_id
            await served.builder.idle.wait()
            quick = build_pb2.WatchRequest(build_id=build_id, without_log=True)
            assert kinds(await all_of(served.kiln.Watch(quick)))[-1] == "finished"
            received = [event.log.data for event in await all_of(slow) if event.HasField("log")]
        assert b"".join(received) == chunk * count


class TestReadLog:
    @pytest.mark.parametrize(
        ("asked", "start", "data"),
        [
            ({}, 0, b"hello\n"),
            ({"offset": 2}, 2, b"llo\n"),
            ({"offset": 1, "limit": 2}, 1, b"el"),
            ({"offset": -2}, 4, b"o\n"),
            ({"offset": -100}, 0, b"hello\n"),
            ({"offset": 6}, None, b""),
            ({"follow": True}, 0, b"hello\n"),
        ],
    )
    async def test_any_part(
        self, serve_builds: ServeBuilds, asked: dict[str, Any], start: int | None, data: bytes
    ) -> None:
        async with serve_builds() as served:
            events = await all_of(served.kiln.Build(build_pb2.Submission(request=request())))
            stream = served.kiln.ReadLog(build_pb2.ReadLogRequest(build_id=events[0].build_id, **asked))
            got = [message async for message in stream]
        assert b"".join(message.data for message in got) == data
        assert [message.offset for message in got[:1]] == [start][: len(got)]

    async def test_pending_bytes_are_there_while_it_runs(self, serve_builds: ServeBuilds) -> None:
        async with serve_builds(forever) as served:
            build_id = await submitted(served)
            stream = served.kiln.ReadLog(build_pb2.ReadLogRequest(build_id=build_id, follow=True))
            assert (await stream.read()).data == b"begun\n"
            await served.kiln.Cancel(build_pb2.CancelRequest(build_id=build_id))
            assert await stream.read() is grpc.aio.EOF


class TestTheRest:
    async def test_cancel_answers_when_it_is_over(self, serve_builds: ServeBuilds) -> None:
        async with serve_builds(forever) as served:
            build_id = await submitted(served)
            info = await served.kiln.Cancel(build_pb2.CancelRequest(build_id=build_id, why="enough"))
            assert served.builder.running == 0
            assert info.last.finished.failure.reason == build_pb2.REASON_CANCELLED
            assert "enough" in info.last.finished.failure.message
            again = await served.kiln.Cancel(build_pb2.CancelRequest(build_id=build_id))
        assert again == info

    async def test_get_and_list(self, serve_builds: ServeBuilds) -> None:
        async with serve_builds() as served:
            for name in ("a", "b", "c"):
                submission = build_pb2.Submission(request=request(command_args=[name]), labels={"name": name})
                await all_of(served.kiln.Build(submission))
            first = await served.kiln.List(build_pb2.ListRequest(limit=2))
            rest = await served.kiln.List(build_pb2.ListRequest(limit=2, page=first.next_page))
            names = [info.labels["name"] for info in [*first.builds, *rest.builds]]
            assert (names, rest.next_page) == (["c", "b", "a"], "")
            labelled = await served.kiln.List(build_pb2.ListRequest(labels={"name": "b"}))
            assert [info.build_id for info in labelled.builds] == [first.builds[1].build_id]
            asked = build_pb2.GetRequest(build_id=first.builds[0].build_id, with_request=True)
            info = await served.kiln.Get(asked)
            assert info.request == request(command_args=["c"])
            assert (info.first_seq, info.head_seq, info.last.seq) == (1, 4, 4)
            bad_page = served.kiln.List(build_pb2.ListRequest(page="nonsense"))
            assert (await refused(bad_page)).code() is Code.INVALID_ARGUMENT

    async def test_find_missing(self, serve_builds: ServeBuilds) -> None:
        async with serve_builds() as served:
            there = (await served.store.add_blob(b"there")).digest.raw
            asked = build_pb2.FindMissingRequest(blobs=[there, bytes(32)], directories=[bytes(32)])
            reply = await served.kiln.FindMissing(asked)
            assert (list(reply.blobs), list(reply.directories)) == ([bytes(32)], [bytes(32)])
            short = served.kiln.FindMissing(build_pb2.FindMissingRequest(blobs=[b"short"]))
            assert (await refused(short)).code() is Code.INVALID_ARGUMENT

    async def test_capabilities(self, serve_builds: ServeBuilds) -> None:
        async with serve_builds(scheme=BLAKE3_DOCUMENTED) as served:
            reply = await served.kiln.Capabilities(build_pb2.CapabilitiesRequest())
        assert (reply.castore_scheme, reply.max_message_bytes) == ("blake3/documented", 64 << 20)
        assert list(reply.features) == ["samples"]
