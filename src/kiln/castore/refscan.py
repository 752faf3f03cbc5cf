"""Which of many needles occur in streams of bytes: hyperscan where it is installed, plain Python elsewhere."""

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

_HYPERSCAN_NEEDLE_BYTES_MAX = 2048  # Its patterns end at 16,000 characters, and each byte is written as four.
_SEARCHED_ONE_BY_ONE_MAX = 4  # A pass of bytes.find per needle beats the one filtered pass up to about here.


class Matcher(Protocol):
    """Finds a fixed set of needles in a block of bytes."""

    def scan(self, block: bytes, found: set[bytes]) -> None:
        """Add those needles to `found` that occur in `block`, which is not empty."""


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
        self._matcher = matcher_of(list(self._by_needle))
        self._found: set[bytes] = set()
        self.overlap = max(map(len, needles), default=1) - 1

    @property
    def found(self) -> frozenset[int]:
        """The indices of all needles seen so far."""
        return frozenset(index for needle in self._found for index in self._by_needle[needle])

    def scan(self, data: bytes) -> None:
        """One stream that is all in `data`."""
        if data and len(self._found) < len(self._by_needle):
            self._matcher.scan(data, self._found)

    def stream(self) -> "Stream":
        """A new stream, to be fed chunk by chunk."""
        return Stream(self)


class Stream:
    """One stream of bytes being scanned; matches may lie across chunks.

    Borders are scanned apart, so that no large chunk is copied to put the end of the last one in front of it.
    """

    def __init__(self, scanner: RefScanner) -> None:
        self._scanner = scanner
        self._tail = b""

    def feed(self, chunk: bytes) -> None:
        """Scan the next bytes."""
        overlap = self._scanner.overlap
        if self._tail:
            self._scanner.scan(self._tail + chunk[:overlap])
        if not self._tail or len(chunk) > overlap:
            self._scanner.scan(chunk)
        if overlap:
            self._tail = chunk[-overlap:] if len(chunk) >= overlap else (self._tail + chunk)[-overlap:]


def matcher_of(needles: list[bytes]) -> Matcher:
    """The fastest matcher that is there and takes these needles."""
    if needles and all(len(needle) <= _HYPERSCAN_NEEDLE_BYTES_MAX for needle in needles):
        try:
            return HyperscanMatcher(needles)
        except ImportError:
            pass
    return PlainMatcher(needles)


class HyperscanMatcher(Matcher):
    """Hyperscan in block mode: 2.4 GB/s whatever the number of needles. Raises ImportError where it is missing.

    Not in stream mode: python-hyperscan 0.9 crashes on a stream that ends without a byte.
    """

    def __init__(self, needles: list[bytes]) -> None:
        hyperscan = importlib.import_module("hyperscan")
        self._needles = needles
        self._database: Any = hyperscan.Database(mode=hyperscan.HS_MODE_BLOCK)
        self._database.compile(
            expressions=[b"".join(b"\\x%02x" % byte for byte in needle) for needle in needles],
            ids=list(range(len(needles))),
            elements=len(needles),
            flags=[hyperscan.HS_FLAG_SINGLEMATCH] * len(needles),
        )

    def scan(self, block: bytes, found: set[bytes]) -> None:
        def matched(index: int, _start: int, _end: int, _flags: int, _context: object) -> None:
            found.add(self._needles[index])

        self._database.scan(block, match_event_handler=matched)


class PlainMatcher(Matcher):
    """No dependency. Few needles: one search each. Many: only runs of bytes that occur in needles are looked up.

    bytes.translate marks the bytes that occur in any needle, bytes.find finds runs of marks as long as the shortest
    needle, and a dictionary of that many first bytes says which needles may begin there. For Nix's hashes (32 of an
    alphabet of 32) this passes 0.8 GB/s; needles that use all 256 values make it slow, never wrong.
    """

    def __init__(self, needles: list[bytes]) -> None:
        self._needles = needles
        self._prefix_length = min(map(len, needles), default=1)
        alphabet = set(b"".join(needles))
        self._marks = bytes(byte in alphabet for byte in range(256))
        self._by_prefix: dict[bytes, list[bytes]] = {}
        for needle in needles:
            self._by_prefix.setdefault(needle[: self._prefix_length], []).append(needle)

    def scan(self, block: bytes, found: set[bytes]) -> None:
        if len(self._needles) <= _SEARCHED_ONE_BY_ONE_MAX:
            found.update(needle for needle in self._needles if needle not in found and needle in block)
            return
        length = self._prefix_length
        run = b"\1" * length
        marked = block.translate(self._marks)
        at = marked.find(run)
        while at >= 0:
            candidates = self._by_prefix.get(block[at : at + length], ())
            found.update(needle for needle in candidates if block.startswith(needle, at))
            at = marked.find(run, at + 1)
