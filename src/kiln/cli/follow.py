"""One build, followed to its end."""

import asyncio
import json
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Self, TextIO

from kiln.build.events import (
    Accepted,
    Assigned,
    AttemptEnded,
    Cancelling,
    Event,
    Finished,
    Log,
    Notice,
    Phase,
    Queued,
)
from kiln.build.service import BuildHost
from kiln.build.wire_json import event_to_json
from kiln.cli.interrupts import Interrupts
from kiln.cli.sanitize import Lines, log_text, one_line
from kiln.cli.view import PHASES, WAITS, View
from kiln.errors import Denied, Unavailable

TAIL_LINES = 25


class EventsFileUnwritable(Denied):
    """The file that events should go to cannot be opened or written."""

    def __init__(self, path: str, error: OSError) -> None:
        super().__init__(f"cannot write events to {path}: {error.strerror}")
        self.path = path


class Follower:
    """Shows a build's events, and remembers what its report needs."""

    def __init__(self, view: View, *, again: str, echo: Callable[[Event], None] = lambda _: None) -> None:
        """`again` is the command that follows a build, for when this process cannot any more."""
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._view = view
        self._again = again
        self._echo = echo
        self._lines = Lines()

    async def follow(self, host: BuildHost, build_id: str, *, after_seq: int = 0) -> Finished:
        """The verdict of `build_id`, once it is there."""
        try:
            async with host.watch(build_id, after_seq=after_seq) as events:
                async for event in events:
                    self._echo(event)
                    self._show(event)
                    if isinstance(event.body, Finished):
                        return event.body
        except Unavailable:
            self._view.say(f"lost sight of build {build_id}; to follow it again: {self._again} {build_id}")
            raise
        finally:
            self._view.ended(build_id)
        raise Unavailable(f"the events of build {build_id} ended without a verdict")

    def _show(self, event: Event) -> None:
        view = self._view
        match event.body:
            case Log(data):
                self._log(self._lines.feed(data))
            case Accepted(merged_into=leader):
                view.say(f"build {event.build_id}" + (f", the same as {leader}, which runs already" if leader else ""))
                view.state(event.build_id, "accepted")
            case Queued(wait, detail, ahead):
                more = f", {ahead} before it" if ahead else ""
                view.state(event.build_id, one_line(WAITS[wait] + more + (f" ({detail})" if detail else "")))
            case Assigned():
                view.state(event.build_id, "assigned")
            case Phase(kind):
                view.state(event.build_id, PHASES[kind])
            case Notice(kind, text):
                view.say(one_line(f"{kind}: {text}"))
            case AttemptEnded(failure, following):
                view.say(one_line(f"attempt {event.attempt} ended: {failure.message}; next: {following}"))
            case Cancelling(by, why):
                view.state(event.build_id, "cancelling")
                view.say(one_line(f"cancelling, asked for by {by}" + (f": {why}" if why else "")))
            case Finished():
                self._log(self._lines.end())

    def _log(self, lines: bytes) -> None:
        if lines:
            text = log_text(lines, colour=self._view.colour)
            self.tail.extend(text[:-1].rsplit("\n", TAIL_LINES)[-TAIL_LINES:])
            self._view.log(text)


class EventsFile:
    """Events as lines of JSON. Without a path, nowhere."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._stack = ExitStack()
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        if self._path is not None:
            try:
                self._file = self._stack.enter_context(open(self._path, "w", encoding="utf-8"))
            except OSError as error:
                raise EventsFileUnwritable(self._path, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # What could not be written was reported when it was.
            self._stack.close()

    def write(self, event: Event) -> None:
        """Append `event`; whoever reads along sees it at once."""
        if self._file is not None and self._path is not None:
            try:
                self._file.write(event_line(event))
                self._file.flush()
            except OSError as error:
                raise EventsFileUnwritable(self._path, error) from error


def event_line(event: Event) -> str:
    """`event` as a line of JSON."""
    return json.dumps(event_to_json(event)) + "\n"


async def follow_and_cancel(
    follower: Follower, host: BuildHost, build_id: str, view: View, interrupts: Interrupts
) -> Finished:
    """`follow`, where the first Ctrl-C cancels the build and waits for its end."""
    cancelling: list[asyncio.Task[object]] = []

    def cancel() -> None:
        view.say("cancelling; Ctrl-C again stops waiting for it")
        cancelling.append(asyncio.create_task(host.cancel(build_id, by="the command line", why="interrupted")))

    interrupts.first = cancel
    try:
        finished = await follower.follow(host, build_id)
        for task in cancelling:
            await task
    except asyncio.CancelledError:
        for task in cancelling:
            task.cancel()
        raise
    finally:
        interrupts.first = None
    return finished
