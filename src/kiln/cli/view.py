"""What a person sees of a running build, on stderr."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from kiln.build.events import PhaseKind, Wait

PHASES = {
    PhaseKind.UNSPECIFIED: "working",
    PhaseKind.FETCH: "fetching inputs",
    PhaseKind.STAGE: "staging inputs",
    PhaseKind.RUN: "running",
    PhaseKind.CAPTURE: "capturing outputs",
    PhaseKind.UPLOAD: "uploading outputs",
}
WAITS = {
    Wait.UNSPECIFIED: "waiting",
    Wait.SLOT: "waiting for a slot",
    Wait.MEMORY: "waiting for memory",
    Wait.WORKER: "waiting for a worker",
    Wait.MERGED: "waiting for the same build, which runs already",
    Wait.QUOTA: "waiting for its quota",
    Wait.DISK: "waiting for disk space",
}


class View(Protocol):
    """Takes text that is harmless for a terminal."""

    colour: bool
    """Whether log lines may bring colours."""

    def log(self, text: str) -> None:
        """Lines that the build wrote, each with its newline."""

    def state(self, build_id: str, text: str) -> None:
        """What a build is doing now."""

    def ended(self, build_id: str) -> None:
        """A build does nothing any more."""

    def say(self, text: str) -> None:
        """A line of kiln's own."""


class PlainView(View):
    """Lines one after the other: for files, pipes and CI."""

    def __init__(self, stream: TextIO) -> None:
        self.colour = False
        self._stream = stream
        self._states: dict[str, str] = {}

    def log(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def state(self, build_id: str, text: str) -> None:
        # Waiting is worth a line; the phases of a build that goes on are not.
        if text.startswith("waiting") and self._states.get(build_id) != text:
            self.say(f"{build_id}: {text}")
        self._states[build_id] = text

    def ended(self, build_id: str) -> None:
        self._states.pop(build_id, None)

    def say(self, text: str) -> None:
        self.log(f"kiln: {text}\n")


@contextmanager
def shown() -> Iterator[View]:
    """The view that fits stderr, for as long as the block."""
    if not sys.stderr.isatty():
        yield PlainView(sys.stderr)
        return
    from kiln.cli.live import LiveView  # noqa: PLC0415  rich takes 60 ms, and pipes need none of it.

    with LiveView(sys.stderr) as view:
        yield view
