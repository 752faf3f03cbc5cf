"""A build that writes much, and those who follow it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from bench.bwrap_side import Bwrap
from bench.kiln_side import RUN_ANEW, Kiln, kiln_here, kiln_served
from bench.measure import Against, Benchmark, Side, blocking, timed
from bench.surroundings import Surroundings
from kiln.build.events import Log

_FOLLOWERS = 10
_MIB = 1 << 20
_BWRAP = "bwrap into a pipe"


@dataclass(frozen=True, slots=True)
class _Writing:
    """`size` bytes through whatever is in between."""

    size: int

    @property
    def script(self) -> str:
        return f"yes 'one line of a log, neither long nor short, as compilers write them' | head -c {self.size}"

    def by_bwrap(self, bwrap: Bwrap) -> float:
        with timed() as watch:
            assert len(bwrap.run(self.script)) == self.size
        return self._a_mib(watch.seconds)

    async def by_kiln(self, kiln: Kiln, followers: int) -> float:
        with timed() as watch:
            build_id = await kiln.host.submit(kiln.request(f"{self.script}; echo > out"), RUN_ANEW)
            read = await asyncio.gather(*(_follow(kiln, build_id) for _ in range(followers)))
        assert read == [self.size] * followers
        return self._a_mib(watch.seconds)

    def _a_mib(self, seconds: float) -> float:
        return seconds / (self.size / _MIB)


async def _follow(kiln: Kiln, build_id: str) -> int:
    """How many bytes of log one follower saw."""
    async with kiln.host.watch(build_id) as events:
        return sum([len(event.body.data) async for event in events if isinstance(event.body, Log)])


@asynccontextmanager
async def _open(surroundings: Surroundings) -> AsyncIterator[Sequence[Side]]:
    writing = _Writing(surroundings.scale.log_bytes)
    bwrap = Bwrap(surroundings.fresh("bwrap"))

    sides = [Side(_BWRAP, blocking(lambda: writing.by_bwrap(bwrap)))]
    async with AsyncExitStack() as stack:
        for name, opened in (("kiln", kiln_here), ("kiln over gRPC", kiln_served)):
            kiln = await stack.enter_async_context(opened(surroundings.fresh(name.replace(" ", "-"))))
            for followers in (1, _FOLLOWERS):

                async def by_kiln(kiln: Kiln = kiln, followers: int = followers) -> float:
                    return await writing.by_kiln(kiln, followers)

                said = "one follower" if followers == 1 else f"{followers} followers"
                sides.append(Side(f"{name}, {said}", by_kiln, (Against(_BWRAP),)))
        yield sides


LOG = Benchmark("The log of a build", "ms a MiB", 1e-3, _open)
