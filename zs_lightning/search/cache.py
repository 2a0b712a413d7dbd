"""Answers of a search engine on disk, so that an evaluation can be repeated without its server."""

import json
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


class Cache:
    """Documents by engine, endpoint, query and count, in one sqlite file that runs may share. One
    that is `read_only` is never made or written. All raise UserError for a file that is missing,
    damaged or no cache of this program."""

    def __init__(self, path: str, read_only: bool = False, option: str = "search.http.cache") -> None:
        self.path = Path(path)
        self.option = option
        if read_only and not self.path.is_file():
            raise UserError(f"{option}: there is no file {path} to replay; record one with search.http.mode: record")
        with self._speaking():
            if not read_only:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            name = f"{self.path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
            # Without transactions: a run that is killed has kept every answer that it got.
            # Opened where errors reach the user, then used by one other thread only.
            self.file = sqlite3.connect(name, 30, isolation_level=None, check_same_thread=False, uri=True)
            version = self.file.execute("PRAGMA user_version").fetchone()[0]
            if self.file.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                if version != VERSION:
                    raise ValueError("it is another program's or another version's file")
            elif not read_only:
                self.file.execute(f"CREATE TABLE IF NOT EXISTS answers ({TABLE})")
                self.file.execute(f"PRAGMA user_version = {VERSION}")

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError, TypeError) as error:
            raise UserError(f"{self.option}: {self.path} cannot be used: {error}; name another file") from error

    def get(self, key: Key) -> tuple[Document, ...] | None:
        with self._speaking():
            select = f"SELECT documents FROM answers WHERE ({KEY}) = (?, ?, ?, ?)"
            row = self.file.execute(select, key).fetchone()
            if row is None:
                return None
            pairs = json.loads(row[0])
            return tuple(Document(title=str(title), text=str(text)) for title, text in pairs)

    def put(self, key: Key, documents: tuple[Document, ...]) -> None:
        # ASCII, because a text of JSON may hold half a character, which UTF-8 cannot.
        text = json.dumps([[document.title, document.text] for document in documents])
        with self._speaking():
            self.file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)", (*key, text))

    def close(self) -> None:
        self.file.close()
