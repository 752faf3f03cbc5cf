"""Who of those that wait runs next: slots, memory, priority, and no starvation (pure).

The order is by priority, then by arrival. A build that does not fit yet may be overtaken by later ones that do, but
only so often: then it is given the next room there is, however long that takes.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

from kiln.build.events import Wait

_OVERTAKEN_MAX = 8
_LOOKAHEAD = 64  # How far down the line we look for somebody who fits: with 10,000 waiting, time matters.


@dataclass(frozen=True, slots=True)
class Place:
    """What a build waits for, and how many are before it."""

    wait: Wait
    ahead: int


@dataclass(slots=True)
class _Entry:
    key: tuple[int, int]
    memory_bytes: int
    overtaken: int = 0
    running: bool = False


class Admission:
    """The state: who runs, who waits. A ticket is a number that is given once."""

    def __init__(self, *, slots: int, memory_bytes: int, overtaken_max: int = _OVERTAKEN_MAX) -> None:
        """`memory_bytes` is what all running builds may have together."""
        assert slots > 0
        self._slots = slots
        self._memory_bytes = memory_bytes
        self._overtaken_max = overtaken_max
        self._entries: dict[int, _Entry] = {}
        self._line: list[tuple[int, int]] = []
        """(-priority, ticket) of those that wait, in order."""
        self._running = 0
        self._used_bytes = 0
        self._tickets = 0

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._line)

    def enter(self, memory_bytes: int, priority: int = 0) -> int:
        """A build arrives; what needs more than there is altogether gets all there is, alone. Returns its ticket."""
        self._tickets += 1
        entry = _Entry((-priority, self._tickets), min(memory_bytes, self._memory_bytes))
        self._entries[self._tickets] = entry
        insort(self._line, entry.key)
        return self._tickets

    def leave(self, ticket: int) -> None:
        """A build ends, or gives up waiting."""
        entry = self._entries.pop(ticket)
        if entry.running:
            self._running -= 1
            self._used_bytes -= entry.memory_bytes
        else:
            del self._line[bisect_left(self._line, entry.key)]

    def admit(self) -> list[int]:
        """The tickets of those that run from now on."""
        admitted: list[int] = []
        passed: list[_Entry] = []
        place = 0
        while place < len(self._line) and len(passed) <= _LOOKAHEAD and self._running < self._slots:
            ticket = self._line[place][1]
            entry = self._entries[ticket]
            if self._used_bytes + entry.memory_bytes > self._memory_bytes:
                if entry.overtaken >= self._overtaken_max:
                    break
                passed.append(entry)
                place += 1
                continue
            del self._line[place]
            entry.running = True
            self._running += 1
            self._used_bytes += entry.memory_bytes
            admitted.append(ticket)
            for other in passed:
                other.overtaken += 1
            if any(other.overtaken >= self._overtaken_max for other in passed):
                break
        return admitted

    def place(self, ticket: int) -> Place:
        """Where a waiting build stands."""
        wait = Wait.MEMORY if self._running < self._slots else Wait.SLOT
        return Place(wait, bisect_left(self._line, self._entries[ticket].key))
