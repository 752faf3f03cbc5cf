"""From click's synchronous commands into asyncio."""

import asyncio
from collections.abc import Coroutine


class PipeClosed(Exception):
    """Stands for BrokenPipeError, which click would take for its own to handle."""


def run_async(main: Coroutine[object, object, int]) -> int:
    """Run `main` to its end; of a group of exceptions, the first is raised as itself."""
    try:
        return asyncio.run(main)
    except BrokenPipeError as error:
        raise PipeClosed from error
    except BaseExceptionGroup as group:
        first = _first(group)
        raise (PipeClosed() if isinstance(first, BrokenPipeError) else first) from group


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
