"""A build that does next to nothing, so that all it costs is what is around it."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from bench.bwrap_side import Bwrap
from bench.kiln_side import Kiln, kiln_here, kiln_served
from bench.measure import Against, Benchmark, Side, blocking, ratio, timed
from bench.nix_side import Nix, nix_is_there
from bench.scripts import new_scripts
from bench.surroundings import Surroundings
from kiln.castore.model import Node

_KILN, _KILN_GRPC, _BWRAP, _NIX = "kiln", "kiln over gRPC", "bwrap", "Nix"
_TWO = ", two at a time"


class _KilnSide:
    def __init__(self, kiln: Kiln, count: int) -> None:
        self._kiln = kiln
        self._count = count

    async def chain(self) -> float:
        """Each build reads what the one before made."""
        inputs: tuple[tuple[bytes, Node], ...] = ()
        with timed() as watch:
            for script in new_scripts(self._count, "out"):
                reading = "read x < /inputs/prev; " if inputs else ""
                success = await self._kiln.build(self._kiln.request(reading + script, inputs))
                inputs = ((b"prev", success.outputs[0].node),)
        return watch.seconds / self._count

    async def two_at_a_time(self) -> float:
        scripts = new_scripts(self._count, "out")

        async def work() -> None:
            while scripts:
                await self._kiln.build(self._kiln.request(scripts.pop()))

        with timed() as watch:
            await asyncio.gather(work(), work())
        return watch.seconds / self._count


class _BwrapSide:
    def __init__(self, bwrap: Bwrap, count: int) -> None:
        self._bwrap = bwrap
        self._count = count

    def chain(self) -> float:
        scripts = new_scripts(self._count, "out")
        previous = self._bwrap.file("previous", b"what the build before made\n")
        with timed() as watch:
            for script in scripts:
                self._bwrap.run("read x < /inputs/prev; " + script, [("prev", previous)])
        return watch.seconds / self._count

    def two_at_a_time(self) -> float:
        scripts = new_scripts(self._count, "out")
        with timed() as watch:
            self._bwrap.run_two_at_a_time(scripts)
        return watch.seconds / self._count


class _NixSide:
    def __init__(self, nix: Nix, count: int) -> None:
        self._nix = nix
        self._count = count

    def chain(self) -> float:
        scripts = new_scripts(self._count, "$out")
        reading = ["read x < $prev; " + script for script in scripts[1:]]
        derivations = self._nix.chain([scripts[0], *reading])
        with timed() as watch:
            self._nix.realise(derivations, jobs=1)
        return watch.seconds / self._count

    def two_at_a_time(self) -> float:
        derivations = self._nix.independent(new_scripts(self._count, "$out"))
        with timed() as watch:
            self._nix.realise(derivations, jobs=2)
        return watch.seconds / self._count


@asynccontextmanager
async def _open(surroundings: Surroundings) -> AsyncIterator[Sequence[Side]]:
    count = surroundings.scale.builds
    bwrap = _BwrapSide(Bwrap(surroundings.fresh("bwrap")), count)
    sides = [
        Side(_BWRAP, blocking(bwrap.chain)),
        Side(_BWRAP + _TWO, blocking(bwrap.two_at_a_time), (Against(_BWRAP),)),
    ]
    if nix_is_there():
        nix = _NixSide(Nix(surroundings.fresh("nix")), count)
        sides += [Side(_NIX, blocking(nix.chain)), Side(_NIX + _TWO, blocking(nix.two_at_a_time), (Against(_NIX),))]
    async with AsyncExitStack() as stack:
        for name, opened in ((_KILN, kiln_here), (_KILN_GRPC, kiln_served)):
            kiln = _KilnSide(await stack.enter_async_context(opened(surroundings.fresh(name.replace(" ", "-")))), count)
            sides += [
                Side(name, kiln.chain, (Against(_NIX, 1.2), Against(_BWRAP, 2.0))),
                Side(name + _TWO, kiln.two_at_a_time, (Against(_NIX + _TWO), Against(_BWRAP + _TWO), Against(name))),
            ]
        yield sides


def _gain(seconds: Mapping[str, Sequence[float]]) -> list[str]:
    gains = {name: ratio(seconds[name], seconds[name + _TWO]) for name in (_BWRAP, _KILN, _KILN_GRPC)}
    said = ", ".join(f"{name} {gain:.2f}" for name, gain in gains.items())
    own = ", ".join(f"{name} {gains[name] / gains[_BWRAP]:.2f}" for name in (_KILN, _KILN_GRPC))
    return [f"Gain of two at a time: {said}. Of bwrap's own gain: {own} (aim: at least 0.9)."]


TRIVIAL = Benchmark("A trivial build", "ms a build", 1e-3, _open, _gain)
