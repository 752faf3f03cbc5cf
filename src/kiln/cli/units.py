"""Sizes, times and ranges as people write them."""

import re
import time

import click

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


class Size(click.ParamType):  # type: ignore[type-arg]  # Generic only in newer versions of click.
    """Bytes, or K, M, G, T as powers of 1024."""

    name = "bytes"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        match = re.fullmatch(r"([0-9]{1,18})([KMGT]?)", str(value), re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is not a size: write a number of bytes, or one with K, M, G or T", param, ctx)
        return int(match[1]) << 10 * _POWERS[match[2].upper()]


class Duration(click.ParamType):  # type: ignore[type-arg]  # As above.
    """Seconds, or a number with s, m, h or d."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number of seconds, above 0."""
        match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd]?)", str(value))
        seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
        if not seconds:
            self.fail(f"{value!r} is not a time: write seconds above 0, or a number with s, m, h or d", param, ctx)
        return seconds


class IdRange(click.ParamType):  # type: ignore[type-arg]  # As above.
    """FIRST-LAST, decimal or 0x hexadecimal."""

    name = "first-last"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """The first and the last id."""
        if isinstance(value, tuple):
            return value
        number = r"(0x[0-9a-fA-F]{1,8}|[0-9]{1,10})"
        match = re.fullmatch(f"{number}-{number}", str(value))
        if match is None:
            self.fail(f"{value!r} is not a range: write FIRST-LAST, as in 0x70000000-0x7000ffff", param, ctx)
        first, last = int(match[1], 0), int(match[2], 0)
        if not 0 < first < last < 2**32 - 1:
            self.fail(f"{value!r} is not a range of user ids with room for a pair", param, ctx)
        return first, last


def shown_size(count: float) -> str:
    """`count` bytes for a person."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def shown_time(seconds: float) -> str:
    """`seconds` for a person."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def shown_moment(time_s: float) -> str:
    """A Unix time in the time zone of this host."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))
