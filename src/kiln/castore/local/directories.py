"""Directories in SQLite, verified whenever they are read."""

from collections.abc import AsyncIterator, Callable, Iterable

from kiln.castore.closure import sizes_of
from kiln.castore.directory_service import DirectoryService
from kiln.castore.errors import DigestMismatch, DirectoryInvalid, DirectoryNotFound, StoreCorrupt
from kiln.castore.local.database import Database
from kiln.castore.model import Digest, Directory, DirectoryNode, Scheme, printable
from kiln.castore.wire import decode_directory, encode_directory

_INSERT = "insert or ignore into directories values (?, ?)"


class LocalDirectories(DirectoryService):
    """The table `directories`. A get takes microseconds, so it runs where it is called."""

    def __init__(self, database: Database, scheme: Scheme, require_writable: Callable[[], None]) -> None:
        self._database = database
        self._scheme = scheme
        self._require_writable = require_writable

    @property
    def scheme(self) -> Scheme:
        return self._scheme

    async def missing(self, digests: Iterable[Digest]) -> frozenset[Digest]:
        wanted = frozenset(digests)
        present = self._database.among("directories", "digest", [digest.raw for digest in wanted])
        return frozenset(digest for digest in wanted if digest.raw not in present)

    async def get(self, digest: Digest) -> Directory:
        return self.read(digest)

    def read(self, digest: Digest) -> Directory:
        """`get`, for threads. Raises DirectoryNotFound, DigestMismatch, StoreCorrupt."""
        row = self._database.row("select body from directories where digest = ?", (digest.raw,))
        if row is None:
            raise DirectoryNotFound(digest)
        body = bytes(row[0])
        found = self._scheme.digest_of(body)
        if found != digest:
            raise DigestMismatch(wanted=digest, found=found, what="directory")
        try:
            return decode_directory(body)
        except DirectoryInvalid as error:  # Its digest is right, so it was stored like that.
            remedy = "`kiln store fsck --repair` drops it"
            raise StoreCorrupt(self._database.path, f"directory {digest}: {error.rule}", remedy) from error

    async def closure(self, root: Digest) -> AsyncIterator[tuple[Digest, Directory]]:
        seen = {root}
        level = [root]
        while level:
            below: list[Digest] = []
            for digest in level:
                directory = self.read(digest)
                yield digest, directory
                for _, node in directory.entries:
                    if isinstance(node, DirectoryNode) and node.digest not in seen:
                        seen.add(node.digest)
                        below.append(node.digest)
            level = below

    async def put(self, directories: Iterable[Directory]) -> Digest:
        self._require_writable()
        sizes: dict[Digest, range] = {}
        rows: list[tuple[bytes, bytes]] = []
        root: Digest | None = None
        for directory in directories:
            for name, node in directory.entries:
                if isinstance(node, DirectoryNode):
                    self._check_reference(name, node, sizes)
            body = encode_directory(directory)
            root = self._scheme.digest_of(body)
            sizes[root] = sizes_of(root, directory, self._scheme)
            rows.append((root.raw, body))
        if root is None:
            raise DirectoryInvalid("nothing to put: the root is missing")
        self.insert(rows)
        return root

    def insert(self, rows: Iterable[tuple[bytes, bytes]]) -> None:
        """Keep digests and bodies that are known to be right, in one transaction."""
        self._database.write(_INSERT, rows)

    def _check_reference(self, name: bytes, node: DirectoryNode, sizes: dict[Digest, range]) -> None:
        if node.digest not in sizes:
            try:
                sizes[node.digest] = self._scheme.sizes_of(self.read(node.digest))
            except DirectoryNotFound as error:
                raise DirectoryInvalid(
                    f"entry {printable(name)} refers to {node.digest}, which is not there"
                ) from error
        if node.size not in sizes[node.digest]:
            raise DirectoryInvalid(
                f"entry {printable(name)} states the size {node.size} instead of {sizes[node.digest][-1]}"
            )
