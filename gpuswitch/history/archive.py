"""The file that the history is in: a SQLite database that may be broken, foreign or locked, on a disk that may be full.

Everything here blocks, and belongs on a thread of its own. The file is opened for each operation: between two switches
nothing of it is held, and who moves it away gets a new one.

It has a rollback journal, no write-ahead log: the database is one file, complete in itself, and what was committed
survives a power cut (synchronous=EXTRA also syncs the directory, sqlite.org/pragma.html#pragma_synchronous). What a
write-ahead log would gain, speed and readers beside the writer, is worth nothing for a few rows a day.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

LOCKED_SECONDS = 5.0
"""How long to wait for somebody else who has the database locked."""
_APPLICATION = 0x67707573
"""`gpus`, in the database's header: it is ours (sqlite.org/pragma.html#pragma_application_id)."""
_VERSION = 1
_SCHEMA = """
CREATE TABLE switch (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL, gpu TEXT NOT NULL, target TEXT NOT NULL, count INTEGER NOT NULL,
    started INTEGER NOT NULL, finished INTEGER NOT NULL, result TEXT NOT NULL, reason TEXT NOT NULL,
    options TEXT NOT NULL, asker TEXT NOT NULL
);
CREATE TABLE step (
    switch INTEGER NOT NULL REFERENCES switch ON DELETE CASCADE, place INTEGER NOT NULL, number INTEGER NOT NULL,
    title TEXT NOT NULL, kind TEXT NOT NULL, status TEXT NOT NULL, started INTEGER NOT NULL, usec INTEGER NOT NULL,
    PRIMARY KEY (switch, place)
) WITHOUT ROWID;
"""
_RETURNS = """
CREATE TABLE IF NOT EXISTS returned (
    switch INTEGER PRIMARY KEY REFERENCES switch ON DELETE CASCADE, at INTEGER NOT NULL, state TEXT NOT NULL,
    reason TEXT NOT NULL
)
"""
"""Made when it is first needed: a version that does not know it works with the file all the same."""
_BROKEN = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR})
"""What no second try makes better; the last one is SQL that does not fit the tables."""


class ArchiveError(Exception):
    """The database cannot be read or written now; the sentence says why."""


class _UnfitError(Exception):
    """It is a database, and not a whole one of this version's."""


@dataclass(frozen=True, slots=True)
class StepEntry:
    """One step of a finished switch, once. `started` in microseconds since the epoch."""

    number: int
    title: str
    kind: str
    status: str
    started: int
    usec: int


@dataclass(frozen=True, slots=True)
class ReturnEntry:
    """The kernel has returned from the switch of this id, which had ended as wedged (`Returned` in switch/record.py).
    `at` in microseconds since the epoch; 0: nobody saw it.
    """

    id: str
    at: int
    what: str
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A finished switch. `started` and `finished` in microseconds since the epoch; `steps` in the order they ended.
    `returned`: that the kernel has, of one that was wedged.
    """

    id: str
    gpu: str
    target: str
    count: int
    started: int
    finished: int
    result: str
    reason: str
    options: Mapping[str, Any]
    requester: Mapping[str, Any]
    steps: tuple[StepEntry, ...] = ()
    returned: ReturnEntry | None = None


class Archive:
    """The database at `path`. One that cannot be what it should is set aside as `path`.bad, and a new one begun."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked_through = False

    def add(self, entries: Sequence[Entry | ReturnEntry], *, keep: int, since: int) -> None:
        """Keep these too, durably, and forget all but the last `keep`, and what was over before `since` (µs, epoch).

        Raises:
            ArchiveError: nothing was changed.
        """
        self._do(lambda database: _add(database, entries, keep, since))

    def last(self, limit: int) -> list[Entry]:
        """The last ones, newest first, without their steps.

        Raises:
            ArchiveError: it cannot be read.
        """
        return [entry for _, entry in self._do(lambda database: _select(database, "1 ORDER BY number DESC", limit))]

    def find(self, id: str) -> Entry | None:  # noqa: A002 -- as on the bus
        """One with its steps; None: it is not there.

        Raises:
            ArchiveError: it cannot be read.
        """
        return self._do(lambda database: _whole(database, id))

    def beginning_with(self, prefix: str, limit: int) -> list[str]:
        """The ids, newest first, that begin so; not more than `limit`.

        Raises:
            ArchiveError: it cannot be read.
        """
        query = "SELECT DISTINCT id FROM switch WHERE substr(id, 1, ?) = ? ORDER BY number DESC LIMIT ?"
        return self._do(lambda database: [id for (id,) in database.execute(query, (len(prefix), prefix, limit))])  # noqa: A001 -- as on the bus

    def _do(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Do it in one transaction; on a new database where this one is broken."""
        try:
            try:
                return self._attempt(work)
            except (_UnfitError, sqlite3.Error) as error:
                if not self._beyond_repair(error):
                    raise
                self._set_aside(error)
                return self._attempt(work)
        except (_UnfitError, sqlite3.Error, OSError) as error:
            raise ArchiveError(f"cannot use {self._path}: {error}") from error

    def _attempt(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self._path, timeout=LOCKED_SECONDS, isolation_level=None)) as database:
            for setting in ("journal_mode=DELETE", "synchronous=EXTRA", "foreign_keys=ON"):
                database.execute(f"PRAGMA {setting}")
            with database:
                database.execute("BEGIN")
                _know(database)
                if not self._looked_through:
                    _look_through(database)
                    self._looked_through = True
                return work(database)

    def _beyond_repair(self, error: Exception) -> bool:
        if isinstance(error, _UnfitError):
            return True
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF
        # A directory, say. One that merely cannot be opened may be whole.
        return code in _BROKEN or (code == sqlite3.SQLITE_CANTOPEN and self._path.exists() and not self._path.is_file())

    def _set_aside(self, error: Exception) -> None:
        """With its journal, which would be played back into the new one; and which it may need to be whole."""
        aside = self._path.with_name(f"{self._path.name}.bad")
        for suffix in ("", "-journal", "-wal", "-shm"):
            try:
                Path(f"{self._path}{suffix}").replace(f"{aside}{suffix}")
            except FileNotFoundError:
                Path(f"{aside}{suffix}").unlink(missing_ok=True)
        _log.warning("cannot use the history in %s (%s): it is set aside as %s", self._path, error, aside.name)


def _know(database: sqlite3.Connection) -> None:
    """Make an empty database ours; raise _UnfitError for one that is another's."""
    [[application]] = database.execute("PRAGMA application_id")
    [[version]] = database.execute("PRAGMA user_version")
    if (application, version) == (_APPLICATION, _VERSION):
        return
    [[tables]] = database.execute("SELECT count(*) FROM sqlite_schema")
    if tables and application != _APPLICATION:
        raise _UnfitError("it is another program's")
    if tables:
        raise _UnfitError(f"its version is {version}, not {_VERSION}")
    for statement in filter(str.strip, _SCHEMA.split(";")):
        database.execute(statement)
    database.execute(f"PRAGMA application_id={_APPLICATION}")
    database.execute(f"PRAGMA user_version={_VERSION}")


def _look_through(database: sqlite3.Connection) -> None:
    """Raise _UnfitError where a page makes no sense."""
    [[found]] = database.execute("PRAGMA quick_check(1)")
    if found != "ok":
        raise _UnfitError(" ".join(found.split()))


def _add(database: sqlite3.Connection, entries: Sequence[Entry | ReturnEntry], keep: int, since: int) -> None:
    for entry in entries:
        if isinstance(entry, ReturnEntry):
            _insert_return(database, entry)
        else:
            _insert(database, entry)
    database.execute("DELETE FROM switch WHERE finished < ?", (since,))
    last = "SELECT number FROM switch ORDER BY number DESC LIMIT ?"
    database.execute(f"DELETE FROM switch WHERE number NOT IN ({last})", (keep,))  # noqa: S608 -- a constant


def _insert(database: sqlite3.Connection, entry: Entry) -> None:
    row = (
        *(entry.id, entry.gpu, entry.target, entry.count, entry.started, entry.finished, entry.result, entry.reason),
        *(json.dumps(entry.options), json.dumps(entry.requester)),
    )
    number = database.execute(f"INSERT INTO switch ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?)", row).lastrowid  # noqa: S608 -- constants
    steps = [
        (number, place, step.number, step.title, step.kind, step.status, step.started, step.usec)
        for place, step in enumerate(entry.steps)
    ]
    database.executemany("INSERT INTO step VALUES (?,?,?,?,?,?,?,?)", steps)


def _insert_return(database: sqlite3.Connection, entry: ReturnEntry) -> None:
    """Beside all of that id which were wedged: a service that starts anew ends a switch once more."""
    database.execute(_RETURNS)
    wedged = database.execute("SELECT number FROM switch WHERE id = ? AND result = 'wedged'", (entry.id,)).fetchall()
    for (number,) in wedged:
        database.execute("UPDATE switch SET reason = ? WHERE number = ?", (entry.what, number))
        values = (number, entry.at, entry.state, entry.reason)
        database.execute("INSERT OR REPLACE INTO returned VALUES (?,?,?,?)", values)


_COLUMNS = "id, gpu, target, count, started, finished, result, reason, options, asker"


def _select(database: sqlite3.Connection, where: str, limit: int, *values: object) -> list[tuple[int, Entry]]:
    rows = database.execute(f"SELECT number, {_COLUMNS} FROM switch WHERE {where} LIMIT ?", (*values, limit))  # noqa: S608 -- constants
    found = [(number, _entry(dict(zip(_COLUMNS.split(", "), row, strict=True)))) for number, *row in rows]
    if not any(entry.result == "wedged" for _, entry in found) or not _has_returns(database):
        return found
    return [(number, replace(entry, returned=_return(database, number, entry))) for number, entry in found]


def _has_returns(database: sqlite3.Connection) -> bool:
    return bool(database.execute("SELECT 1 FROM sqlite_schema WHERE name = 'returned'").fetchall())


def _return(database: sqlite3.Connection, number: int, entry: Entry) -> ReturnEntry | None:
    rows = database.execute("SELECT at, state, reason FROM returned WHERE switch = ?", (number,)).fetchall()
    return ReturnEntry(entry.id, rows[0][0], entry.reason, rows[0][1], rows[0][2]) if rows else None


def _entry(row: dict[str, Any]) -> Entry:
    try:
        options, requester = json.loads(row.pop("options")), json.loads(row.pop("asker"))
        return Entry(**row, options=options, requester=requester)
    except ValueError as error:
        raise _UnfitError(f"switch {row['id']}: {error}") from error


def _whole(database: sqlite3.Connection, id: str) -> Entry | None:  # noqa: A002 -- as on the bus
    for number, entry in _select(database, "id = ? ORDER BY number DESC", 1, id):
        steps = database.execute(
            "SELECT number, title, kind, status, started, usec FROM step WHERE switch = ? ORDER BY place", (number,)
        )
        return replace(entry, steps=tuple(StepEntry(*step) for step in steps))
    return None
