"""Answers of a search engine on disk, so that an evaluation can be repeated without its server."""

import json
import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zs_lightning.errors import UserError
from zs_lightning.types import Document

VERSION = 1
# The query of a served simulator is the JSON of its whole request.
KEY = "engine, endpoint, query, count"
TABLE = f"engine TEXT, endpoint TEXT, query TEXT, count INTEGER, documents TEXT, PRIMARY KEY ({KEY})"
Key = tuple[str, str, str, int]

_log = logging.getLogger(__name__)


def at_home(path: str, option: str) -> Path:
    """The path, its ~ replaced. Raises UserError for the home of a user who is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{option}: {path} is in the home of a user who is not known; change it") from error


class Cache:
    """Documents by engine, endpoint, query and count, in one sqlite file that runs may share. One
    of mode `replay` is never made or written; one of mode `cache` that can no longer be used (its
    disk is full, say) is left alone with a warning. All raise UserError for a file that is missing,
    damaged or no cache of this program."""

    def __init__(self, path: str, mode: str = "cache", option: str = "search.http.cache") -> None:
        self.path = at_home(path, option)
        self.option = option
        self.is_needed = mode != "cache"
        self.is_left = False
        if mode == "replay" and not os.path.isfile(self.path):
            to = f"record one with {option.removesuffix('cache')}mode: record"
            raise UserError(f"{option}: there is no file {path} to replay; {to}")
        with self._speaking():
            if mode != "replay":
                self.path.parent.mkdir(parents=True, exist_ok=True)
            name = f"{self.path.absolute().as_uri()}?mode={'ro' if mode == 'replay' else 'rwc'}"
            # Without transactions: a run that is killed has kept every answer that it got.
            # Opened where errors reach the user, then used by one other thread only.
            self.file = sqlite3.connect(name, 30, isolation_level=None, check_same_thread=False, uri=True)
            if self._version() != VERSION:
                self._make(mode == "replay")

    def _version(self) -> object:
        return self.file.execute("PRAGMA user_version").fetchone()[0]

    def _make(self, read_only: bool) -> None:
        # In one step, for another run may open it now, and this one may be killed.
        self.file.execute("BEGIN" if read_only else "BEGIN IMMEDIATE")
        tables = self.file.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        if self._version() != VERSION:
            if read_only or self._version() or tables not in ([], [("answers",)]):
                raise ValueError("it is another program's or another version's file")
            self.file.execute(f"CREATE TABLE IF NOT EXISTS answers ({TABLE})")
            self.file.execute(f"PRAGMA user_version = {VERSION}")
        self.file.execute("COMMIT")

    @contextmanager
    def _speaking(self, is_needed: bool = True) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError, TypeError) as error:
            said = f"{self.option}: {self.path} cannot be used: {error}"
            if is_needed or not isinstance(error, sqlite3.OperationalError):
                raise UserError(f"{said}; name another file") from error
            self.is_left = True
            _log.warning("%s; the run goes on without it", said)

    def get(self, *keys: Key) -> tuple[Document, ...] | None:
        """What is kept under the first of the keys that the file has."""
        select = f"SELECT documents FROM answers WHERE ({KEY}) = (?, ?, ?, ?)"
        with self._speaking(self.is_needed):
            for key in () if self.is_left else keys:
                if row := self.file.execute(select, key).fetchone():
                    pairs = json.loads(row[0])
                    return tuple(Document(title=str(title), text=str(text)) for title, text in pairs)
        return None

    def put(self, key: Key, documents: tuple[Document, ...]) -> None:
        if self.is_left:
            return
        # ASCII, because a text of JSON may hold half a character, which UTF-8 cannot.
        text = json.dumps([[document.title, document.text] for document in documents])
        with self._speaking(self.is_needed):
            self.file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)", (*key, text))

    def close(self) -> None:
        self.file.close()
