"""A host over gRPC keeps the promises of one in process; what only a host elsewhere can do to its clients."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from kiln.aio import Emit
from kiln.build.events import (
    Accepted,
    BuilderInfo,
    BuildEvent,
    Event,
    Failure,
    Finished,
    LimitDetail,
    Log,
    MissingDetail,
    Output,
    Reason,
    Success,
)
from kiln.build.model import BuildOptions, BuildRequest
from kiln.build.service import BuildHost, BuildService, Capabilities
from kiln.build.unary_status import unary_status
from kiln.build.wire import decode_request, to_request, to_response
from kiln.builders.grpc import CastoreDiffers, ContractDiffers, GrpcHost, connected_host
from kiln.builders.host import Host
from kiln.castore.castore import Castore
from kiln.castore.local.store import LocalStore
from kiln.castore.model import BLAKE3_DOCUMENTED, Digest, DirectoryNode, SymlinkNode
from kiln.errors import Exhausted, NotFound, OutOfRange
from kiln.protos.snix.build.protos.rpc_build_pb2_grpc import BuildServiceStub
from kiln.rpc.channel import connected
from kiln.rpc.status import PeerLacksMethod, PeerUnreachable
from kiln.rpc.url import CHANNEL_OPTIONS, parse_url
from kiln.server.castore_servicers import castore_handlers
from kiln.server.listen import Security, parse_listen
from kiln.server.serve import serving

Request = Callable[..., BuildRequest]
Hosting = Callable[..., Host]
Scripted = Callable[..., Any]
Serve = Callable[..., AbstractAsyncContextManager[str]]
Hosts = Callable[..., AbstractAsyncContextManager[BuildHost]]


async def forever(_request: BuildRequest, _options: BuildOptions, emit: Emit[BuildEvent]) -> None:
    await emit(Log(b"begun\n", 0))
    await asyncio.Event().wait()


@asynccontextmanager
async def served(host: BuildHost, store: LocalStore, socket: Path) -> AsyncIterator[str]:
    """`host` at a socket; gives the URL."""
    security = Security()
    castore = Castore(store.blobs, store.directories)
    log = logging.getLogger("kiln.tests")
    async with serving(host, castore, [parse_listen(f"unix://{socket}", security)], security, log=log) as server:
        yield server.urls[0]


@asynccontextmanager
async def host_at(url: str, **options: Any) -> AsyncIterator[GrpcHost]:
    async with connected(parse_url(url, CHANNEL_OPTIONS)) as peer, GrpcHost(peer, **options) as host:
        yield host


@pytest.fixture(params=["in process", "by gRPC"])
def hosts(request: pytest.FixtureRequest, hosting: Hosting, store: LocalStore, tmp_path: Path) -> Hosts:
    """Makes hosts over a builder, here or behind a socket."""

    @asynccontextmanager
    async def make(builder: BuildService, **options: float) -> AsyncIterator[BuildHost]:
        async with hosting(builder, **options) as host:
            if request.param == "in process":
                yield host
                return
            async with served(host, store, tmp_path / "sock") as url, host_at(url) as far:
                yield far

    return make


async def watched(host: BuildHost, build_id: str, **options: Any) -> list[Event]:
    async with host.watch(build_id, **options) as events:
        return [event async for event in events]


async def log_of(host: BuildHost, build_id: str, **options: Any) -> bytes:
    return b"".join([data async for _, data in host.read_log(build_id, **options)])


class TestAHost:
    """The same promises, in process and by gRPC."""

    async def test_tells_a_build_from_first_to_last(self, hosts: Hosts, scripted: Scripted, a_request: Request) -> None:
        async with hosts(scripted()) as host:
            build_id = await host.submit(a_request(), BuildOptions())
            events = await watched(host, build_id)
            assert [type(event.body).__name__ for event in events] == ["Accepted", "Assigned", "Log", "Finished"]
            assert [event.seq for event in events] == [1, 2, 3, 4]
            assert await watched(host, build_id) == events
            assert await watched(host, build_id, after_seq=3) == events[3:]
            assert await watched(host, build_id, after_seq=4) == []
            assert await watched(host, build_id, without_log=True) == [*events[:2], events[3]]

    async def test_filters_what_it_tells_of_a_new_build(
        self, hosts: Hosts, scripted: Scripted, a_request: Request
    ) -> None:
        async with hosts(scripted()) as host:
            wanted: list[tuple[dict[str, Any], list[int]]]
            wanted = [({"without_log": True}, [1, 2, 4]), ({"after_seq": 2}, [3, 4])]
            for options, seqs in wanted:
                build_id = await host.submit(a_request(str(options)), BuildOptions())
                assert (await host.get(build_id)).head_seq >= 1
                while (await host.get(build_id)).head_seq < 4:
                    await asyncio.sleep(0.01)
                assert [event.seq for event in await watched(host, build_id, **options)] == seqs

    async def test_a_heartbeat_is_passing(self, hosts: Hosts, scripted: Scripted, a_request: Request) -> None:
        async with hosts(scripted(forever), heartbeat_s=0.02) as host:
            build_id = await host.submit(a_request(), BuildOptions())
            async with host.watch(build_id) as events:
                async for event in events:
                    if not event.seq:
                        break

            async def cancel_soon() -> None:
                await asyncio.sleep(0.2)
                await host.cancel(build_id, by="a test")

            cancelling = asyncio.create_task(cancel_soon())
            assert 0 not in [event.seq for event in await watched(host, build_id, recorded_only=True)]
            await cancelling

    async def test_keeps_the_log(self, hosts: Hosts, scripted: Scripted, a_request: Request) -> None:
        async with hosts(scripted()) as host:
            build_id = await host.submit(a_request(), BuildOptions())
            assert await log_of(host, build_id, follow=True) == b"hello\n"
            assert await log_of(host, build_id, offset=1, limit=3) == b"ell"
            assert await log_of(host, build_id, limit=0) == b""
            assert await log_of(host, build_id, offset=-3) == b"lo\n"
            with pytest.raises(OutOfRange):
                await log_of(host, build_id, offset=7)

    async def test_takes_a_token_once(self, hosts: Hosts, scripted: Scripted, a_request: Request) -> None:
        builder = scripted()
        async with hosts(builder) as host:
            ids = {await host.submit(a_request(), BuildOptions(), client_token="t") for _ in range(3)}
            assert len(ids) == 1
            await watched(host, ids.pop())
        assert builder.started == 1

    async def test_cancels(self, hosts: Hosts, scripted: Scripted, a_request: Request) -> None:
        builder = scripted(forever)
        async with hosts(builder) as host:
            build_id = await host.submit(a_request(), BuildOptions())
            info = await host.cancel(build_id, by="a test", why="enough")
            assert builder.running == 0
            assert info.last is not None
            assert isinstance(info.last.body, Finished)
            assert isinstance(info.last.body.verdict, Failure)
            assert info.last.body.verdict.reason is Reason.CANCELLED
            assert info == await host.get(build_id)

    async def test_ends_with_its_last_follower_where_asked(
        self, hosts: Hosts, scripted: Scripted, a_request: Request
    ) -> None:
        async with hosts(scripted(forever)) as host:
            build_id = await host.submit(a_request(), BuildOptions(cancel_on_disconnect=True))
            await asyncio.sleep(0.1)  # Nobody has followed yet, so nobody has left.
            async with host.watch(build_id, after_seq=1) as events:
                async for event in events:
                    if isinstance(event.body, Log):
                        break
                assert not isinstance((await host.get(build_id)).last.body, Finished)  # type: ignore[union-attr]
            last = (await watched(host, build_id))[-1].body
            assert isinstance(last, Finished)
            assert isinstance(last.verdict, Failure)
            assert last.verdict.message.startswith("cancelled by disconnect")

    async def test_nobody_who_never_followed_keeps_it_from_running(
        self, hosts: Hosts, scripted: Scripted, a_request: Request
    ) -> None:
        async with hosts(scripted()) as host:
            ids = [await host.submit(a_request(str(number)), BuildOptions()) for number in range(120)]
            assert len(set(ids)) == 120
            for build_id in ids:
                assert isinstance((await watched(host, build_id))[-1].body, Finished)

    async def test_takes_only_so_many(self, hosts: Hosts, scripted: Scripted, a_request: Request) -> None:
        async with hosts(scripted(forever), builds_max=1) as host:
            build_id = await host.submit(a_request("a"), BuildOptions(), client_token="a")
            with pytest.raises(Exhausted, match="1 builds wait or run"):
                await host.submit(a_request("b"), BuildOptions())
            assert await host.submit(a_request("a"), BuildOptions(), client_token="a") == build_id
            await host.cancel(build_id, by="a test")
            await host.submit(a_request("b"), BuildOptions())

    async def test_lists(self, hosts: Hosts, scripted: Scripted, a_request: Request) -> None:
        async with hosts(scripted()) as host:
            ids = []
            for name in ("a", "b", "c"):
                ids.append(await host.submit(a_request(name), BuildOptions(labels={"name": name})))
                await watched(host, ids[-1])
            page, following = await host.list(limit=2)
            rest, end = await host.list(limit=2, page=following)
            assert [info.build_id for info in page + rest] == ids[::-1]
            assert end == ""
            labelled, _ = await host.list(labels={"name": "a"})
            assert [info.labels for info in labelled] == [{"name": "a"}]
            assert (await host.list(running_only=True))[0] == ()
            assert (await host.get(ids[0][:-1], with_request=True)).request == a_request("a")

    async def test_says_what_it_lacks(
        self, hosts: Hosts, scripted: Scripted, store: LocalStore, tmp_path: Path
    ) -> None:
        (tmp_path / "tree" / "sub").mkdir(parents=True)
        (tmp_path / "tree" / "sub" / "file").write_text("x")
        root = (await store.ingest(str(tmp_path / "tree"))).node
        assert isinstance(root, DirectoryNode)
        nowhere = Digest(bytes(32))
        async with hosts(scripted()) as host:
            found = await host.find_missing(blobs=[store.scheme.empty, nowhere], directories=[root.digest, nowhere])
            assert found == (frozenset({nowhere}), frozenset({nowhere}))
            assert not any(await host.find_missing(blobs=[], directories=[root.digest], closure=True))

    async def test_knows_nothing_of_others(self, hosts: Hosts, scripted: Scripted, a_request: Request) -> None:
        async with hosts(scripted()) as host:
            for call in (host.get("nobody"), host.cancel("nobody", by="a test"), watched(host, "nobody")):
                with pytest.raises(NotFound, match="nobody"):
                    await call
            with pytest.raises(NotFound):
                await log_of(host, "nobody")
            build_id = await host.submit(a_request(), BuildOptions())
            await watched(host, build_id)
            with pytest.raises(OutOfRange):
                await watched(host, build_id, after_seq=9)


class TestAServerThatComesBack:
    async def test_a_watch_goes_on_where_it_was(
        self, hosting: Hosting, scripted: Scripted, a_request: Request, store: LocalStore, tmp_path: Path
    ) -> None:
        go = asyncio.Event()

        async def two_words(_request: BuildRequest, _options: BuildOptions, emit: Emit[BuildEvent]) -> None:
            await emit(Log(b"one\n", 0))
            await go.wait()
            await emit(Log(b"two\n", 0))
            await emit(Finished(Success(())))

        async with hosting(scripted(two_words)) as host, host_at(f"grpc+unix://{tmp_path}/sock") as far:
            async with served(host, store, tmp_path / "sock"):
                build_id = await far.submit(a_request(), BuildOptions())
                log = far.read_log(build_id, follow=True)
                assert await anext(log) == (0, b"one\n")
                watching = asyncio.create_task(watched(far, build_id, recorded_only=True))
                await asyncio.sleep(0.1)
            go.set()
            await asyncio.sleep(0.3)  # Some tries find nobody.
            async with served(host, store, tmp_path / "sock"):
                events = await watching
                assert [piece async for piece in log] == [(4, b"two\n")]
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert isinstance(events[-1].body, Finished)

    async def test_a_server_that_does_not_is_given_up(
        self, hosting: Hosting, scripted: Scripted, a_request: Request, store: LocalStore, tmp_path: Path
    ) -> None:
        url = f"grpc+unix://{tmp_path}/sock"
        async with hosting(scripted(forever)) as host, host_at(url, patience_s=0.3) as far:
            async with served(host, store, tmp_path / "sock"):
                build_id = await far.submit(a_request(), BuildOptions())
                watching = asyncio.create_task(watched(far, build_id))
                await asyncio.sleep(0.1)
            with pytest.raises(PeerUnreachable, match=re.escape(url)):
                await watching

    async def test_a_lost_answer_makes_no_second_build(
        self, serve: Serve, hosting: Hosting, scripted: Scripted, a_request: Request, store: LocalStore, tmp_path: Path
    ) -> None:
        builder = scripted(forever)
        submissions = []

        async def accept_and_break(data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            submissions.append(data)
            async with host_at(f"grpc+unix://{tmp_path}/sock") as far, asyncio.timeout(0.2):
                method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes]
                method = far._peer.channel.unary_stream("/kiln.build.v1.BuildService/Build")
                accepted = await method(data).read()
                if len(submissions) < 3:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the proxy restarts")
                assert isinstance(accepted, bytes)
                return accepted

        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]]
        methods = {"Build": grpc.unary_unary_rpc_method_handler(accept_and_break)}
        proxy = grpc.method_handlers_generic_handler("kiln.build.v1.BuildService", methods)
        async with (
            hosting(builder) as host,
            served(host, store, tmp_path / "sock"),
            serve([proxy]) as url,
            host_at(url) as far,
        ):
            build_id = await far.submit(a_request(), BuildOptions())
            assert [info.build_id for info in (await host.list())[0]] == [build_id]
        assert len(submissions) == 3


class TestAClientThatLeaves:
    @pytest.mark.parametrize("cancels", [True, False])
    async def test_without_having_watched(
        self, hosting: Hosting, scripted: Scripted, a_request: Request, store: LocalStore, tmp_path: Path, cancels: bool
    ) -> None:
        async with hosting(scripted(forever)) as host, served(host, store, tmp_path / "sock") as url:
            async with host_at(url) as far:
                build_id = await far.submit(a_request(), BuildOptions(cancel_on_disconnect=cancels))
            # Not by watching: that would be a follower.
            for _ in range(100 if cancels else 3):
                running = (await host.list(running_only=True))[0]
                if not running:
                    break
                await asyncio.sleep(0.1)
            assert [info.build_id for info in running] == ([] if cancels else [build_id])

    async def test_by_way_of_another_server(
        self, hosting: Hosting, scripted: Scripted, a_request: Request, store: LocalStore, tmp_path: Path
    ) -> None:
        builder = scripted(forever)
        async with (
            hosting(builder) as host,
            served(host, store, tmp_path / "first") as url,
            host_at(url) as far,
            served(far, store, tmp_path / "second") as url,
            connected(parse_url(url, CHANNEL_OPTIONS)) as peer,
        ):
            with pytest.raises(grpc.aio.AioRpcError, match="Deadline"):
                await BuildServiceStub(peer.channel).DoBuild(to_request(a_request()), timeout=0.3)
            while (await host.list(running_only=True))[0]:
                await asyncio.sleep(0.05)
            assert builder.started == 1


class TestConnecting:
    async def test_nobody_is_there(self, store: LocalStore, tmp_path: Path) -> None:
        url = f"grpc+unix://{tmp_path}/nobody.sock"
        with pytest.raises(PeerUnreachable, match=re.escape(url) + ".*kiln serve"):
            async with connected_host(parse_url(url, CHANNEL_OPTIONS), store):
                pass

    async def test_a_store_of_another_scheme(
        self, hosting: Hosting, scripted: Scripted, store: LocalStore, tmp_path: Path
    ) -> None:
        other = LocalStore.open(str(tmp_path / "other"), scheme=BLAKE3_DOCUMENTED)
        try:
            async with hosting(scripted()) as host, served(host, store, tmp_path / "sock") as url:
                with pytest.raises(CastoreDiffers, match=r"blake3/doubled.*blake3/documented"):
                    async with connected_host(parse_url(url, CHANNEL_OPTIONS), other):
                        pass
        finally:
            other.close()

    async def test_another_contract(
        self, hosting: Hosting, scripted: Scripted, store: LocalStore, tmp_path: Path
    ) -> None:
        builder = scripted()

        async def capabilities() -> Capabilities:
            return Capabilities(builders=(BuilderInfo(contract="kiln-contract-9"),))

        builder.capabilities = capabilities
        async with hosting(builder) as host, served(host, store, tmp_path / "sock") as url:
            with pytest.raises(ContractDiffers, match="kiln-contract-9"):
                async with connected_host(parse_url(url, CHANNEL_OPTIONS), store):
                    pass


class Snix:
    """DoBuild as a peer has it that knows nothing else; `answer` is the build."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self.answer = answer
        self.cancelled = asyncio.Event()

    def handler(self) -> grpc.GenericRpcHandler:
        async def do_build(data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            request = decode_request(data)
            if list(request.outputs) != sorted(request.outputs):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "outputs not sorted")
            try:
                return to_response(await self.answer(request, context)).SerializeToString()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise

        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]]
        methods = {"DoBuild": grpc.unary_unary_rpc_method_handler(do_build)}
        return grpc.method_handlers_generic_handler("snix.build.v1.BuildService", methods)


class TestAPeerThatKnowsOnlyDoBuild:
    @pytest.fixture
    def far(self, tmp_path: Path) -> Any:
        store = LocalStore.open(str(tmp_path / "far"))
        yield store
        store.close()

    @staticmethod
    @asynccontextmanager
    async def host(
        serve: Serve, store: LocalStore, far: LocalStore, answer: Any
    ) -> AsyncIterator[tuple[BuildHost, Snix]]:
        peer = Snix(answer)
        handlers = [peer.handler(), *castore_handlers(Castore(far.blobs, far.directories))]
        async with serve(handlers) as url, connected_host(parse_url(url, CHANNEL_OPTIONS), store) as (host, castore):
            assert castore is None
            yield host, peer

    async def test_inputs_go_there_and_outputs_come_back(
        self, serve: Serve, store: LocalStore, far: LocalStore, a_request: Request
    ) -> None:
        node = await store.add_blob(b"input")

        async def answer(request: BuildRequest, _context: Any) -> list[Output]:
            assert await far.blobs.has(node.digest)
            made = await far.add_blob(b"output")
            return [Output(made if path == "build/b" else SymlinkNode(path.encode())) for path in request.outputs]

        asked = replace(
            a_request(),
            inputs=((b"in", node),),
            inputs_dir="inputs",
            scratch_paths=("build",),
            outputs=("build/b", "build/a"),
        )
        async with self.host(serve, store, far, answer) as (host, _):
            build_id = await host.submit(asked, BuildOptions())
            events = await watched(host, build_id)
        assert isinstance(events[0].body, Accepted)
        last = events[-1].body
        assert isinstance(last, Finished)
        assert isinstance(last.verdict, Success)
        made, link = (output.node for output in last.verdict.outputs)
        assert link == SymlinkNode(b"build/a")
        assert not isinstance(made, SymlinkNode)
        assert await store.blobs.has(made.digest)
        assert not last.verdict.cacheable

    @pytest.mark.parametrize(
        ("code", "text", "reason"),
        [
            ("INTERNAL", "nonzero exit code", Reason.COMMAND_FAILED),
            ("INTERNAL", "Not all outputs produced", Reason.OUTPUT_MISSING),
            ("INTERNAL", "failed to produce bundle", Reason.INFRASTRUCTURE),
            ("INVALID_ARGUMENT", "invalid build constraints: invalid system", Reason.INVALID_REQUEST),
            ("UNAVAILABLE", "busy", Reason.INFRASTRUCTURE),
            ("PERMISSION_DENIED", "no", Reason.DENIED),
        ],
    )
    async def test_its_statuses_are_failures(
        self, serve: Serve, store: LocalStore, far: LocalStore, a_request: Request, code: str, text: str, reason: Reason
    ) -> None:
        async def answer(_request: BuildRequest, context: Any) -> list[Output]:
            await context.abort(grpc.StatusCode[code], text)
            return []

        async with self.host(serve, store, far, answer) as (host, _):
            failure = await self.failure(host, a_request())
        assert failure.reason is reason
        assert text in failure.message

    async def test_a_failure_in_the_details_is_taken_as_it_is(
        self, serve: Serve, store: LocalStore, far: LocalStore, a_request: Request
    ) -> None:
        told = Failure(Reason.RESOURCES_EXHAUSTED, "out of memory", detail=LimitDetail("memory", 1, 2), log_tail=b"x")

        async def answer(_request: BuildRequest, context: Any) -> list[Output]:
            status = unary_status(told)
            details = (("grpc-status-details-bin", status.details),)
            await context.abort(grpc.StatusCode[status.code], status.message, details)
            return []

        async with self.host(serve, store, far, answer) as (host, _):
            assert await self.failure(host, a_request()) == told

    async def test_missing_inputs_are_named(
        self, serve: Serve, store: LocalStore, far: LocalStore, a_request: Request
    ) -> None:
        async def answer(_request: BuildRequest, _context: Any) -> list[Output]:
            raise AssertionError

        nowhere = DirectoryNode(Digest(bytes(32)), 0)
        asked = replace(a_request(), inputs=((b"in", nowhere),), inputs_dir="inputs")
        async with self.host(serve, store, far, answer) as (host, _):
            failure = await self.failure(host, asked)
        assert failure.reason is Reason.MISSING_INPUT
        assert failure.detail == MissingDetail(directories=(nowhere.digest,))

    async def test_a_cancelled_build_ends_there_too(
        self, serve: Serve, store: LocalStore, far: LocalStore, a_request: Request
    ) -> None:
        begun = asyncio.Event()

        async def answer(_request: BuildRequest, _context: Any) -> list[Output]:
            begun.set()
            await asyncio.Event().wait()
            return []

        async with self.host(serve, store, far, answer) as (host, peer):
            build_id = await host.submit(a_request(), BuildOptions())
            await begun.wait()
            await host.cancel(build_id, by="a test")
            await peer.cancelled.wait()
            assert (await self.failure(host, a_request(), wall_s=0.1)).reason is Reason.TIMED_OUT

    async def test_other_outputs_than_asked_for_are_an_error(
        self, serve: Serve, store: LocalStore, far: LocalStore, a_request: Request
    ) -> None:
        async def answer(_request: BuildRequest, _context: Any) -> list[Output]:
            return [Output(SymlinkNode(b"x"))]

        async with self.host(serve, store, far, answer) as (host, _):
            failure = await self.failure(host, a_request())
        assert failure.reason is Reason.INFRASTRUCTURE
        assert "1 outputs for 0" in failure.message

    async def test_it_cannot_serve_a_store_of_another_scheme(self, serve: Serve, tmp_path: Path) -> None:
        store = LocalStore.open(str(tmp_path / "documented"), scheme=BLAKE3_DOCUMENTED)
        try:
            async with serve([]) as url:
                with pytest.raises(PeerLacksMethod):
                    async with connected_host(parse_url(url, CHANNEL_OPTIONS), store):
                        pass
        finally:
            store.close()

    @staticmethod
    async def failure(host: BuildHost, request: BuildRequest, **options: float) -> Failure:
        build_id = await host.submit(request, BuildOptions(**options))  # type: ignore[arg-type]
        last = (await watched(host, build_id))[-1].body
        assert isinstance(last, Finished)
        assert isinstance(last.verdict, Failure)
        return last.verdict
