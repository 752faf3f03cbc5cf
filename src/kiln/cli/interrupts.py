"""Ctrl-C, and what else ends a command: the first time politely, then at once, and always with the cleaning up."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """The first signal calls `first` where it is set; another, or one with nothing set, cancels the command's task.

    Later ones are ignored: what is left to do is to remove what the command started, and to skip it would help nobody.
    """

    def __init__(self, task: "asyncio.Task[object]") -> None:
        self.first: Callable[[], None] | None = None
        self._task = task
        self._cancelled = False

    def __call__(self) -> None:
        first, self.first = self.first, None
        if first is not None:
            first()
        elif not self._cancelled:
            self._cancelled = True
            self._task.cancel()


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Signals go to the object given, for as long as the block."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    handler = Interrupts(task)
    for number in _SIGNALS:
        loop.add_signal_handler(number, handler)
    try:
        yield handler
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
