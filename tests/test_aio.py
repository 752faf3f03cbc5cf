"""Asyncio tools."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from kiln.aio import closing, each


async def test_each_keeps_the_order_and_the_bound() -> None:
    running = most = 0

    async def slow(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001 * (number % 3))
        running -= 1
        return number * 2

    assert await each(slow, range(50), at_once=4) == [number * 2 for number in range(50)]
    assert most == 4
    assert await each(slow, [], at_once=4) == []


async def test_the_first_error_of_each_is_raised_bare_and_ends_the_rest() -> None:
    begun = []

    async def failing(number: int) -> None:
        begun.append(number)
        if number == 2:
            raise ConnectionResetError
        await asyncio.Event().wait()

    with pytest.raises(ConnectionResetError):
        await each(failing, range(50), at_once=3)
    assert begun == [0, 1, 2]


async def test_closing_closes_with_the_block() -> None:
    closed = False

    async def items() -> AsyncIterator[int]:
        nonlocal closed
        try:
            yield 1
            yield 2
        finally:
            closed = True

    async with closing(items()) as opened:
        assert await anext(opened) == 1
    assert closed
