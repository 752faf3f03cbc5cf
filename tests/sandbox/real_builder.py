"""A real builder over a real store: bubblewrap, busybox, control groups. No test here fakes any of them."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from kiln.build.events import BuildEvent, Failure, Finished, Log, Output, Stream, Success
from kiln.build.model import BuildOptions, BuildRequest, Constraints
from kiln.builders.sandboxed import SandboxedBuilder
from kiln.castore.local.store import LocalStore
from kiln.castore.model import FileNode, Node
from kiln.sandbox.host import Host
from kiln.sandbox.launcher import Launcher
from kiln.sandbox.policy import Policy


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
    store_id: str

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
