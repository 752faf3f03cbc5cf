"""A trivial build with many inputs, whose trees are there already."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import median

from bench.bwrap_side import Bwrap
from bench.kiln_side import Kiln, kiln_here
from bench.measure import Against, Benchmark, Side, blocking, timed
from bench.nix_side import Nix, nix_is_there
from bench.scripts import new_scripts
from bench.surroundings import Surroundings
from kiln.castore.model import Node

_FILES_AN_INPUT = 3
_NO_INPUTS = "kiln, no inputs"


@dataclass(frozen=True, slots=True)
class _Sides:
    """One number of inputs: their names and paths, and the same for Nix (none: it is not there)."""

    kiln: Kiln
    bwrap: Bwrap
    nix: Nix
    builds: int
    paths: Sequence[tuple[str, str]]
    nodes: tuple[tuple[bytes, Node], ...]
    nix_paths: Sequence[str]

    async def by_kiln(self) -> float:
        with timed() as watch:
            for script in new_scripts(self.builds, "out"):
                await self.kiln.build(self.kiln.request(script, self.nodes))
        return watch.seconds / self.builds

    def by_bwrap(self) -> float:
        with timed() as watch:
            for script in new_scripts(self.builds, "out"):
                self.bwrap.run(script, self.paths)
        return watch.seconds / self.builds

    def by_nix(self) -> float:
        derivations = self.nix.independent(new_scripts(self.builds, "$out"), self.nix_paths)
        with timed() as watch:
            self.nix.realise(derivations, jobs=1)
        return watch.seconds / self.builds


def _make_inputs(directory: str, count: int) -> list[tuple[str, str]]:
    """Small trees that all differ: name and path, in order of the names."""
    found = []
    for number in range(count):
        path = f"{directory}/input-{number:04}"
        os.makedirs(path)
        for file in range(_FILES_AN_INPUT):
            with open(f"{path}/{file}", "w", encoding="ascii") as opened:
                opened.write(f"file {file} of {number}\n")
        found.append((os.path.basename(path), path))
    return found


@asynccontextmanager
async def _open(surroundings: Surroundings) -> AsyncIterator[Sequence[Side]]:
    scale = surroundings.scale
    paths = _make_inputs(surroundings.fresh("inputs"), max(scale.inputs))
    bwrap, nix = Bwrap(surroundings.fresh("bwrap")), Nix(surroundings.fresh("nix"))
    nix_paths = nix.add(*(path for _, path in paths)) if nix_is_there() else []
    async with kiln_here(surroundings.fresh("kiln")) as kiln:
        nodes = tuple([(os.fsencode(name), (await kiln.store.ingest(path)).node) for name, path in paths])
        builds = max(1, scale.builds // 10)

        def with_inputs(count: int) -> _Sides:
            return _Sides(kiln, bwrap, nix, builds, paths[:count], nodes[:count], nix_paths[:count])

        sides = [Side(_NO_INPUTS, with_inputs(0).by_kiln)]
        for count in scale.inputs:
            ways = with_inputs(count)
            peers: dict[str, Callable[[], Awaitable[float]]] = {_named("bwrap", count): blocking(ways.by_bwrap)}
            if nix_paths:
                peers[_named("Nix", count)] = blocking(ways.by_nix)
            sides += [Side(name, once) for name, once in peers.items()]
            sides.append(Side(_named("kiln", count), ways.by_kiln, tuple(map(Against, peers))))
        yield sides


def _named(side: str, count: int) -> str:
    return f"{side}, {count} inputs"


def _added(seconds: Mapping[str, Sequence[float]]) -> list[str]:
    without = seconds[_NO_INPUTS]
    return [
        f"{name.partition(', ')[2]} add {median(a - b for a, b in zip(taken, without, strict=True)) * 1e3:.1f} ms "
        "to a build by kiln."
        for name, taken in seconds.items()
        if name.startswith("kiln") and name != _NO_INPUTS
    ]


INPUTS = Benchmark("Inputs that are there already", "ms a build", 1e-3, _open, _added)
