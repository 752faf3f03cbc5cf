"""`python -m bench [NAME]… [--rounds N] [--quick] [--write [FILE]]`."""

import argparse
import asyncio
import shlex
import sys

from bench.cache_hit import CACHE_HIT
from bench.inputs import INPUTS
from bench.large_file import LARGE_FILE
from bench.log import LOG
from bench.machine import facts
from bench.measure import Benchmark, measured
from bench.report import as_page, as_text
from bench.small_files import SMALL_FILES
from bench.start_up import START_UP
from bench.surroundings import FULL, QUICK, surroundings
from bench.trivial import TRIVIAL

_BENCHMARKS: dict[str, Benchmark] = {
    "trivial": TRIVIAL,
    "inputs": INPUTS,
    "cache-hit": CACHE_HIT,
    "small-files": SMALL_FILES,
    "large-file": LARGE_FILE,
    "start-up": START_UP,
    "log": LOG,
}
_PAGE = "docs/benchmarks.md"
_ROUNDS = 7


def main() -> int:
    """Run what was named, or everything."""
    parser = argparse.ArgumentParser(
        prog="./dev bench",
        description="What kiln costs beside its peers. On a noisy machine, start it under `chrt -r 1`.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(_BENCHMARKS)}; none: all")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help=f"how often each side runs ({_ROUNDS})")
    parser.add_argument("--quick", action="store_true", help="next to no work: to see that it runs, not to measure")
    parser.add_argument("--write", nargs="?", const=_PAGE, metavar="FILE", help=f"write the tables to FILE ({_PAGE})")
    asked = parser.parse_args()
    if unknown := [name for name in asked.names if name not in _BENCHMARKS]:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(_BENCHMARKS)}")
    if asked.rounds < 1:
        parser.error("--rounds has to be at least 1")
    known = facts(rounds=asked.rounds)
    results = []
    for name in asked.names or _BENCHMARKS:
        with surroundings(QUICK if asked.quick else FULL) as here:
            results.append(asyncio.run(measured(_BENCHMARKS[name], here, rounds=asked.rounds)))
        print(as_text(results[-1]), flush=True)
    if asked.write is not None:
        with open(asked.write, "w", encoding="utf-8") as page:
            page.write(as_page(results, known, shlex.join(["./dev", "bench", *sys.argv[1:]])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
