"""Foreign text made harmless for a terminal, and cut into lines (pure)."""

import re

LINE_BYTES_MAX = 16 * 1024
"""A longer line is shown in pieces, so that a log without any newline needs no more memory than that."""

# C0 but tab, DEL and C1; what reorders text (bidirectional controls); line separators; what no terminal encodes.
_CONTROL = "\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_UNSAFE = re.compile(f"[{_CONTROL}]")
_COLOUR = r"\x1b\[[0-9;:]{0,64}m"  # Select Graphic Rendition (ECMA-48 8.3.117): sets colours and nothing else.
_COLOUR_OR_UNSAFE = re.compile(f"({_COLOUR})|[{_CONTROL}]")
_RESET = "\x1b[0m"


def one_line(text: str) -> str:
    r"""`text` without anything that moves the cursor, changes colours or ends the line: that is written out as \x1b."""
    return _UNSAFE.sub(_escape, text)


def log_line(line: bytes, *, colour: bool) -> str:
    """A line of a log, without its newline, as `one_line`; with `colour`, its colours stay and end with it."""
    text = line.removesuffix(b"\r").decode("utf-8", "backslashreplace")
    if not colour:
        return one_line(re.sub(_COLOUR, "", text))
    shown = _COLOUR_OR_UNSAFE.sub(lambda match: match[1] or _escape(match), text)
    return shown + _RESET if "\x1b" in shown else shown


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


class Lines:
    """Cuts a stream of bytes, in chunks of any size, into lines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without their newlines."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        lines = [piece for line in whole for piece in _pieces(line)]
        while len(self._rest) > LINE_BYTES_MAX:
            lines.append(self._rest[:LINE_BYTES_MAX])
            self._rest = self._rest[LINE_BYTES_MAX:]
        return lines

    def end(self) -> list[bytes]:
        """The last line, where no newline ended it."""
        rest, self._rest = self._rest, b""
        return [rest] if rest else []


def _pieces(line: bytes) -> list[bytes]:
    return [line[at : at + LINE_BYTES_MAX] for at in range(0, max(len(line), 1), LINE_BYTES_MAX)]
