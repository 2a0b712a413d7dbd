"""What all engines behind HTTP share: they are asked in the background while the policy writes on."""

from __future__ import annotations

import asyncio
import os
import queue
import re
import threading
import time
import unicodedata
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from zs_lightning.errors import UserError
from zs_lightning.search.base import SearchEngine, beginning
from zs_lightning.search.cache import Cache
from zs_lightning.search.hosts import Host, Hosts
from zs_lightning.search.http import ATTEMPTS, Breaker, Call, Counters, Failed, Http, HttpSpec, Late, Rejected
from zs_lightning.search.json_documents import Found
from zs_lightning.types import Document, SearchRequest, SearchResult

FIRST_ATTEMPTS = 2
"""In setup, so that a server that cannot be reached is reported within 10 seconds."""
FIRST_QUERY = "Paris"


class RemoteSearch(SearchEngine):
    """A server that is asked over HTTP. To add one, write `call` and `parse`.

    One background thread asks for all searches, `http.concurrency` at a time, and ends with `close`. Whatever a server
    does, each search ends within `http.timeout` seconds of its start as documents or as a failure.

    Args:
        endpoint: whole address with scheme and path.
        count: documents per search.
        http: how the server is asked.
        api_key_env: name of the environment variable that holds the key; empty for servers without one.
    """

    most_count = 100
    longest_query = 2000
    """In characters; the server gets the beginning of a longer one."""
    most_words = 400
    refused = "search.endpoint may need another address"
    agent = ""

    def __init__(self, endpoint: str, count: int, http: HttpSpec, api_key_env: str = "") -> None:
        check_endpoint(endpoint)
        if not 1 <= count <= self.most_count:
            raise UserError(f"search.count: {self.name} returns 1 to {self.most_count} documents; got {count}")
        if api_key_env and not re.fullmatch("[A-Z][A-Z0-9_]*", api_key_env):
            # Not shown: it may be the key.
            raise UserError("search.api_key_env: expected the NAME of an environment variable, such as SEARCH_KEY")
        self.endpoint, self.count, self.http, self.api_key_env = endpoint, count, http, api_key_env
        self.key = ""
        self.counters, self.breaker = Counters(), Breaker()
        self.thread: threading.Thread | None = None
        self.is_checked = False
        self.pending = 0
        self.recorded: set[str] = set()

    @abstractmethod
    def call(self, query: str) -> Call:
        """The request for a query."""

    @abstractmethod
    def parse(self, answer: Any) -> Found:
        """The documents of a JSON answer.

        Raises:
            Failed: it is not what the server's documentation says.
        """

    # ------------------------------------------------------------------ life

    def setup(self) -> None:
        """Asks the server once, so that a run does not begin with one that cannot answer.

        Raises:
            UserError: the key is missing, the server does not answer, or there is no file to replay.
        """
        if self.is_checked:
            return
        replay = self.http.mode == "replay"
        self.key = "" if replay else find_key(self.api_key_env)
        self._open()
        if not replay:
            try:
                asyncio.run_coroutine_threadsafe(self._first(), self.loop).result()
            except Failed as error:
                self.close()
                raise UserError(f"search: {self.name} cannot be used: {error}") from None
            except KeyboardInterrupt:
                self.close()
                raise
        self.is_checked = True

    def _open(self) -> None:
        if self.thread is not None:
            return
        self.cache = Cache(self.http.cache, read_only=self.http.mode == "replay") if self.http.cache else None
        self.loop = asyncio.new_event_loop()
        self.door = self._door()
        self.slots = asyncio.Semaphore(self.http.concurrency)
        self.under_way: dict[str, asyncio.Task[tuple[Document, ...]]] = {}
        self.done: queue.SimpleQueue[SearchResult | Exception] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.loop.run_forever, name=f"search-{self.name}", daemon=True)
        self.thread.start()

    def counted(self) -> dict[str, float]:
        return asdict(self.counters)

    def _door(self) -> Hosts:
        return Hosts([Host("", Http(self.endpoint, self.counters, self.breaker, self.key, self.refused, self.agent))])

    def close(self) -> None:
        """Ends the thread and forgets searches that are under way; the next submit begins anew."""
        if self.thread is None:
            return
        asyncio.run_coroutine_threadsafe(self._stop(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        if self.cache is not None:
            self.cache.close()
        self.thread, self.pending = None, 0

    async def _stop(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.door.close()

    # ------------------------------------------------------------------ protocol

    def submit(self, requests: Sequence[SearchRequest]) -> None:
        self.setup()
        self._open()
        for request in requests:
            self.pending += 1
            asyncio.run_coroutine_threadsafe(self._answer(request), self.loop)

    def poll(self) -> list[SearchResult]:
        if not self.pending:
            return []
        try:
            first = self.done.get()
        except KeyboardInterrupt:
            self.close()
            raise
        return self._take(first) + self.ready()

    def ready(self) -> list[SearchResult]:
        results: list[SearchResult] = []
        while self.pending and not self.done.empty():
            results += self._take(self.done.get())
        return results

    def _take(self, result: SearchResult | Exception) -> list[SearchResult]:
        if isinstance(result, Exception):
            self.close()
            raise result
        self.pending -= 1
        return [result]

    # ------------------------------------------------------------------ in the thread

    async def _first(self) -> None:
        """A first call, to see whether the server can be used.

        Raises:
            Failed: it cannot; says why, and what to change.
        """
        try:
            await self._ask(FIRST_QUERY, FIRST_ATTEMPTS)
        except Failed as error:
            raise Failed(
                f"{error}; see whether {self.endpoint} runs and can be reached from here, or set search.endpoint (the whole "
                f"address, with its path)"
            ) from None

    async def _answer(self, request: SearchRequest) -> None:
        self.counters.searches += 1
        try:
            documents = await self._found(request)
            self.done.put(SearchResult(key=request.key, documents=documents, noisy=self._noisy(request)))
        except Failed as error:
            self.counters.failures += 1
            self.done.put(SearchResult(key=request.key, failure=f"{self.name}: {error}"))
        except Exception as error:
            self.done.put(error)  # Not the server's fault; poll raises it.

    async def _found(self, request: SearchRequest) -> tuple[Document, ...]:
        query = self._shortened(request.query)
        return await self._documents(query) if query else ()

    def _noisy(self, request: SearchRequest) -> bool | None:
        """The mode of a simulated engine; None for a real one."""
        return None

    def _shortened(self, query: str) -> str:
        """As much of the query as the server takes, without half characters, which cannot be sent, and control characters."""
        query = query.encode("utf-8", "replace").decode("utf-8")
        query = " ".join("".join(c for c in query if c.isspace() or unicodedata.category(c) != "Cc").split())
        shortened = beginning(query, lambda text: len(text) <= self.longest_query and text.count(" ") < self.most_words)
        self.counters.cut += len(shortened) < len(query)
        return shortened

    async def _documents(self, query: str) -> tuple[Document, ...]:
        """From the file, from the same search under way, or from the server."""
        stored = None
        if self.cache is not None and (self.http.mode != "record" or query in self.recorded):
            stored = self.cache.get((self.name, self.endpoint, query, self.count))
        if stored is not None:
            self.counters.cached += 1
            return stored
        if self.http.mode == "replay":
            raise Rejected(
                f"{self.http.cache} holds no answer to the query {query[:100]!r}; record it with search.http.mode: record"
            )
        if query in self.under_way:
            documents = await self.under_way[query]
            self.counters.cached += 1
            return documents
        self.under_way[query] = asyncio.ensure_future(self._fetch(query))
        try:
            return await self.under_way[query]
        finally:
            del self.under_way[query]

    async def _fetch(self, query: str) -> tuple[Document, ...]:
        async with self.slots:
            found = await self._ask(query, ATTEMPTS)
        self.counters.skipped += found.skipped
        documents = found.documents[: self.count]
        if self.cache is not None:
            self.cache.put((self.name, self.endpoint, query, self.count), documents)
            self.recorded.add(query)
        return documents

    async def _ask(self, query: str, attempts: int) -> Found:
        begun = time.monotonic()
        try:
            return await self.door.ask(self.call(query), self.parse, self.http.timeout, attempts)
        except Late as error:
            raise Failed(f"{error} (search.http.timeout)") from None
        finally:
            self.counters.seconds += time.monotonic() - begun


def check_endpoint(endpoint: str, setting: str = "search.endpoint", example: str = "http://127.0.0.1:8000/retrieve") -> None:
    """Raises:
    UserError: it is not http(s)://host[:port]/path.
    """
    try:
        parts = urlsplit(endpoint)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https") or re.search(r"[\s\x00-\x1f]", endpoint):
        raise UserError(f"{setting}: expected an address such as {example}; got {endpoint}")
    if parts.username is not None or parts.query or parts.fragment:
        # Not shown: it may hold a password.
        raise UserError(f"{setting}: expected an address without a user, a password, ? and #")


def find_key(name: str) -> str:
    """The value of the environment variable; empty for an empty name.

    Raises:
        UserError: there is no such variable, or it cannot be a key.
    """
    if not name:
        return ""
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(
            f"search: the environment variable {name} is not set; put the key in it, or name another one in search.api_key_env"
        )
    if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"search: the environment variable {name} does not hold a key: expected 8 or more letters and digits")
    return key
