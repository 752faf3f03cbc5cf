"""Blobs as files, verified whenever they are read."""

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from contextlib import suppress

from kiln.castore.blob_service import BlobService
from kiln.castore.errors import BlobNotFound, DigestMismatch
from kiln.castore.local.files import StoreFiles, write_all
from kiln.castore.local.trouble import store_trouble
from kiln.castore.model import Digest, Scheme

_CHUNK_BYTES = 1 << 20  # What is kept in memory of a blob, on either way.
_THREAD_BYTES = 64 << 10  # Below, reading and hashing take less time than the way to a thread and back (60 us).


class LocalBlobs(BlobService):
    """blobs/ of a store."""

    def __init__(
        self, files: StoreFiles, scheme: Scheme, store: str, prepare: Callable[[], StoreFiles], *, strict: bool
    ) -> None:
        """`prepare` makes the store ready to be written, or raises StoreReadOnly."""
        self._files = files
        self._scheme = scheme
        self._store = store
        self._prepare = prepare
        self._strict = strict

    @property
    def scheme(self) -> Scheme:
        return self._scheme

    async def has(self, digest: Digest) -> bool:
        return self._files.has(digest.raw)

    async def missing(self, digests: Iterable[Digest]) -> frozenset[Digest]:
        return frozenset(digest for digest in digests if not self._files.has(digest.raw))

    async def read(self, digest: Digest) -> AsyncIterator[bytes]:
        """Every byte but the last chunk's is handed on before the whole is verified: the end is the confirmation."""
        try:
            descriptor = self._files.open(digest.raw)
        except FileNotFoundError:
            raise BlobNotFound(digest) from None
        try:
            size = os.fstat(descriptor).st_size
            hasher = self._scheme.new_hasher()

            def chunk() -> bytes:
                data = os.read(descriptor, _CHUNK_BYTES)
                hasher.update(data)
                return data

            held = chunk() if size <= _THREAD_BYTES else await asyncio.to_thread(chunk)
            while size > _CHUNK_BYTES and (following := await asyncio.to_thread(chunk)):
                yield held
                held = following
            found = Digest(hasher.digest())
            if found != digest:
                raise DigestMismatch(wanted=digest, found=found, what="blob")
            if held:
                yield held
        finally:
            os.close(descriptor)

    async def write(self, chunks: AsyncIterable[bytes]) -> Digest:
        with store_trouble(self._store):
            files = self._prepare()
            hasher = self._scheme.new_hasher()
            pending = bytearray()
            spill: tuple[str, int] | None = None
            try:
                async for chunk in chunks:
                    pending += chunk
                    if len(pending) >= _CHUNK_BYTES:
                        spill = spill or files.create()
                        await asyncio.to_thread(_spill, spill[1], hasher.update, bytes(pending))
                        pending.clear()
                data = bytes(pending)
                hasher.update(data)
                digest = hasher.digest()
                if spill is None:
                    files.put(data, digest, False)
                elif not files.has(digest):
                    write_all(spill[1], data)
                    files.keep(*spill, digest, False)
            finally:
                if spill is not None:
                    os.close(spill[1])
                    with suppress(FileNotFoundError):  # It has become the blob.
                        os.unlink(spill[0], dir_fd=files.temporary)
            if self._strict:
                await asyncio.to_thread(files.sync, digest)
            return Digest(digest)


def _spill(descriptor: int, update: Callable[[bytes], object], data: bytes) -> None:
    update(data)
    write_all(descriptor, data)
