"""Where benchmarks run, and how much they do."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_IN_MEMORY = "/dev/shm"  # A disk's file system remembers what was deleted before, and slows down whoever comes next.


@dataclass(frozen=True, slots=True)
class Scale:
    """How much one round does."""

    builds: int
    inputs: tuple[int, ...]
    files: int
    large_bytes: int
    log_bytes: int
    starts: int


FULL = Scale(builds=50, inputs=(100, 500), files=20_000, large_bytes=1 << 30, log_bytes=8 << 20, starts=5)
QUICK = Scale(builds=2, inputs=(3,), files=60, large_bytes=1 << 20, log_bytes=1 << 16, starts=1)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """An empty directory for one benchmark, gone after it, and the scale."""

    directory: str
    scale: Scale

    def fresh(self, name: str) -> str:
        """A path in the directory where nothing is any more."""
        path = os.path.join(self.directory, name)
        shutil.rmtree(path, ignore_errors=True)
        return path


@contextmanager
def surroundings(scale: Scale) -> Iterator[Surroundings]:
    """In memory where that can be written, so that no side pays for the disk."""
    parent = _IN_MEMORY if os.access(_IN_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="kiln-bench-", dir=parent, ignore_cleanup_errors=True) as directory:
        yield Surroundings(directory, scale)
