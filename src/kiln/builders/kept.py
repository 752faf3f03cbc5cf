"""Kept failures: the scratch of builds that failed, until its time is over or there is too much of it."""

import os
import secrets
from contextlib import suppress
from dataclasses import dataclass

from kiln.castore.dirfd import DIRECTORY, remove_tree
from kiln.castore.local.store import LocalStore
from kiln.sandbox.claims import is_held, settled
from kiln.sandbox.layout import occupied_bytes


@dataclass(frozen=True, slots=True)
class Kept:
    """One kept failure: its directory, and until when it stays (Unix seconds)."""

    build_id: str
    directory: str
    until_s: float


def kept_failures(store: LocalStore) -> list[Kept]:
    """All of them, the oldest first."""
    found = []
    for name in sorted(os.listdir(store.builds_dir)):  # Ids sort by time.
        directory = f"{store.builds_dir}/{name}"
        until_s = kept_until(directory)
        if until_s is not None:
            found.append(Kept(name, directory, until_s))
    return found


def kept_until(directory: str) -> float | None:
    """Until when a build's directory stays; None where it is no kept failure."""
    try:
        with open(f"{directory}/kept", encoding="ascii", errors="replace") as file:
            return float(file.read())
    except OSError:
        return None
    except ValueError:  # A crash cut it off.
        return 0.0


class KeptFailures:
    """The kept failures of a store, held within bounds."""

    def __init__(self, store: LocalStore, *, bytes_max: int) -> None:
        self._store = store
        self._bytes_max = bytes_max
        self._sizes: dict[str, int] = {}
        """Nothing runs in them any more: each is measured once."""

    def prune(self, now_s: float) -> list[str]:
        """Remove what is over at `now_s`, then the oldest until the rest fits. Returns the ids removed. Blocks.

        A directory that somebody holds (a shell in it) stays, but counts.
        """
        with settled(self._store.builds_dir):
            kept = kept_failures(self._store)
            self._sizes = {failure.build_id: self._size(failure) for failure in kept}
            total = sum(self._sizes.values())
            removed: list[str] = []
            for failure in sorted(kept, key=lambda failure: failure.until_s > now_s):  # First what is over.
                if failure.until_s > now_s and total <= self._bytes_max:
                    break
                if not is_held(failure.directory):
                    remove_directory(self._store, failure.directory)
                    removed.append(failure.build_id)
                    total -= self._sizes.pop(failure.build_id)
            return removed

    def _size(self, failure: Kept) -> int:
        known = self._sizes.get(failure.build_id)
        return occupied_bytes(failure.directory) if known is None else known


def remove_directory(store: LocalStore, directory: str) -> None:
    """Remove a build's directory and all in it. It is renamed first: half a directory never looks like a whole one."""
    tmp = os.open(store.tmp_dir, DIRECTORY)
    try:
        doomed = f"build-{secrets.token_hex(8)}"
        with suppress(FileNotFoundError):
            os.rename(directory, doomed, dst_dir_fd=tmp)
            remove_tree(os.fsencode(doomed), dir_fd=tmp)
    finally:
        os.close(tmp)
