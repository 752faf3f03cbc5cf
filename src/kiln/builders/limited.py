"""A wrapper: only so many builds at a time, and only as much memory; the others wait in line."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from kiln.aio import closing
from kiln.build.events import BuildEvent, PhaseKind, Progress, Queued, Wait
from kiln.build.model import BuildOptions, BuildRequest
from kiln.build.service import BuildService, Capabilities
from kiln.builders.admission import Admission, Place

_LOOK_EVERY_S = 1.0
_LOOKS_PER_S = 200  # Of all that wait together: a look costs 0.1 ms, so all looks together 2 % of a CPU.
_SAID = {Wait.SLOT: "as many builds run as may at a time", Wait.MEMORY: "the builds that run leave too little memory"}


class Limited(BuildService):
    """Lets builds through as `admission` says; `memory_of` tells how many bytes one may use."""

    def __init__(
        self, inner: BuildService, admission: Admission, memory_of: Callable[[BuildRequest, BuildOptions], int]
    ) -> None:
        self._inner = inner
        self._admission = admission
        self._memory_of = memory_of
        self._turns: dict[int, asyncio.Future[None]] = {}

    async def capabilities(self) -> Capabilities:
        return await self._inner.capabilities()

    @asynccontextmanager
    async def build(self, request: BuildRequest, options: BuildOptions) -> AsyncIterator[AsyncIterator[BuildEvent]]:
        ticket = self._admission.enter(self._memory_of(request, options), options.priority)
        self._turns[ticket] = asyncio.get_running_loop().create_future()
        async with AsyncExitStack() as stack:
            stack.callback(self._leave, ticket)
            self._admit()
            yield await stack.enter_async_context(closing(self._events(ticket, request, options, stack)))

    async def _events(
        self, ticket: int, request: BuildRequest, options: BuildOptions, stack: AsyncExitStack
    ) -> AsyncIterator[BuildEvent]:
        turn = self._turns[ticket]
        told: Place | None = None
        while not turn.done():
            place = self._admission.place(ticket)
            if told is None or told.wait is not place.wait:
                yield Queued(place.wait, _SAID[place.wait], place.ahead)
            elif told.ahead != place.ahead:
                yield Progress(PhaseKind.UNSPECIFIED, ahead=place.ahead)
            told = place
            pause_s = max(_LOOK_EVERY_S, self._admission.waiting / _LOOKS_PER_S)
            await asyncio.wait([turn], timeout=pause_s)
        async for event in await stack.enter_async_context(self._inner.build(request, options)):
            yield event

    def _leave(self, ticket: int) -> None:
        del self._turns[ticket]
        self._admission.leave(ticket)
        self._admit()

    def _admit(self) -> None:
        for ticket in self._admission.admit():
            self._turns[ticket].set_result(None)
