"""Which of many needles occur in a stream of bytes: hyperscan where it is installed, plain Python elsewhere."""

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

_HYPERSCAN_NEEDLE_BYTES_MAX = 4096  # Its patterns end at 16,000 characters, and each byte is written as four.
_SEARCHED_ONE_BY_ONE_MAX = 4  # A pass of bytes.find per needle beats the one filtered pass up to about here.


class RefScanner:
    """Finds needles in any number of streams; `found` grows over all of them.

    Needles may repeat, overlap and contain each other: every index whose needle occurs is reported. An empty needle
    is refused by the protocol and never gets here. Not for use by two threads at a time.
    """

    def __init__(self, needles: Sequence[bytes]) -> None:
        self._by_needle: dict[bytes, list[int]] = {}
        for index, needle in enumerate(needles):
            assert needle, "an empty needle occurs everywhere"
            self._by_needle.setdefault(needle, []).append(index)
        self.found: set[int] = set()
        self._wanted = len(needles)
        self._matcher = _matcher(list(self._by_needle), self._report)

    @property
    def done(self) -> bool:
        """Every needle was found: scanning on cannot add anything."""
        return len(self.found) == self._wanted

    def scan(self, data: bytes) -> None:
        """One stream that is all in `data`."""
        if not self.done:
            stream = self.stream()
            stream.feed(data)
            stream.close()

    def stream(self) -> "Stream":
        """A new stream, to be fed chunk by chunk; matches may lie across chunks."""
        return self._matcher.stream()

    def _report(self, needle: bytes) -> None:
        self.found.update(self._by_needle[needle])


class Stream(Protocol):
    """One stream of bytes being scanned."""

    def feed(self, chunk: bytes | memoryview) -> None:
        """Scan the next bytes."""

    def close(self) -> None:
        """End the stream and free what it holds."""


class Matcher(Protocol):
    """What finds a fixed set of needles in streams, and reports each at least once."""

    def stream(self) -> Stream:
        """A new stream."""


def _matcher(needles: list[bytes], report: Callable[[bytes], None]) -> Matcher:
    if needles and all(len(needle) <= _HYPERSCAN_NEEDLE_BYTES_MAX for needle in needles):
        try:
            return HyperscanMatcher(needles, report)
        except ImportError:
            pass
    return PlainMatcher(needles, report)


class HyperscanMatcher(Matcher):
    """Hyperscan in stream mode: 2.8 GB/s whatever the number of needles. Raises ImportError where it is missing."""

    def __init__(self, needles: list[bytes], report: Callable[[bytes], None]) -> None:
        hyperscan = importlib.import_module("hyperscan")
        self._database: Any = hyperscan.Database(mode=hyperscan.HS_MODE_STREAM)
        self._database.compile(
            expressions=[b"".join(b"\\x%02x" % byte for byte in needle) for needle in needles],
            ids=list(range(len(needles))),
            elements=len(needles),
            flags=[hyperscan.HS_FLAG_SINGLEMATCH | hyperscan.HS_FLAG_DOTALL] * len(needles),
        )

        def matched(index: int, _start: int, _end: int, _flags: int, _context: object) -> None:
            report(needles[index])

        self._matched = matched

    def stream(self) -> Stream:
        return _HyperscanStream(self._database, self._matched)


class _HyperscanStream(Stream):
    def __init__(self, database: Any, matched: Callable[[int, int, int, int, object], None]) -> None:
        self._matched = matched  # The stream borrows it: without a reference of ours it would be freed under it.
        self._stream = database.stream(match_event_handler=matched)
        self._stream.__enter__()

    def feed(self, chunk: bytes | memoryview) -> None:
        self._stream.scan(chunk)

    def close(self) -> None:
        self._stream.__exit__(None, None, None)


class PlainMatcher(Matcher):
    """No dependency. Few needles: one search each. Many: only runs of bytes that occur in needles are looked up.

    bytes.translate marks the bytes that occur in any needle, bytes.find finds runs of marks as long as the shortest
    needle, and a dictionary of that many first bytes says which needles may begin there. For Nix's hashes (32 of an
    alphabet of 32) this passes 0.8 GB/s; needles that use all 256 values make it slow, never wrong.
    """

    def __init__(self, needles: list[bytes], report: Callable[[bytes], None]) -> None:
        self.report = report
        self.needles = needles
        self.overlap = max(map(len, needles), default=1) - 1
        self.prefix_length = min(map(len, needles), default=1)
        alphabet = set(b"".join(needles))
        self.marks = bytes(byte in alphabet for byte in range(256))
        self.by_prefix: dict[bytes, list[bytes]] = {}
        for needle in needles:
            self.by_prefix.setdefault(needle[: self.prefix_length], []).append(needle)

    def stream(self) -> Stream:
        return _PlainStream(self)


class _PlainStream(Stream):
    def __init__(self, matcher: PlainMatcher) -> None:
        self._matcher = matcher
        self._tail = b""
        self._missing = set(matcher.needles)

    def feed(self, chunk: bytes | memoryview) -> None:
        window = self._tail + chunk
        if len(self._missing) <= _SEARCHED_ONE_BY_ONE_MAX:
            self._found([needle for needle in self._missing if needle in window])
        else:
            self._filtered(window)
        overlap = self._matcher.overlap
        self._tail = bytes(window[-overlap:]) if overlap else b""

    def _filtered(self, window: bytes) -> None:
        matcher = self._matcher
        length = matcher.prefix_length
        run = b"\1" * length
        marked = window.translate(matcher.marks)
        at = marked.find(run)
        while at >= 0:
            for needle in matcher.by_prefix.get(window[at : at + length], ()):
                if window.startswith(needle, at):
                    self._found([needle])
            at = marked.find(run, at + 1)

    def _found(self, needles: Iterable[bytes]) -> None:
        for needle in needles:
            self._missing.discard(needle)
            self._matcher.report(needle)

    def close(self) -> None:
        self._tail = b""
