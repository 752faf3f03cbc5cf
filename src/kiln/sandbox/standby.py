"""Processes that wait for the next build, each in a control group of its own.

Forking one and moving it into its group takes longer than all else that kiln adds to a build, for the kernel lets a
process change groups only after a grace period. So it is done while the build before is running.
"""

import os
from dataclasses import dataclass

from kiln.sandbox.cgroups import Group, Hierarchies, make_group
from kiln.sandbox.launcher import Launcher
from kiln.sandbox.policy import Limits


@dataclass(frozen=True, slots=True)
class Seat:
    """A standby process (its number for `Launcher.launch`) and the group that it is in."""

    standby: int
    group: Group


class Seats:
    """Seats of one builder. A group is named by `session`, which lives exactly as long as this process."""

    def __init__(self, launcher: Launcher, hierarchies: Hierarchies, store_id: str, session: str) -> None:
        self._launcher = launcher
        self._hierarchies = hierarchies
        self._store_id = store_id
        self._session = session
        self._count = 0
        self._ready: list[Seat] = []

    def take(self, limits: Limits) -> Seat:
        """A seat with these limits; whoever takes it removes its group in the end."""
        while self._ready and not limits.cpu_millis:
            seat = self._ready.pop()
            if self._launcher.is_ready(seat.standby):
                break
            seat.group.remove()
        else:
            seat = self._make(cpu=limits.cpu_millis > 0)
        try:
            seat.group.limit(memory_bytes=limits.memory_bytes, processes=limits.processes, cpu_millis=limits.cpu_millis)
        except OSError:
            self._launcher.dismiss(seat.standby)
            seat.group.remove()
            raise
        return seat

    def refill(self, seats: int = 1) -> None:
        """Make seats ahead, so that there are `seats`."""
        while len(self._ready) < seats:
            self._ready.append(self._make(cpu=False))

    def close(self) -> None:
        """Let go of those that nobody took."""
        while self._ready:
            seat = self._ready.pop()
            if self._launcher.is_ready(seat.standby):
                self._launcher.dismiss(seat.standby)
            seat.group.remove()

    def _make(self, *, cpu: bool) -> Seat:
        self._count += 1
        group = make_group(self._hierarchies, self._store_id, f"{self._session}.{self._count}", cpu=cpu)
        return Seat(self._launcher.stand_by(group.process_files), group)


def session_of(token: str) -> str:
    """The session that a group's token names; empty where it names none."""
    return token.rpartition(".")[0]


def session_name(tmp_dir: str) -> str:
    """The name of the session whose temporary directory is `tmp_dir`."""
    return os.path.basename(tmp_dir)
