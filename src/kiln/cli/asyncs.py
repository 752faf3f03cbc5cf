"""From click's synchronous commands into asyncio."""

import asyncio
from collections.abc import Coroutine


def run_async(main: Coroutine[object, object, int]) -> int:
    """Run `main` to its end; an exception that comes alone in a group comes as itself."""
    try:
        return asyncio.run(main)
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from group
