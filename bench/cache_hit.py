"""A build that was run before: what the action cache takes to say so."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from bench.kiln_side import Kiln, kiln_here, kiln_served
from bench.measure import Against, Benchmark, Side, timed
from bench.surroundings import Surroundings
from kiln.build.model import BuildOptions

_HERE, _SERVED = "kiln", "kiln over gRPC"


def _hits(kiln: Kiln, count: int) -> Callable[[], Awaitable[float]]:
    async def once() -> float:
        request, options = kiln.request("echo the same > out"), BuildOptions()
        await kiln.build(request, options)  # In the first round it builds.
        with timed() as watch:
            for _ in range(count):
                success = await kiln.build(request, options)
                assert success.cached is not None
        return watch.seconds / count

    return once


@asynccontextmanager
async def _open(surroundings: Surroundings) -> AsyncIterator[Sequence[Side]]:
    count = surroundings.scale.builds * 4
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(kiln_here(surroundings.fresh("here")))
        served = await stack.enter_async_context(kiln_served(surroundings.fresh("served")))
        yield [Side(_HERE, _hits(here, count)), Side(_SERVED, _hits(served, count), (Against(_HERE),))]


CACHE_HIT = Benchmark("A hit in the action cache, submitted and followed to its end", "ms a build", 1e-3, _open)
