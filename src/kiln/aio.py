"""Asyncio tools: a producer beside a block, iterators closed in time, a bounded number of calls at once."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
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


@asynccontextmanager
async def closing(items: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """`items`, and a generator behind them closed with the block, not when it happens to be collected."""
    try:
        yield items
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()


async def each(call: Callable[[T], Awaitable[R]], arguments: Iterable[T], *, at_once: int) -> list[R]:
    """What `call` returns for each argument, in their order, with at most `at_once` calls open.

    The first error ends the other calls and is raised as it is.
    """
    todo = iter(enumerate(arguments))
    results: dict[int, R] = {}

    async def work() -> None:
        for index, argument in todo:
            results[index] = await call(argument)

    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(at_once):
                tasks.create_task(work())
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return [results[index] for index in range(len(results))]
