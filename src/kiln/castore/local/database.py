"""db.sqlite: the scheme, directories, results by cache key, build records."""

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kiln.castore.errors import StoreBusy, StoreCorrupt, StoreFull, StoreReadOnly

_BUSY_TIMEOUT_S = 30.0
# The WAL's shared memory is a file of 32 KiB: where it cannot be made, SQLite says "disk I/O error", not "full".
_ROOM_BYTES_MIN = 64 * 1024
_VARIABLES_PER_QUERY = 500  # SQLite before 3.32 took 999.
_SCHEMA = """
create table if not exists meta (key text primary key, value text not null) without rowid;
create table if not exists directories (digest blob primary key, body blob not null) without rowid;
create table if not exists results (key blob primary key, value blob not null) without rowid;
create table if not exists builds (
  id text primary key, created real not null, digest blob not null, ended real,
  labels text not null, record blob not null
) without rowid;
create index if not exists builds_by_age on builds (created desc, id desc);
"""


class Database:
    """One connection, shared by the threads of this process under a lock; a call takes microseconds.

    Readers and writers of other processes do not block each other (WAL). Errors of SQLite's leave as kiln's own.
    """

    def __init__(self, path: str, *, store: str, writable: bool, strict: bool) -> None:
        self.path = path
        self._store = store
        self._lock = threading.RLock()
        with self._errors():
            self._connection = _connect(path, writable=writable)
            if writable:
                self._connection.execute("pragma journal_mode = wal")
                self._connection.execute(f"pragma synchronous = {'full' if strict else 'normal'}")
                if (
                    self._connection.execute("select 1 from sqlite_master where name = 'builds_by_age'").fetchone()
                    is None
                ):
                    self._connection.executescript(_SCHEMA)
            self._connection.execute("select 1 from meta").fetchone()

    def close(self) -> None:
        """Close the connection; the last one to close folds the WAL into the database."""
        with self._lock:
            self._connection.close()

    def row(self, statement: str, parameters: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        """The first row of a query."""
        with self._errors():
            found: tuple[Any, ...] | None = self._connection.execute(statement, parameters).fetchone()
            return found

    def rows(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        with self._errors():
            return self._connection.execute(statement, parameters).fetchall()

    def write(self, statement: str, parameters: Iterable[Sequence[Any]]) -> None:
        """Run a statement once per row of parameters, in one transaction: all or nothing."""
        with self._errors():
            self._connection.execute("begin immediate")
            try:
                self._connection.executemany(statement, parameters)
                self._connection.execute("commit")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("rollback")
                raise

    def among(self, table: str, column: str, keys: Sequence[Any]) -> set[Any]:
        """Those of `keys` that `table` has. `table` and `column` are literals of this package."""
        found: set[Any] = set()
        for start in range(0, len(keys), _VARIABLES_PER_QUERY):
            part = keys[start : start + _VARIABLES_PER_QUERY]
            marks = ",".join("?" * len(part))
            found.update(key for (key,) in self.rows(f"select {column} from {table} where {column} in ({marks})", part))  # noqa: S608 - Literals.
        return found

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise self._translated(error) from error

    def _translated(self, error: sqlite3.Error) -> Exception:
        code = getattr(error, "sqlite_errorcode", None)
        match None if code is None else code & 0xFF:  # The rest of the bits say in which operation.
            case sqlite3.SQLITE_FULL:
                return StoreFull(self._store, str(error))
            case sqlite3.SQLITE_IOERR if _room_bytes(self._store) < _ROOM_BYTES_MIN:
                return StoreFull(self._store, "no space left on its file system")
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                return StoreBusy(self._store)
            case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
                return StoreReadOnly(self._store, str(error))
            case _:
                remedy = "move it away and import again: blobs stay, directories and results are made anew"
                return StoreCorrupt(self.path, str(error), remedy)


def _room_bytes(path: str) -> int:
    """How much the file system of `path` still takes from this user."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def _connect(path: str, *, writable: bool) -> sqlite3.Connection:
    quoted = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    modes = ["rwc"] if writable else ["ro", "ro&immutable=1"]  # WAL needs to write, unless nobody can.
    for mode in modes:
        connection = sqlite3.connect(
            f"file:{quoted}?mode={mode}",
            uri=True,
            timeout=_BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            connection.execute("select 1 from sqlite_master").fetchone()
        except sqlite3.OperationalError:
            connection.close()
            if mode == modes[-1]:
                raise
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise AssertionError(modes)


class Results:
    """Opaque values under opaque keys: the action cache's table."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, key: bytes) -> bytes | None:
        """The value, or None."""
        row = self._database.row("select value from results where key = ?", (key,))
        return None if row is None else bytes(row[0])

    def put(self, key: bytes, value: bytes) -> None:
        """Set or replace the value."""
        self._database.write("insert or replace into results values (?, ?)", [(key, value)])

    def delete(self, key: bytes) -> None:
        """Forget the value; none there is no error."""
        self._database.write("delete from results where key = ?", [(key,)])


@dataclass(frozen=True, slots=True)
class BuildRow:
    """One build as the store keeps it; `record` is the build layer's, opaque here."""

    id: str
    created: float  # Seconds since the epoch.
    digest: bytes  # Of the request.
    ended: float | None  # None while it runs.
    labels: str
    record: bytes


class Builds:
    """The table of build records."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, row: BuildRow) -> None:
        """Set or replace the build of that id."""
        self._database.write(
            "insert or replace into builds (id, created, digest, ended, labels, record) values (?, ?, ?, ?, ?, ?)",
            [(row.id, row.created, row.digest, row.ended, row.labels, row.record)],
        )

    def get(self, id: str) -> BuildRow | None:
        """The build of exactly that id, or None."""
        return next(iter(self._select("where id = ?", (id,))), None)

    def with_prefix(self, prefix: str, *, limit: int = 10) -> list[BuildRow]:
        """Builds whose id begins with `prefix`, in the order of their ids."""
        return self._select("where substr(id, 1, ?) = ? order by id limit ?", (len(prefix), prefix, limit))

    def newest(self, *, limit: int, before: BuildRow | None = None) -> list[BuildRow]:
        """At most `limit` builds, the newest first; `before` is the last row of the page before."""
        if before is None:
            return self._select("order by created desc, id desc limit ?", (limit,))
        return self._select(
            "where (created, id) < (?, ?) order by created desc, id desc limit ?", (before.created, before.id, limit)
        )

    def running(self) -> list[BuildRow]:
        """All builds that have not ended, the oldest first."""
        return self._select("where ended is null order by created, id", ())

    def delete(self, id: str) -> None:
        """Forget a build; none there is no error."""
        self._database.write("delete from builds where id = ?", [(id,)])

    def _select(self, clause: str, parameters: tuple[object, ...]) -> list[BuildRow]:
        columns = "select id, created, digest, ended, labels, record from builds "
        return [BuildRow(*row) for row in self._database.rows(columns + clause, parameters)]
