"""Passing events, conflated: of each kind only the latest counts, and whoever is slow never sees the others."""

from collections.abc import Sequence

from kiln.build.events import PassingEvent


class Latest:
    """The latest passing event of each kind."""

    def __init__(self) -> None:
        self._count = 0
        self._events: dict[type[PassingEvent], tuple[int, PassingEvent]] = {}

    def say(self, event: PassingEvent) -> None:
        """It replaces the one of its kind before it."""
        self._count += 1
        self._events[type(event)] = (self._count, event)

    def since(self, count: int) -> tuple[int, Sequence[PassingEvent]]:
        """What was said after `count` events, in that order, and how many were said by now."""
        said = [(number, event) for number, event in self._events.values() if number > count]
        return self._count, [event for _, event in sorted(said, key=lambda pair: pair[0])]
