"""One SQLite file of records as JSON, each named by a kind and a key: what a study survives a kill in.

A row is there whole or not at all, because every write is one transaction of a write-ahead log that is synced before
`put` returns. What it refuses: a file that is not its own, and another layout.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from sedimo.codec import from_json, to_json
from sedimo.errors import InputError, StateError

Record = TypeVar("Record")
APPLICATION_ID = 0x5ED1_0001 & 0x7FFF_FFFF
LAYOUT_VERSION = 2  # 1: studies of 0.1.0
_BUSY_SECONDS = 30.0
_RETRY_SECONDS = 0.01
_SCHEMA = """
CREATE TABLE rows (
    kind TEXT NOT NULL, key TEXT NOT NULL, json TEXT NOT NULL,
    PRIMARY KEY (kind, key)
) WITHOUT ROWID
"""


class Rows:
    """An open file of rows. Several processes may read; writers wait for each other up to 30 seconds.

    Example:
        >>> rows = Rows(Path("study.sqlite"))
        >>> rows.put("trial", "0f3c", {"sqnr_db": 11.2})
        >>> rows.text("trial", "0f3c")
        '{"sqnr_db":11.2}'
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        """Opens the file, or creates it with its parent folders."""
        self.path = path
        if not path.exists():
            if not create:
                raise InputError(f"there is no study at {path}")
            path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            self._prepare()
        except (sqlite3.DatabaseError, StateError) as error:
            self._connection.close()
            if isinstance(error, StateError):
                raise
            raise StateError(f"{path} is not a readable file of rows: {error}") from error

    def put(self, kind: str, key: str, record: object) -> None:
        """Writes one row, in place of an older one of the same kind and key; durable when it returns."""
        self.put_many(kind, {key: record})

    def put_many(self, kind: str, records: Mapping[str, object]) -> None:
        """Writes the records by key, all or none of them."""
        rows = [(kind, key, to_json(record)) for key, record in records.items()]
        with self._connection as transaction:
            transaction.execute("BEGIN IMMEDIATE")
            transaction.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?)", rows)

    def get(self, record: type[Record], kind: str, key: str) -> Record | None:
        """The record of a row, or None."""
        text = self.text(kind, key)
        return None if text is None else self._read(record, kind, key, text)

    def text(self, kind: str, key: str) -> str | None:
        """The JSON text of a row, or None."""
        found = self._connection.execute("SELECT json FROM rows WHERE kind = ? AND key = ?", (kind, key)).fetchone()
        return None if found is None else str(found[0])

    def keys(self, kind: str) -> tuple[str, ...]:
        """The keys of a kind, sorted."""
        found = self._connection.execute("SELECT key FROM rows WHERE kind = ? ORDER BY key", (kind,))
        return tuple(key for (key,) in found)

    def all(self, record: type[Record], kind: str) -> tuple[Record, ...]:
        """All records of a kind, sorted by key."""
        found = self._connection.execute("SELECT key, json FROM rows WHERE kind = ? ORDER BY key", (kind,))
        return tuple(self._read(record, kind, key, text) for key, text in found)

    def close(self) -> None:
        """Closes the file; the object cannot be used afterwards."""
        self._connection.close()

    def _read(self, record: type[Record], kind: str, key: str, text: str) -> Record:
        return from_json(record, text, place=f"{self.path.name}: {kind} {key[:12]}")

    def _prepare(self) -> None:
        run = self._connection.execute
        is_empty = run("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        owner, version = run("PRAGMA application_id").fetchone()[0], run("PRAGMA user_version").fetchone()[0]
        if not (is_empty and owner == 0) and owner != APPLICATION_ID:
            raise StateError(f"{self.path} is an SQLite file of another program")
        if owner == APPLICATION_ID and version not in (0, LAYOUT_VERSION):
            age = "an older" if version < LAYOUT_VERSION else "a newer"
            raise StateError(
                f"{self.path} was written by {age} version of Sedimo (layout version {version}, this one reads "
                f"{LAYOUT_VERSION}): use a new folder, or the version that wrote it"
            )
        self._log_ahead()
        run("PRAGMA synchronous = FULL")
        if version != 0:
            return
        with self._connection:
            run("BEGIN IMMEDIATE")
            if run("PRAGMA user_version").fetchone()[0] == 0:  # else another process was faster
                run(_SCHEMA)
                run(f"PRAGMA application_id = {APPLICATION_ID}")
                run(f"PRAGMA user_version = {LAYOUT_VERSION}")

    def _log_ahead(self) -> None:
        """Switches to the write-ahead log; SQLite itself does not wait for another process that does the same."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_SECONDS)
            else:
                return
