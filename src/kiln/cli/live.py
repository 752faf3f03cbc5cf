"""The view for a terminal: a line for each running build, redrawn in place, and the log scrolling above."""

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from kiln.cli.view import View

_REDRAWS_PER_S = 8


@dataclass(slots=True)
class _Build:
    started_s: float
    state: str
    spinner: Spinner


@dataclass(frozen=True, slots=True)
class _AsItIs:
    """Text that rich need not understand: parsing and wrapping a long log would take minutes."""

    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Segment(self.text)


class LiveView(View):
    """Draws while its block is open; leaves only the log and kiln's own lines behind."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self.colour = self._console.color_system is not None
        self._builds: dict[str, _Build] = {}
        self._last = ""
        self._live = Live(
            console=self._console,
            get_renderable=self._drawn,
            refresh_per_second=_REDRAWS_PER_S,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def log(self, text: str) -> None:
        self._last = Text.from_ansi(text[:-1].rpartition("\n")[2]).plain
        self._print(text)

    def state(self, build_id: str, text: str) -> None:
        build = self._builds.setdefault(build_id, _Build(time.monotonic(), text, Spinner("dots")))
        build.state = text

    def ended(self, build_id: str) -> None:
        self._builds.pop(build_id, None)

    def say(self, text: str) -> None:
        self._print(f"kiln: {text}\n")

    def _print(self, text: str) -> None:
        self._console.print(_AsItIs(text), soft_wrap=True)

    def _drawn(self) -> Group:
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, style="dim")
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True, overflow="ellipsis", style="dim")
        now = time.monotonic()
        for build_id, build in self._builds.items():
            clock = _clock(now - build.started_s)
            table.add_row(build.spinner, build_id, build.state, clock, Text(self._last, no_wrap=True))
        return Group(table)


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 60}:{whole % 60:02}"
