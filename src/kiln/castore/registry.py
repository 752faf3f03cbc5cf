"""URL -> castore, from the backends that a composition root hands in."""

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from kiln.castore.castore import Castore
from kiln.rpc.url import Url, parse_url


@dataclass(frozen=True, slots=True)
class Backend:
    """How a URL scheme is opened, and the options it knows. Leaving what `open` gives closes the store."""

    options: AbstractSet[str]
    open: Callable[[Url], AbstractAsyncContextManager[Castore]]


@dataclass(frozen=True, slots=True)
class CastoreRegistry:
    """Backends by URL scheme."""

    backends: Mapping[str, Backend]

    def open(self, url: str) -> AbstractAsyncContextManager[Castore]:
        """The castore at `url` for as long as the block. Raises UrlInvalid, listing what is known."""
        parsed = parse_url(url, {scheme: backend.options for scheme, backend in self.backends.items()})
        return self.backends[parsed.scheme].open(parsed)
