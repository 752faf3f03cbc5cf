"""Import of a tree of many small files."""

import os
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from bench.bwrap_side import found
from bench.measure import Against, Benchmark, Side, blocking, timed
from bench.nix_side import Nix, nix_is_there
from bench.surroundings import Surroundings
from kiln.castore.local.store import LocalStore

_DIRECTORIES_AT_THE_TOP = 20
_FILES_A_DIRECTORY = 50
_BYTES_MAX = 1 << 18
_NIX, _GIT = "nix-store --add", "git add, uncompressed"


def _make_tree(root: str, files: int) -> None:
    """Sizes as in source trees: log-normal, 2 KiB in the middle, 4.5 KiB on average. The same on every run."""
    source = random.Random(1)
    for number in range(files):
        directory = number // _FILES_A_DIRECTORY
        path = f"{root}/{directory % _DIRECTORIES_AT_THE_TOP}/{directory}"
        os.makedirs(path, exist_ok=True)
        with open(f"{path}/{number}", "wb") as file:
            file.write(source.randbytes(min(int(source.lognormvariate(7.6, 1.3)), _BYTES_MAX)))


@dataclass(frozen=True, slots=True)
class _Import:
    """Each round imports the tree into a store that has nothing of it."""

    surroundings: Surroundings
    tree: str

    async def by_kiln(self, *, processes: int, adopt: bool) -> float:
        source = self.tree
        if adopt:
            source = self.surroundings.fresh("adopted")
            shutil.copytree(self.tree, source, symlinks=True)
        store = LocalStore.open(self.surroundings.fresh("kiln"))
        try:
            with timed() as watch:
                await store.ingest(source, adopt=adopt, processes=processes)
        finally:
            store.close()
        return self._a_file(watch.seconds)

    def by_nix(self) -> float:
        nix = Nix(self.surroundings.fresh("nix"))
        nix.add(os.path.realpath(__file__))  # Makes the store, so that this is not timed.
        with timed() as watch:
            nix.add(self.tree)
        return self._a_file(watch.seconds)

    def by_git(self) -> float:
        git = [found("git"), "--git-dir", self.surroundings.fresh("git"), "--work-tree", self.tree]
        subprocess.run([*git, "init", "--quiet"], check=True)
        with timed() as watch:
            subprocess.run([*git, "-c", "core.compression=0", "add", "--all"], check=True, cwd=self.tree)
        return self._a_file(watch.seconds)

    def _a_file(self, seconds: float) -> float:
        return seconds / self.surroundings.scale.files


@asynccontextmanager
async def _open(surroundings: Surroundings) -> AsyncIterator[Sequence[Side]]:
    tree = surroundings.fresh("tree")
    _make_tree(tree, surroundings.scale.files)
    importing = _Import(surroundings, tree)
    sides = []
    if nix_is_there():
        sides.append(Side(_NIX, blocking(importing.by_nix)))
    if shutil.which("git") is not None:
        sides.append(Side(_GIT, blocking(importing.by_git)))
    for processes, at_most in ((1, 1 / 1.8), (2, 1 / 3)):
        against = (Against(_NIX, round(at_most, 2)), Against(_GIT))
        said = "one process" if processes == 1 else "two processes"
        for adopt in (False, True):

            async def once(processes: int = processes, adopt: bool = adopt) -> float:
                return await importing.by_kiln(processes=processes, adopt=adopt)

            sides.append(Side(f"kiln {'adopts' if adopt else 'imports'}, {said}", once, against))
    yield sides


SMALL_FILES = Benchmark("Import of 20,000 small files", "µs a file", 1e-6, _open)
