"""Import of one large file, with and without looking for references, beside the hash alone."""

import os
import random
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from bench.measure import Against, Benchmark, Side, blocking, timed
from bench.surroundings import Surroundings
from kiln.castore.local.store import LocalStore
from kiln.castore.model import BLAKE3_DOUBLED

_MIB = 1 << 20
_NEEDLES = 500
_PRESENT = 100
_HASH, _COPY = "BLAKE3 alone", "copy alone"
_SLOWER_AT_MOST = 1.25  # 0.8 of the hash's speed.


def _needles(source: random.Random) -> list[bytes]:
    """What Nix looks for: the 32 characters of a store path's hash."""
    return [bytes(source.choices(b"0123456789abcdfghijklmnpqrsvwxyz", k=32)) for _ in range(_NEEDLES)]


def _make_file(path: str, size: int, needles: Sequence[bytes], source: random.Random) -> int:
    """Random bytes, with the first needles at the beginning of a MiB each; returns how many."""
    count = size // _MIB
    with open(path, "wb") as file:
        for number in range(count):
            needle = needles[number] if number < _PRESENT else b""
            file.write(needle + source.randbytes(_MIB - len(needle)))
    return min(count, _PRESENT)


@dataclass(frozen=True, slots=True)
class _Import:
    """Each round imports the file into a store that has nothing of it."""

    surroundings: Surroundings
    path: str
    present: int
    """How many needles are in it."""

    def hashed(self) -> float:
        """Read and hashed as the import does it."""
        hasher, buffer = BLAKE3_DOUBLED.new_hasher(), memoryview(bytearray(_MIB))
        with timed() as watch, open(self.path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                hasher.update(buffer[:count])
        return watch.seconds

    def copied(self) -> float:
        """What any import that leaves the source alone cannot do without, where no extents can be shared."""
        target = self.surroundings.fresh("copy")
        with timed() as watch:
            shutil.copyfile(self.path, target)
        os.unlink(target)
        return watch.seconds

    async def imported(self, needles: Sequence[bytes], *, adopt: bool) -> float:
        source = self.path
        if adopt:
            source = self.surroundings.fresh("adopted")
            shutil.copyfile(self.path, source)
        store = LocalStore.open(self.surroundings.fresh("kiln"))
        try:
            with timed() as watch:
                found = await store.ingest(source, needles=needles, adopt=adopt)
            assert len(found.needles) == min(self.present, len(needles))
        finally:
            store.close()
        return watch.seconds


@asynccontextmanager
async def _open(surroundings: Surroundings) -> AsyncIterator[Sequence[Side]]:
    source = random.Random(1)
    needles, path = _needles(source), surroundings.fresh("large")
    present = _make_file(path, surroundings.scale.large_bytes, needles, source)
    importing = _Import(surroundings, path, present)
    sides = [Side(_HASH, blocking(importing.hashed)), Side(_COPY, blocking(importing.copied))]
    for adopt in (True, False):
        for looked_for in ([], needles):

            async def once(looked_for: Sequence[bytes] = looked_for, adopt: bool = adopt) -> float:
                return await importing.imported(looked_for, adopt=adopt)

            said = f"kiln {'adopts' if adopt else 'imports'}"
            name = f"{said}, {_NEEDLES} needles" if looked_for else said
            against = (Against(_HASH, _SLOWER_AT_MOST), *(() if adopt else (Against(_COPY),)))
            sides.append(Side(name, once, against))
    yield sides


LARGE_FILE = Benchmark("Import of one file of 1 GiB", "ms", 1e-3, _open)
