"""The store that --store names, opened for one command."""

import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass

from kiln.castore.backends import BACKENDS
from kiln.castore.castore import Castore
from kiln.castore.closure import copy_closure
from kiln.castore.errors import IngestChanged, IngestDenied, IngestNotFound, IngestRefused
from kiln.castore.local.store import Ingested, LocalStore
from kiln.castore.model import SCHEMES, Node, Scheme
from kiln.castore.registry import CastoreRegistry
from kiln.rpc.url import Url, UrlInvalid, parse_url


@dataclass(frozen=True, slots=True)
class OpenStore:
    """A store, and where files meet it: `local` is the store itself, or a temporary one beside a store elsewhere."""

    castore: Castore
    local: LocalStore
    elsewhere: bool

    async def ingest(self, path: str) -> Ingested:
        """Import `path`; see `LocalStore.ingest`. Errors name the whole path of what they are about."""
        if not path:
            raise IngestNotFound(b"")
        root = os.path.join(os.getcwd(), path)
        try:
            found = await self.local.ingest(root)
        except (IngestDenied, IngestRefused) as error:
            raise type(error)(os.path.join(os.fsencode(root), error.path), error.why) from error
        except IngestChanged as error:
            raise IngestChanged(os.path.join(os.fsencode(root), error.path)) from error
        if self.elsewhere:
            await copy_closure([found.node], castore_of(self.local), self.castore)
        return found

    async def export(self, node: Node, destination: str) -> None:
        """Write `node` to `destination`; see `LocalStore.export`."""
        if self.elsewhere:
            await copy_closure([node], self.castore, castore_of(self.local))
        await self.local.export(node, destination)


def castore_of(store: LocalStore) -> Castore:
    """The two services of a store on disk."""
    return Castore(store.blobs, store.directories)


@asynccontextmanager
async def opened(text: str) -> AsyncIterator[OpenStore]:
    """The store at `text`, a URL or a path, for as long as the block. Raises UrlInvalid, or what its backend does."""
    url = parse_store(text)
    if url.scheme == "local":
        with opened_local(url) as store:
            yield OpenStore(castore_of(store), store, elsewhere=False)
        return
    async with CastoreRegistry(BACKENDS).open(url.text) as castore:
        with _temporary(castore.scheme) as store:
            yield OpenStore(castore, store, elsewhere=True)


def parse_store(text: str) -> Url:
    """The URL that `text` is; a plain path means a store on disk."""
    if text.startswith(("/", "./", "../")) or ":" not in text:
        return Url(text, "local", "", os.path.abspath(text), {})
    return parse_url(text, {scheme: backend.options for scheme, backend in BACKENDS.items()})


@contextmanager
def opened_local(url: Url) -> Iterator[LocalStore]:
    """The store on disk at `url`, made where there is none; its parent directories too."""
    if url.scheme != "local":
        raise UrlInvalid(url.text, "a builder here needs a store on disk, as in local:///var/lib/kiln")
    if url.authority or not url.path.startswith("/"):
        raise UrlInvalid(url.text, "a store is named by an absolute path, as in local:///var/lib/kiln")
    scheme = url.options.get("scheme")
    if scheme is not None and scheme not in SCHEMES:
        raise UrlInvalid(url.text, f"unknown castore scheme {scheme!r}; known are {', '.join(SCHEMES)}")
    durability = url.options.get("durability", "normal")
    if durability not in {"normal", "strict"}:
        raise UrlInvalid(url.text, f"unknown durability {durability!r}; known are normal, strict")
    with suppress(OSError):  # Where its parents cannot be made, opening the store says what is wrong.
        os.makedirs(os.path.dirname(url.path), exist_ok=True)
    store = LocalStore.open(
        url.path,
        scheme=None if scheme is None else SCHEMES[scheme],
        durability="strict" if durability == "strict" else "normal",
    )
    try:
        yield store
    finally:
        store.close()


@contextmanager
def _temporary(scheme: Scheme) -> Iterator[LocalStore]:
    with tempfile.TemporaryDirectory(prefix="kiln-") as path:
        store = LocalStore.open(os.path.join(path, "store"), scheme=scheme)
        try:
            yield store
        finally:
            store.close()
