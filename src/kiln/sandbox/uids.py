"""Host uids for builds: pairs from a range, held by lock files, so that several kilns share a host.

Of a pair, the first is the build's user; the second stands for a container's uid 0 in runtimes that need one mapped.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass

from kiln.errors import Usage
from kiln.sandbox.errors import UidsExhausted

DEFAULT_FIRST, DEFAULT_LAST = 0x70000000, 0x7000FFFF


@dataclass(frozen=True, slots=True)
class Identity:
    """The host's ids of one build; gids equal uids."""

    uid: int
    zero_uid: int


@dataclass(frozen=True, slots=True)
class UidRange:
    """`first` to `last`, both included, and where the locks are."""

    first: int = DEFAULT_FIRST
    last: int = DEFAULT_LAST
    lock_dir: str = "/run/kiln/uids"

    def __post_init__(self) -> None:
        if not 0 < self.first < self.last < 0xFFFFFFFF:
            raise Usage(f"the uid range {self.first}-{self.last} holds no pair of ids, or leaves the range of uids")

    @contextlib.contextmanager
    def taken(self) -> Iterator[Identity]:
        """A pair that is nobody else's inside the block. Raises UidsExhausted."""
        os.makedirs(self.lock_dir, mode=0o755, exist_ok=True)
        for uid in range(self.first, self.last, 2):
            # The file stays: removing a lock file would let two hold what looks like the same lock.
            descriptor = os.open(f"{self.lock_dir}/{uid}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield Identity(uid, uid + 1)
                return
            finally:
                os.close(descriptor)
        raise UidsExhausted(f"all uids from {self.first} to {self.last} are in use; widen --uid-range")
