"""Sides of a comparison, measured in turns.

The machine is never quiet. So every round runs each side once, a ratio is taken within a round, and what counts is the
median over the rounds: what disturbs one round disturbs all sides of it.
"""

import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from statistics import median

from bench.surroundings import Surroundings


@dataclass(frozen=True, slots=True)
class Against:
    """A side to compare with, by name. `at_most`: the ratio of times that kiln aims at."""

    name: str
    at_most: float | None = None


@dataclass(frozen=True, slots=True)
class Side:
    """One way to do the work. `once` runs one round and returns the seconds that one unit of it took."""

    name: str
    once: Callable[[], Awaitable[float]]
    against: tuple[Against, ...] = ()


def blocking(work: Callable[[], float]) -> Callable[[], Awaitable[float]]:
    """`work` as a round: nobody else needs the event loop meanwhile."""

    async def once() -> float:
        return work()

    return once


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Sides that belong together. `open` makes ready what they need, for as long as the block."""

    title: str
    unit: str
    unit_s: float
    open: Callable[[Surroundings], AbstractAsyncContextManager[Sequence[Side]]]
    remarks: Callable[[Mapping[str, Sequence[float]]], Sequence[str]] = lambda _: ()
    """Sentences from the seconds of each side, by its name and in the order of the rounds."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median, over the rounds, of one side's time in the other's."""

    to: Against
    value: float


@dataclass(frozen=True, slots=True)
class Row:
    """What one side took, in seconds a unit."""

    name: str
    median_s: float
    least_s: float
    ratios: tuple[Ratio, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """One benchmark's rows and remarks."""

    benchmark: Benchmark
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]


async def measured(benchmark: Benchmark, surroundings: Surroundings, *, rounds: int) -> Result:
    """Run all sides in turns: once unmeasured, then `rounds` times."""
    async with benchmark.open(surroundings) as sides:
        seconds: dict[str, list[float]] = {side.name: [] for side in sides}
        for number in range(rounds + 1):
            for side in sides:
                taken = await side.once()
                if number:
                    seconds[side.name].append(taken)
    rows = tuple(_row(side, seconds) for side in sides)
    return Result(benchmark, rows, tuple(benchmark.remarks(seconds)))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the quotients of what belongs to one round."""
    return median(mine / other for mine, other in zip(ours, theirs, strict=True))


def _row(side: Side, seconds: Mapping[str, Sequence[float]]) -> Row:
    own = seconds[side.name]
    ratios = tuple(Ratio(to, ratio(own, seconds[to.name])) for to in side.against if to.name in seconds)
    return Row(side.name, median(own), min(own), ratios)


class Watch:
    """A stopwatch's reading."""

    seconds = 0.0


@contextmanager
def timed() -> Iterator[Watch]:
    """Take the time of a block."""
    watch = Watch()
    began = time.perf_counter()
    yield watch
    watch.seconds = time.perf_counter() - began
