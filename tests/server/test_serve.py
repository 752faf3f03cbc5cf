"""Where a server listens, whom it takes, how it ends; and `kiln serve` itself, with real builds."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kiln.aio import Emit
from kiln.build.events import BuildEvent, Finished, Success
from kiln.build.model import BuildRequest
from kiln.builders.grpc import GrpcHost
from kiln.castore.local.store import LocalStore
from kiln.castore.model import BLAKE3_DOCUMENTED
from kiln.errors import Denied, Usage
from kiln.protos.kiln.build.v1 import build_pb2
from kiln.protos.kiln.build.v1.build_pb2_grpc import BuildServiceStub
from kiln.protos.snix.build.protos import build_pb2 as snix
from kiln.protos.snix.build.protos.rpc_build_pb2_grpc import BuildServiceStub as SnixStub
from kiln.rpc.channel import connected
from kiln.rpc.status import PeerUnreachable
from kiln.rpc.url import CHANNEL_OPTIONS, UrlInvalid, parse_url
from kiln.sandbox.cgroups import groups_of_store
from kiln.sandbox.host import detect_host
from kiln.server.compose import id_of
from kiln.server.listen import CannotListen, OpenToAll, Security, Tls, default_listen, parse_listen

ServeBuilds = Callable[..., AbstractAsyncContextManager[Any]]
Code = grpc.StatusCode
TLS = Path(__file__).parents[1] / "rpc" / "tls"


def request(*command: str, **fields: Any) -> snix.BuildRequest:
    defaults: dict[str, Any] = {"working_dir": "build", "scratch_paths": ["build"]}
    return snix.BuildRequest(command_args=command or ["/x"], **{**defaults, **fields})


def submission(*command: str, **fields: Any) -> build_pb2.Submission:
    return build_pb2.Submission(request=request(*command, **fields))


async def forever(_request: BuildRequest, _emit: Emit[BuildEvent]) -> None:
    await asyncio.Event().wait()


async def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


class TestAddresses:
    @pytest.mark.parametrize("text", ["unix:///run/k.sock", "unix:/run/k.sock", "grpc+unix:///run/k.sock"])
    def test_a_socket(self, text: str) -> None:
        assert parse_listen(text, Security()).path == "/run/k.sock"

    @pytest.mark.parametrize(
        "text",
        [
            "unix://host/k.sock",
            "unix:k.sock",
            "unix:///",
            "ftp://x",
            "http://x",
            "http://x:y",
            "http://x:1/p",
            "http://x:65536",
            "/x",
        ],
    )
    def test_what_is_none(self, text: str) -> None:
        with pytest.raises(UrlInvalid):
            parse_listen(text, Security(insecure_tcp=True))

    def test_tcp_is_open_to_nobody_unasked(self) -> None:
        tls = Tls("cert", "key")
        for text, security in [("http://localhost:1", Security(tls, "token")), ("https://localhost:1", Security(tls))]:
            with pytest.raises(OpenToAll, match="--insecure-tcp"):
                parse_listen(text, security)
        with pytest.raises(Usage, match="--tls-cert"):
            parse_listen("https://localhost:1", Security(insecure_tcp=True))
        for security in (Security(tls, "token"), Security(Tls("cert", "key", "ca")), Security(tls, insecure_tcp=True)):
            parse_listen("https://localhost:1", security)

    def test_the_default_is_the_users_own(self) -> None:
        assert default_listen({"XDG_RUNTIME_DIR": "/run/user/7"}) == "unix:///run/user/7/kiln/kiln.sock"
        assert default_listen({}) == "unix:///run/kiln/kiln.sock"


class TestASocket:
    async def test_is_its_owners_only_and_goes_with_the_server(self, serve_builds: ServeBuilds, tmp_path: Path) -> None:
        async with serve_builds() as served:
            found = (tmp_path / "kiln.sock").lstat()
            assert stat.S_ISSOCK(found.st_mode)
            assert stat.S_IMODE(found.st_mode) == 0o600
            assert served.server.urls == [f"grpc+unix://{tmp_path}/kiln.sock"]
            assert sorted(os.listdir(tmp_path)) == ["kiln.sock", "store"]  # Nothing is left of its first name.
        assert os.listdir(tmp_path) == ["store"]

    async def test_answers_from_its_first_moment(self, serve_builds: ServeBuilds, tmp_path: Path) -> None:
        async def first_answer() -> build_pb2.CapabilitiesReply:
            while not (tmp_path / "kiln.sock").exists():
                await asyncio.sleep(0)
            async with grpc.aio.insecure_channel(f"unix:{tmp_path}/kiln.sock") as channel:
                return await BuildServiceStub(channel).Capabilities(build_pb2.CapabilitiesRequest())

        answering = asyncio.create_task(first_answer())
        async with serve_builds():
            assert (await answering).castore_scheme

    async def test_a_stale_one_is_replaced(self, serve_builds: ServeBuilds, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(tmp_path / "kiln.sock"))
            stale.listen()
        assert (tmp_path / "kiln.sock").is_socket()
        async with serve_builds() as served:
            await served.kiln.Capabilities(build_pb2.CapabilitiesRequest())

    async def test_a_live_one_is_left_alone(self, serve_builds: ServeBuilds, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as live:
            live.bind(str(tmp_path / "kiln.sock"))
            live.listen()
            inode = (tmp_path / "kiln.sock").stat().st_ino
            with pytest.raises(CannotListen, match="answers there already"):
                async with serve_builds():
                    pass
            assert (tmp_path / "kiln.sock").stat().st_ino == inode
        assert sorted(os.listdir(tmp_path)) == ["kiln.sock", "store"]

    async def test_a_file_is_left_alone(self, serve_builds: ServeBuilds, tmp_path: Path) -> None:
        (tmp_path / "kiln.sock").write_text("dear")
        with pytest.raises(CannotListen, match="no socket"):
            async with serve_builds():
                pass
        assert (tmp_path / "kiln.sock").read_text() == "dear"

    async def test_another_servers_is_not_removed(self, serve_builds: ServeBuilds, tmp_path: Path) -> None:
        async with serve_builds():
            (tmp_path / "kiln.sock").unlink()
            (tmp_path / "kiln.sock").write_text("another's")
        assert (tmp_path / "kiln.sock").read_text() == "another's"

    async def test_its_directory_is_made(self, serve_builds: ServeBuilds, tmp_path: Path) -> None:
        async with serve_builds(addresses=(f"unix://{tmp_path}/a/b/k.sock",)):
            assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700

    async def test_a_path_that_is_too_long_is_refused(self, serve_builds: ServeBuilds, tmp_path: Path) -> None:
        with pytest.raises(UrlInvalid, match="107 bytes"):
            async with serve_builds(addresses=(f"unix://{tmp_path}/{'x' * 100}",)):
                pass


class TestTcp:
    @staticmethod
    async def ask(url: str, options: str = "") -> str:
        async with connected(parse_url(url + options, CHANNEL_OPTIONS)) as peer, GrpcHost(peer) as host:
            return (await host.capabilities()).castore_scheme

    async def test_plain_where_allowed(self, serve_builds: ServeBuilds) -> None:
        async with serve_builds(addresses=("http://127.0.0.1:0",)) as served:
            url = served.server.urls[0]
            assert await self.ask(url) == "blake3/doubled"
            nobodys = "http://192.0.2.1:1"  # RFC 5737.
            for address, why in {url.removeprefix("grpc+"): "in use", nobodys: "assign"}.items():
                with pytest.raises(CannotListen, match=why):
                    async with serve_builds(addresses=(address,)):
                        pass

    async def test_certificates_of_both_sides(self, serve_builds: ServeBuilds) -> None:
        tls = Tls(str(TLS / "server.pem"), str(TLS / "server.key"), str(TLS / "ca.pem"))
        async with serve_builds(addresses=("https://127.0.0.1:0",), security=Security(tls)) as served:
            url = f"{served.server.urls[0]}?tls-ca-cert-path={TLS}/ca.pem"
            pair = f"&tls-client-cert-path={TLS}/client.pem&tls-client-key-path={TLS}/client.key"
            assert await self.ask(url, pair) == "blake3/doubled"
            with pytest.raises(PeerUnreachable):
                await self.ask(url)

    async def test_a_token(self, serve_builds: ServeBuilds, tmp_path: Path) -> None:
        token, wrong = tmp_path / "token", tmp_path / "wrong"
        token.write_text("secret\n")
        wrong.write_text("guess\n")
        tls = Tls(str(TLS / "server.pem"), str(TLS / "server.key"))
        security = Security(tls, token_file=str(token))
        addresses = ("https://127.0.0.1:0", f"unix://{tmp_path}/kiln.sock")
        async with serve_builds(addresses=addresses, security=security) as served:
            url = f"{served.server.urls[0]}?tls-ca-cert-path={TLS}/ca.pem"
            assert await self.ask(url, f"&token-file={token}") == "blake3/doubled"
            for options in ("", f"&token-file={wrong}"):
                with pytest.raises(Denied, match="bearer token"):
                    await self.ask(url, options)
            token.write_text("guess\n")  # Rotated.
            assert await self.ask(url, f"&token-file={wrong}") == "blake3/doubled"
            token.write_text("")  # An empty one is nobody's.
            with pytest.raises(Denied):
                await self.ask(url, f"&token-file={token}")
            assert await self.ask(served.server.urls[1]) == "blake3/doubled"  # Who can open the socket needs none.


class TestServices:
    @pytest.mark.parametrize(("scheme", "package"), [(None, "snix"), (BLAKE3_DOCUMENTED, "tvix")])
    async def test_health_and_reflection_name_them(self, serve_builds: ServeBuilds, scheme: Any, package: str) -> None:
        async with serve_builds(**({"scheme": scheme} if scheme else {})) as served:
            asked = reflection_pb2.ServerReflectionRequest(list_services="")
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(served.channel)
            (answer,) = [answer async for answer in stub.ServerReflectionInfo(iter([asked]))]
            names = {service.name for service in answer.list_services_response.service}
            assert names == {
                "grpc.reflection.v1alpha.ServerReflection",
                "kiln.build.v1.BuildService",
                f"{package}.build.v1.BuildService",
                f"{package}.castore.v1.BlobService",
                f"{package}.castore.v1.DirectoryService",
            }
            for name in names:
                about = reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)
                (answer,) = [answer async for answer in stub.ServerReflectionInfo(iter([about]))]
                assert answer.file_descriptor_response.file_descriptor_proto
            health: Any = health_pb2_grpc.HealthStub(served.channel)
            for name in ("", *(name for name in names if "reflection" not in name)):
                reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
                assert reply.status == health_pb2.HealthCheckResponse.SERVING

    async def test_a_full_server_says_so_and_can_still_be_relieved(self, serve_builds: ServeBuilds) -> None:
        async with serve_builds(forever, calls_max=2) as served:
            streams = [served.kiln.Build(submission(str(number))) for number in range(2)]
            ids = [(await stream.read()).build_id for stream in streams]
            with pytest.raises(grpc.aio.AioRpcError, match="2 calls are open") as caught:
                await served.kiln.Build(submission()).read()
            assert caught.value.code() is Code.RESOURCE_EXHAUSTED
            assert await code_of(SnixStub(served.channel).DoBuild(request())) is Code.RESOURCE_EXHAUSTED
            await served.kiln.Cancel(build_pb2.CancelRequest(build_id=ids[0]))
            while await streams[0].read() is not grpc.aio.EOF:
                pass
            assert (await served.kiln.Build(submission()).read()).WhichOneof("event") == "accepted"

    async def test_a_bug_is_told_to_the_log_only(
        self, serve_builds: ServeBuilds, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def surprise() -> None:
            raise ZeroDivisionError("at /secret/path")

        async with serve_builds() as served:
            served.host.capabilities = surprise
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await served.kiln.Capabilities(build_pb2.CapabilitiesRequest())
        assert (caught.value.code(), "secret" in (caught.value.details() or "")) == (Code.INTERNAL, False)
        assert "ZeroDivisionError" in caplog.text


class TestDraining:
    async def test_builds_end_and_no_more_are_taken(self, serve_builds: ServeBuilds) -> None:
        go = asyncio.Event()

        async def when_told(_request: BuildRequest, emit: Emit[BuildEvent]) -> None:
            await go.wait()
            await emit(Finished(Success(())))

        async with serve_builds(when_told) as served:
            stream = served.kiln.Build(submission())
            build_id = (await stream.read()).build_id
            draining = asyncio.create_task(served.server.drain(grace_s=60, hurry=asyncio.Event()))
            health: Any = health_pb2_grpc.HealthStub(served.channel)
            watching = health.Watch(health_pb2.HealthCheckRequest())
            while (await watching.read()).status != health_pb2.HealthCheckResponse.NOT_SERVING:
                pass
            watching.cancel()
            assert await code_of(served.kiln.Build(submission("/y")).read()) is Code.UNAVAILABLE
            assert await code_of(SnixStub(served.channel).DoBuild(request())) is Code.UNAVAILABLE
            assert (await served.kiln.Get(build_pb2.GetRequest(build_id=build_id))).build_id == build_id
            go.set()
            while (last := await stream.read()) is not grpc.aio.EOF:
                verdict = last
            assert verdict.finished.HasField("success")
            # Who waited for the build has a moment to fetch what it made.
            assert not draining.done()
            await served.kiln.Get(build_pb2.GetRequest(build_id=build_id))
            await draining

    @pytest.mark.parametrize("why", ["grace", "hurry"])
    async def test_what_does_not_end_is_cancelled(self, serve_builds: ServeBuilds, why: str) -> None:
        hurry = asyncio.Event()
        async with serve_builds(forever) as served:
            stream = served.kiln.Build(submission())
            await stream.read()
            grace_s = 0.1 if why == "grace" else 60
            draining = asyncio.create_task(served.server.drain(grace_s=grace_s, hurry=hurry))
            if why == "hurry":
                hurry.set()
            while (last := await stream.read()) is not grpc.aio.EOF:
                verdict = last
            assert verdict.finished.failure.reason == build_pb2.REASON_CANCELLED
            assert "shutting down" in verdict.finished.failure.message
            await draining
            assert served.builder.running == 0


@contextmanager
def kiln_serve(store: Path, at: Path) -> Iterator[subprocess.Popen[str]]:
    """A `kiln serve` that answers at the socket `at`."""
    command = [sys.executable, "-m", "kiln", "--store", str(store), "serve", "--listen", f"unix://{at}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == f"grpc+unix://{at}\n", server.stderr and server.stderr.read()
            yield server
        finally:
            server.kill()


@pytest.fixture
async def channel(tmp_path: Path) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 100)]
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/kiln.sock", options=options) as channel:
        yield channel


def shell(script: str, **fields: Any) -> snix.BuildRequest:
    constraints = snix.BuildRequest.BuildConstraints(system=detect_host().systems[0], provide_bin_sh=True)
    return request("/bin/sh", "-c", script, **{"constraints": constraints, **fields})


def processes_with(marker: str) -> list[str]:
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if marker.encode() in command:
                found.append(f"{pid}: {command!r}")
    return found


async def gone(marker: str) -> bool:
    """Whether no process has `marker` in its arguments, or will not for long."""
    for _ in range(100):
        if not processes_with(marker):
            return True
        await asyncio.sleep(0.1)
    return False


def assert_nothing_left(path: Path) -> None:
    """What no build may leave, however it ended: work directories, temporary files, mounts, control groups."""
    assert os.listdir(path / "builds") == []
    assert os.listdir(path / "tmp") == []
    assert str(path) not in Path("/proc/self/mountinfo").read_text()
    store = LocalStore.open(str(path))
    try:
        assert list(groups_of_store(detect_host().hierarchies, id_of(store))) == []
    finally:
        store.close()
    fsck = [sys.executable, "-m", "kiln", "--store", str(path), "store", "fsck"]
    subprocess.run(fsck, check=True, capture_output=True)


async def begun(stub: Any, asked: snix.BuildRequest) -> tuple[Any, str, int]:
    """A build that has written `begun`: its events to come, its id, and the last event's number."""
    stream = stub.Build(build_pb2.Submission(request=asked))
    while True:
        event = await stream.read()
        assert event is not grpc.aio.EOF
        if event.HasField("log"):
            assert event.log.data == b"begun\n"
            return stream, event.build_id, event.seq


class TestKilnServe:
    async def test_killed_in_mid_build_and_started_again(self, tmp_path: Path, channel: grpc.aio.Channel) -> None:
        marker = f"0.{uuid.uuid4().int}"
        stub: Any = BuildServiceStub(channel)
        asked = shell(f"echo begun; sleep 1000{marker} & setsid sleep 1000{marker} & sleep 1000{marker}; wait")
        with kiln_serve(tmp_path / "store", tmp_path / "kiln.sock") as server:
            stream, build_id, seq = await begun(stub, asked)
            assert processes_with(marker)
            server.send_signal(signal.SIGKILL)
            server.wait()
            assert await code_of(stream.read()) is Code.UNAVAILABLE
        with kiln_serve(tmp_path / "store", tmp_path / "kiln.sock") as server:
            assert processes_with(marker) == []
            async with grpc.aio.insecure_channel(f"unix:{tmp_path}/kiln.sock") as other:
                watch = build_pb2.WatchRequest(build_id=build_id, after_seq=seq)
                rest = [event async for event in BuildServiceStub(other).Watch(watch)]
            assert rest[0].seq == seq + 1
            assert rest[-1].finished.failure.reason == build_pb2.REASON_INFRASTRUCTURE
            assert rest[-1].finished.failure.retry == build_pb2.RETRY_ELSEWHERE
            log = [message async for message in stub.ReadLog(build_pb2.ReadLogRequest(build_id=build_id, offset=2))]
            assert b"".join(message.data for message in log) == b"gun\n"
            server.send_signal(signal.SIGTERM)
            assert server.wait() == 0
        assert_nothing_left(tmp_path / "store")

    async def test_clients_that_go_away_wedge_nothing(self, tmp_path: Path, channel: grpc.aio.Channel) -> None:
        marker = f"0.{uuid.uuid4().int}"
        with kiln_serve(tmp_path / "store", tmp_path / "kiln.sock") as server:
            await SnixStub(channel).DoBuild(shell("true"))
            calls = [SnixStub(channel).DoBuild(shell(f"sleep 1000{marker}{n}"), timeout=0.15) for n in range(4)]
            assert await asyncio.gather(*map(code_of, calls)) == [Code.DEADLINE_EXCEEDED] * 4
            async with asyncio.timeout(60):
                await SnixStub(channel).DoBuild(shell("echo x > x", outputs=["build/x"]))
                async with grpc.aio.insecure_channel(f"unix:{tmp_path}/kiln.sock") as other:
                    await BuildServiceStub(other).Capabilities(build_pb2.CapabilitiesRequest())
            assert await gone(marker)
            server.send_signal(signal.SIGTERM)
            assert server.wait() == 0
            assert server.stderr is not None
            said = server.stderr.read()
            assert said.count("\n") == 1, said  # That it stops: clients that leave are nothing to tell.
        assert_nothing_left(tmp_path / "store")

    async def test_failures_say_what_is_wrong(self, tmp_path: Path, channel: grpc.aio.Channel) -> None:
        constraints = snix.BuildRequest.BuildConstraints
        missing = {"inputs_dir": "in", "inputs": [{"directory": {"name": b"in", "digest": bytes(32)}}]}
        cases: list[tuple[snix.BuildRequest, Code, str]] = [
            (shell("exit 42"), Code.FAILED_PRECONDITION, "42"),
            (shell("kill -9 $$"), Code.FAILED_PRECONDITION, "SIGKILL"),
            (shell("true", outputs=["build/x"]), Code.FAILED_PRECONDITION, "build/x"),
            (shell("mkfifo x", outputs=["build/x"]), Code.FAILED_PRECONDITION, "fifo"),
            (shell("true", **missing), Code.FAILED_PRECONDITION, "not in the store"),
            (request(constraints=constraints(system="sparc-none")), Code.FAILED_PRECONDITION, "sparc-none"),
            (request(constraints=constraints(system="x", min_memory=1 << 50)), Code.FAILED_PRECONDITION, "min_memory"),
            (request(constraints=constraints(system="x", network_access=True)), Code.PERMISSION_DENIED, "network"),
            (shell("true", working_dir="other"), Code.INVALID_ARGUMENT, "working_dir"),
        ]
        with kiln_serve(tmp_path / "store", tmp_path / "kiln.sock"):
            for asked, code, words in cases:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await SnixStub(channel).DoBuild(asked)
                assert (caught.value.code(), words in (caught.value.details() or "")) == (code, True), caught.value

    async def test_asked_to_stop_it_lets_builds_end(self, tmp_path: Path, channel: grpc.aio.Channel) -> None:
        with kiln_serve(tmp_path / "store", tmp_path / "kiln.sock") as server:
            stream, _, _ = await begun(BuildServiceStub(channel), shell("echo begun; sleep 1; echo ended"))
            server.send_signal(signal.SIGTERM)
            said = []
            while (event := await stream.read()) is not grpc.aio.EOF:
                said.append(event)
            assert said[-1].finished.HasField("success")
            assert b"ended\n" in [event.log.data for event in said]
            assert server.wait() == 0
            assert server.stderr is not None
            assert "stopping" in server.stderr.read()
        assert not (tmp_path / "kiln.sock").exists()
        assert_nothing_left(tmp_path / "store")

    async def test_asked_twice_it_cancels_them(self, tmp_path: Path, channel: grpc.aio.Channel) -> None:
        marker = f"0.{uuid.uuid4().int}"
        with kiln_serve(tmp_path / "store", tmp_path / "kiln.sock") as server:
            stream, _, _ = await begun(
                BuildServiceStub(channel), shell(f"trap '' TERM; echo begun; sleep 1000{marker}")
            )
            assert server.stderr is not None
            server.send_signal(signal.SIGINT)
            assert "stopping" in server.stderr.readline()
            server.send_signal(signal.SIGTERM)
            said = []
            while (event := await stream.read()) is not grpc.aio.EOF:
                said.append(event)
            assert said[-1].finished.failure.reason == build_pb2.REASON_CANCELLED
            assert server.wait() == 0
            assert processes_with(marker) == []
        assert_nothing_left(tmp_path / "store")

    def test_the_command_line_builds_there(self, tmp_path: Path) -> None:
        (tmp_path / "input").write_text("from here\n")
        url = f"grpc+unix://{tmp_path}/kiln.sock"
        kiln = [sys.executable, "-m", "kiln", "--store", str(tmp_path / "near"), "--builder", url]
        with kiln_serve(tmp_path / "store", tmp_path / "kiln.sock"):
            run = [*kiln, "run", "--json", "--sh", "-i", f"in={tmp_path}/input", "-o", "build/out", "--export"]
            run += [str(tmp_path / "results"), "--", "/bin/sh", "-c", "cat /inputs/in > out; echo told"]
            done = subprocess.run(run, capture_output=True, text=True, check=True)
            assert (tmp_path / "results" / "build" / "out").read_text() == "from here\n"
            build_id = json.loads(done.stdout)["build_id"]
            log = subprocess.run([*kiln, "log", "--raw", build_id], capture_output=True, text=True, check=True)
            assert log.stdout == "told\n"
        gone = subprocess.run(run, capture_output=True, text=True, check=False)
        assert gone.returncode == 5
        assert url in gone.stderr
        assert "Traceback" not in gone.stderr
