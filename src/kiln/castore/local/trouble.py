"""What the operating system says about the store's own files, as kiln's errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EDQUOT, ENOSPC, EPERM, EROFS

from kiln.castore.errors import StoreFull, StoreReadOnly


def host_trouble(error: OSError, store: str) -> str:
    """A sentence for an error of the host in the middle of a build over `store`."""
    if error.errno in {ENOSPC, EDQUOT}:
        return str(StoreFull(store, str(error.strerror)))
    return f"the host failed: {error}"


@contextmanager
def store_trouble(store: str) -> Iterator[None]:
    """Turn OSErrors about room and permissions into errors that name the store; the others pass."""
    try:
        yield
    except OSError as error:
        if error.errno in {ENOSPC, EDQUOT}:
            raise StoreFull(store, str(error.strerror)) from error
        if error.errno in {EROFS, EACCES, EPERM}:
            raise StoreReadOnly(store, str(error.strerror)) from error
        raise
