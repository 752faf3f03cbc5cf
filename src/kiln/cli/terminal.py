"""The terminal of whoever runs kiln, passed on to a command through a pseudo-terminal of the command's own."""

import asyncio
import contextlib
import errno
import fcntl
import os
import pty
import signal
import sys
import termios
import tty
from collections.abc import Iterator

from kiln.sandbox.runtime import Streams

_CHUNK_BYTES = 65536


@contextlib.contextmanager
def passed_on() -> Iterator[Streams]:
    """Descriptors for a command, for as long as the block: a terminal where ours is one, else our own three."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield Streams(0, 1, 2)
        return
    # The command gets a session of its own with a terminal of its own: ours belongs to the session of our shell.
    ours, its = pty.openpty()
    before = termios.tcgetattr(0)
    loop = asyncio.get_running_loop()
    try:
        _copy_size(ours)
        tty.setraw(0)
        loop.add_reader(0, _copy, 0, ours)
        loop.add_reader(ours, _copy, ours, 1)
        loop.add_signal_handler(signal.SIGWINCH, _copy_size, ours)
        yield Streams(its, its, its, terminal=True)
        os.set_blocking(ours, False)
        while _copy(ours, 1):  # What it said last.
            pass
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)
        loop.remove_reader(0)
        loop.remove_reader(ours)
        termios.tcsetattr(0, termios.TCSADRAIN, before)
        os.close(its)
        os.close(ours)


def _copy(source: int, target: int) -> int:
    """Pass on what can be read now; how many bytes that were."""
    try:
        data = os.read(source, _CHUNK_BYTES)
    except OSError as error:
        if error.errno in {errno.EIO, errno.EAGAIN}:  # Nobody has the other end open; nothing is left.
            return 0
        raise
    written = 0
    while written < len(data):
        written += os.write(target, data[written:])
    return written


def _copy_size(target: int) -> None:
    size = fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8))  # struct winsize: four unsigned shorts, tty_ioctl(4).
    fcntl.ioctl(target, termios.TIOCSWINSZ, size)
