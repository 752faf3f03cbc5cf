"""Foreign text made harmless for a terminal, and cut into lines (pure)."""

import re

LINE_BYTES_MAX = 16 * 1024
"""A longer line is cut, so that a log without any newline needs no more memory than that."""

# C0 but tab and newline, DEL and C1; what reorders text (bidirectional controls); line separators; what cannot be
# encoded.
_CONTROL = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_UNSAFE = re.compile(f"[{_CONTROL}]")
_UNSAFE_OR_NEWLINE = re.compile(f"[\n{_CONTROL}]")
# Select Graphic Rendition (ECMA-48 8.3.117) sets colours and nothing else.
_COLOUR = re.compile(r"\x1b\[[0-9;:]{0,64}m")
_COLOUR_OR_UNSAFE = re.compile(f"({_COLOUR.pattern})|[{_CONTROL}]")
_COLOURED_END = re.compile("(\x1b[^\n]*)$", re.MULTILINE)
_RESET = "\x1b[0m"


def one_line(text: str) -> str:
    r"""`text` without anything that moves the cursor, changes colours or ends the line: that is written out as \x1b."""
    return _UNSAFE_OR_NEWLINE.sub(_escape, text)


def log_text(lines: bytes, *, colour: bool) -> str:
    """Whole lines of a log, as `one_line` makes each; with `colour`, a line's colours stay and end with it."""
    # All at once, for a log can have millions of lines.
    text = lines.replace(b"\r\n", b"\n").decode("utf-8", "backslashreplace")
    if "\x1b" not in text:
        return _UNSAFE.sub(_escape, text)
    if not colour:
        return _UNSAFE.sub(_escape, _COLOUR.sub("", text))
    text = _COLOUR_OR_UNSAFE.sub(lambda match: match[1] or _escape(match), text)
    return _COLOURED_END.sub(rf"\1{_RESET}", text)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


class Lines:
    """Gathers a stream of bytes, in chunks of any size, into whole lines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """The lines that `data` completes, each with its newline."""
        data = self._rest + data
        end = data.rfind(b"\n") + 1
        lines, self._rest = data[:end], data[end:]
        if len(self._rest) > LINE_BYTES_MAX:
            lines, self._rest = lines + self._rest + b"\n", b""
        return lines

    def end(self) -> bytes:
        """The last line, where no newline ended it; it gets one."""
        rest, self._rest = self._rest, b""
        return rest + b"\n" if rest else b""
