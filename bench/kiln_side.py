"""kiln as its users have it: a host over the whole graph, in this process or behind a socket."""

import asyncio
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from kiln.build.events import Finished, Success
from kiln.build.model import BuildOptions, BuildRequest, CacheUse, Constraints
from kiln.build.service import BuildHost
from kiln.castore.local.store import LocalStore
from kiln.castore.model import Node
from kiln.server.compose import composed
from kiln.server.config import BuilderConfig

RUN_ANEW = BuildOptions(cache=CacheUse.BYPASS, keep_on_failure_s=0.0)


@dataclass(frozen=True, slots=True)
class Kiln:
    """A host of builds, and the store that it builds from."""

    host: BuildHost
    store: LocalStore
    system: str

    def request(self, script: str, inputs: tuple[tuple[bytes, Node], ...] = ()) -> BuildRequest:
        """`script`, run by the shell in /build, makes /build/out; inputs lie in /inputs."""
        return BuildRequest(
            inputs=inputs,
            command=("/bin/sh", "-c", script),
            working_dir="build",
            scratch_paths=("build",),
            inputs_dir="inputs",
            outputs=("build/out",),
            constraints=Constraints(system=self.system, provide_bin_sh=True),
        )

    async def build(self, request: BuildRequest, options: BuildOptions = RUN_ANEW) -> Success:
        """Submit, follow every event to the verdict, and take it."""
        build_id = await self.host.submit(request, options)
        async with self.host.watch(build_id) as events:
            async for event in events:
                if isinstance(event.body, Finished):
                    assert isinstance(event.body.verdict, Success), event.body.verdict
                    return event.body.verdict
        raise AssertionError("a build without a verdict")


@asynccontextmanager
async def kiln_here(path: str) -> AsyncIterator[Kiln]:
    """kiln in this process, over a store at `path`."""
    store = LocalStore.open(path)
    try:
        async with _connected(BuilderConfig(), store) as kiln:
            yield kiln
    finally:
        store.close()


@asynccontextmanager
async def kiln_served(path: str) -> AsyncIterator[Kiln]:
    """kiln in a process of its own over the store at `path`, and a client here, through a unix socket."""
    # The directory's short name keeps the socket's path within 107 bytes (unix(7)).
    url = f"unix://{path}.socket"
    command = (sys.executable, "-m", "kiln", "--store", path, "serve", "--listen", url)
    server = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)
    try:
        assert server.stdout is not None
        await server.stdout.readline()  # Its URL, once it answers.
        own = LocalStore.open(f"{path}-client")
        try:
            async with _connected(BuilderConfig(url=f"grpc+{url}"), own) as kiln:
                yield kiln
        finally:
            own.close()
    finally:
        with suppress(ProcessLookupError):
            server.terminate()
        _, said = await server.communicate()
        assert server.returncode == 0, said.decode()


@asynccontextmanager
async def _connected(config: BuilderConfig, store: LocalStore) -> AsyncIterator[Kiln]:
    async with composed(config, store) as composition:
        capabilities = await composition.host.capabilities()
        yield Kiln(composition.host, store, capabilities.systems[0])
