"""Whole processes, from start to end, as a shell would run them."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from bench.measure import Against, Benchmark, Side, blocking, timed
from bench.nix_side import Nix, nix_is_there
from bench.scripts import new_scripts
from bench.surroundings import Surroundings

_PYTHON, _NIX = "python -c pass", "nix-store --realise, built before"


def _run(count: int, *argv: str) -> Callable[[], Awaitable[float]]:
    # An installed kiln has its bytecode; here the round that does not count writes it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def once() -> float:
        with timed() as watch:
            for _ in range(count):
                subprocess.run(argv, check=True, capture_output=True, env=environment)
        return watch.seconds / count

    return blocking(once)


@asynccontextmanager
async def _open(surroundings: Surroundings) -> AsyncIterator[Sequence[Side]]:
    count = surroundings.scale.starts
    sides = [Side(_PYTHON, _run(count, sys.executable, "-c", "pass"))]
    if nix_is_there():
        nix = Nix(surroundings.fresh("nix"))
        derivations = nix.independent(new_scripts(1, "$out"))

        def realised() -> float:
            with timed() as watch:
                for _ in range(count):
                    nix.realise(derivations, jobs=1)
            return watch.seconds / count

        sides.append(Side(_NIX, blocking(realised)))
    kiln = (sys.executable, "-m", "kiln")
    run = (
        *kiln,
        "--store",
        surroundings.fresh("kiln"),
        "run",
        "--sh",
        "-o",
        "out",
        "--",
        "/bin/sh",
        "-c",
        "echo > out",
    )
    sides += [
        Side("kiln --version", _run(count, *kiln, "--version"), (Against(_PYTHON),)),
        Side("kiln run, built before", _run(count, *run), (Against(_NIX),)),
    ]
    yield sides


START_UP = Benchmark("Whole processes", "ms", 1e-3, _open)
