"""A real builder over a real store: bubblewrap, busybox, control groups. No test here fakes any of them."""

import dataclasses
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kiln.build.events import BuildEvent, Failure, Finished, Log, Output, Stream, Success
from kiln.build.model import BuildOptions, BuildRequest, Constraints
from kiln.builders.sandboxed import SandboxedBuilder
from kiln.castore.local.store import LocalStore
from kiln.castore.model import FileNode, Node
from kiln.sandbox.bwrap import Bwrap
from kiln.sandbox.host import Host, detect_host
from kiln.sandbox.launcher import Launcher
from kiln.sandbox.policy import GIB, Policy
from kiln.sandbox.uids import UidRange


@dataclass(frozen=True)
class Outcome:
    """Everything one build said."""

    events: list[BuildEvent] = field(default_factory=list)

    @property
    def finished(self) -> Finished:
        last = self.events[-1]
        assert isinstance(last, Finished)
        assert sum(isinstance(event, Finished) for event in self.events) == 1
        return last

    @property
    def log(self) -> str:
        return self.bytes_of(Stream.OUTPUT).decode()

    def bytes_of(self, stream: Stream) -> bytes:
        return b"".join(e.data for e in self.events if isinstance(e, Log) and e.stream is stream)

    @property
    def outputs(self) -> tuple[Output, ...]:
        assert isinstance(self.finished.verdict, Success), self.finished.verdict
        return self.finished.verdict.outputs

    @property
    def failure(self) -> Failure:
        assert isinstance(self.finished.verdict, Failure), self.finished.verdict
        return self.finished.verdict


@dataclass
class Bench:
    """A builder and what stands around it; `run` builds a shell script in /build, where inputs lie in /inputs."""

    builder: SandboxedBuilder
    store: LocalStore
    launcher: Launcher
    host: Host
    policy: Policy
    shell: FileNode

    def request(self, script: str, **fields: object) -> BuildRequest:
        constraints = fields.pop("constraints", Constraints(system=self.host.systems[0], provide_bin_sh=True))
        defaults: dict[str, object] = {
            "command": ("/bin/sh", "-c", script),
            "working_dir": "build",
            "scratch_paths": ("build",),
            "inputs_dir": "inputs",
            "constraints": constraints,
        }
        return BuildRequest(**{**defaults, **fields})  # type: ignore[arg-type]

    async def build(self, request: BuildRequest, options: BuildOptions | None = None) -> Outcome:
        outcome = Outcome()
        async with self.builder.build(request, options or BuildOptions()) as events:
            async for event in events:
                outcome.events.append(event)
        return outcome

    async def run(self, script: str, options: BuildOptions | None = None, **fields: object) -> Outcome:
        return await self.build(self.request(script, **fields), options)

    async def imported(self, path: Path) -> Node:
        return (await self.store.ingest(str(path))).node

    async def exported(self, node: Node, destination: Path) -> Path:
        await self.store.export(node, str(destination))
        return destination


MakeBench = Callable[..., Awaitable[Bench]]


@pytest.fixture
async def make_bench(tmp_path: Path) -> AsyncIterator[MakeBench]:
    """Makes builders with a policy of one's own; what they leave running or on disk at the end is an error."""
    made: list[Bench] = []

    async def make(policy: Policy | None = None) -> Bench:
        bwrap, busybox = shutil.which("bwrap"), shutil.which("busybox")
        assert bwrap is not None, "bubblewrap is not installed: run ./dev setup"
        assert busybox is not None, "busybox-static is not installed: run ./dev setup"
        store = LocalStore.open(str(tmp_path / f"store{len(made)}"))
        shell = dataclasses.replace(await store.add_blob(Path(busybox).read_bytes()), executable=True)
        launcher = Launcher()
        host = detect_host()
        policy = policy or Policy(memory_bytes=4 * GIB, keep_on_failure_s=0)
        uids = UidRange(lock_dir=str(tmp_path / "uids")) if os.geteuid() == 0 else None
        builder = SandboxedBuilder(
            Bwrap(bwrap, host.network_helper), store, launcher, policy, host, uids=uids, shell=shell, url="bwrap://", store_id=tmp_path.name
        )
        made.append(Bench(builder, store, launcher, host, policy, shell))
        return made[-1]

    yield make
    for bench in made:
        await bench.builder.aclose()
        await bench.launcher.close()
        bench.store.close()


@pytest.fixture
async def bench(make_bench: MakeBench) -> Bench:
    """A builder under the default policy."""
    return await make_bench()
