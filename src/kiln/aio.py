"""Asyncio tools: a producer beside a block, its items iterated inside."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
Emit = Callable[[T], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _End:
    """The producer's last word."""

    error: Exception | None


@asynccontextmanager
async def streaming(produce: Callable[[Emit[T]], Awaitable[None]], *, capacity: int) -> AsyncIterator[AsyncIterator[T]]:
    """Run `produce` beside the block; what it emits is iterated inside, what it raises is raised there.

    A full queue holds the producer back. Leaving the block cancels it and waits for its end; what its
    cleanup raises then is raised on leaving.
    """
    queue: asyncio.Queue[T | _End] = asyncio.Queue(capacity)
    left = False

    async def run() -> None:
        error = None
        try:
            await produce(queue.put)
        except Exception as caught:  # Handed to `items`, or raised on leaving.
            if left:
                raise
            error = caught
        if not left:  # Nobody would take it from a full queue.
            await queue.put(_End(error))

    async def items() -> AsyncIterator[T]:
        while not isinstance(item := await queue.get(), _End):
            yield item
        if item.error is not None:
            raise item.error

    task = asyncio.create_task(run())
    try:
        yield items()
    finally:
        left = True
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()
