"""What all engines behind HTTP share. A search goes through this file from top to bottom:

submit -> in the thread: _answer -> result (perhaps of a subclass) -> look_up -> _fetch -> ask ->
Server.ask
"""

import asyncio
import hashlib
import itertools
import json
import queue
import re
import threading
import time
import unicodedata
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

from zs_lightning.errors import RunError, UserError
from zs_lightning.search import http as layer
from zs_lightning.search.base import SearchEngine, beginning
from zs_lightning.search.cache import Cache
from zs_lightning.search.http import Busy, Call, Failed, Found, HttpSpec, Rejected, Server, field, titled
from zs_lightning.streams import uniform
from zs_lightning.types import Document, SearchRequest, SearchResult

ATTEMPTS = 4
BACKOFF = 0.5
"""Seconds before the first repetition, give or take a half; doubled each time."""
MOST_FAILURES = 10
"""So many searches in a row that failed end the run: a server that is gone is not asked for
ever."""
FIRST_QUERY = "Paris"
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
"""What an answer can make of a `parse`; other errors are bugs."""


COUNTED = ("searches", "calls", "retries", "cached", "failures", "skipped", "cut", "seconds")
"""What a run counts. Each search is answered by calls, without one (cached: from the file, or
together with the same one that was on its way), or not (failures). Calls are with repetitions and
that of setup; skipped results were no documents; of cut queries the beginning was sent; seconds
were spent in searches that went to a server."""


@dataclass(eq=False, repr=False)
class RemoteSearch(SearchEngine):
    """A server that is asked over HTTP. To add one, write a dataclass with `call`, and with `parse`
    if its answers are no list of titles and texts.

    A background thread asks, `http.concurrency` searches at a time, while the policy writes on.
    Whatever a server does, each search ends within `http.timeout` seconds of its start as documents
    or as a failure.

    Args:
        endpoint: the server's address.
        count: documents per search.
        http: how the server is asked.
        api_key_env: name of the environment variable that holds the key.
    """

    endpoint: str
    count: int = 5
    http: HttpSpec = HttpSpec()

    place: ClassVar[str] = "search"
    """Where its options stand, for messages."""
    # A class whose server wants a key makes this a field.
    api_key_env = ""
    # Where an answer has its results, and which key of a result is the text.
    results: ClassVar[tuple[str, ...]] = ()
    text_key = "text"
    most_count = 100
    # Of a longer query the server gets the beginning.
    longest_query = 2000
    most_words = 400
    refused = "search.endpoint may need another address"
    advice = "see whether it runs and can be reached from here, or set search.endpoint (the whole address, with its path)"
    agent = ""
    rejects: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        layer.check_address(self.endpoint, "search.endpoint", "http://127.0.0.1:8000/retrieve")
        if not 1 <= self.count <= self.most_count:
            most = f"{self.name} returns 1 to {self.most_count} documents"
            raise UserError(f"search.count: {most}; got {self.count}")
        if self.api_key_env and not re.fullmatch("[A-Z][A-Z0-9_]*", self.api_key_env):
            # What is there is not shown: it may be the key.
            raise UserError(f"{self.place}.api_key_env: expected the NAME of an environment variable, such as SEARCH_KEY")
        self.addresses = [self.endpoint]
        """The server's, or those of several that hold the same and are asked in turn."""
        self.key = ""
        self.counters: dict[str, float] = dict.fromkeys(COUNTED, 0)
        self.thread: threading.Thread | None = None
        self.is_checked = False
        self.pending = 0
        self.done: queue.SimpleQueue[SearchResult | Exception] = queue.SimpleQueue()
        self.numbers = itertools.count()
        self.failed_in_a_row = 0
        self.recorded: set[str] = set()

    @abstractmethod
    def call(self, query: str) -> Call:
        """The request for a query."""

    def parse(self, answer: Any) -> Found:
        """The documents of a JSON answer. Raises Failed if it is not as documented."""
        return titled(field(answer, *self.results), self.text_key)

    def counted(self) -> dict[str, float]:
        return dict(self.counters)

    def hit_rate(self) -> float | None:
        return self.counters["cached"] / max(1, self.counters["searches"]) if self.http.cache else None

    def setup(self) -> None:
        """Asks every server once, so that a run does not begin with one that cannot answer. Raises
        UserError if there is no key, no answer, or no file to replay."""
        if self.is_checked:
            return
        is_replay = self.http.mode == "replay"
        self.key = layer.HIDDEN if is_replay else layer.find_key(self.api_key_env, self.place)
        self._open()
        try:
            if not is_replay:
                asyncio.run_coroutine_threadsafe(self._check(), self.loop).result()
        except BaseException:
            self.close()
            raise
        self.is_checked = True

    async def _check(self) -> None:
        for server in self.servers:
            try:
                await self.ask(self.call(FIRST_QUERY), [server])
            except Failed as error:
                reason = f"{self.name} cannot be used: {server.address}: {error}; {self.advice}"
                raise UserError(f"{self.place}: {reason}") from None

    def _open(self) -> None:
        if self.thread is not None:
            return
        spec = self.http
        self.cache = Cache(spec.cache, spec.mode, f"{self.place}.http.cache") if spec.cache else None
        # A file that is locked keeps its own thread waiting, and no search.
        self.disk = ThreadPoolExecutor(1, "cache")
        refused = f"check the key in {self.api_key_env}" if self.api_key_env else self.refused
        options = (self.key, refused, self.agent, self.rejects)
        self.servers = [Server(address, *options) for address in self.addresses]
        self.loop = asyncio.new_event_loop()
        self.slots = asyncio.Semaphore(spec.concurrency)
        self.under_way: dict[str, asyncio.Task[tuple[Document, ...]]] = {}
        self.done = queue.SimpleQueue()
        # A daemon: the end of the program does not wait for a server.
        name = f"search-{self.name}"
        self.thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Ends the thread and forgets what is under way; the next submit begins anew."""
        if self.thread is None:
            return
        asyncio.run_coroutine_threadsafe(self._stop(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        if self.cache is not None:
            self.disk.submit(self.cache.close)
        self.disk.shutdown(wait=False)
        self.thread = None
        self.pending = 0

    async def _stop(self) -> None:
        # Cancelled before the loop stops, or their connections would stay open.
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self.servers:
            await server.client.aclose()

    def submit(self, requests: Sequence[SearchRequest]) -> None:
        self.setup()
        self._open()
        for request in requests:
            self.pending += 1
            asyncio.run_coroutine_threadsafe(self._answer(request), self.loop)

    def poll(self) -> list[SearchResult]:
        return [self._taken(), *self.ready()] if self.pending else []

    def ready(self) -> list[SearchResult]:
        return [self._taken() for _ in range(min(self.pending, self.done.qsize()))]

    def _taken(self) -> SearchResult:
        result = self.done.get()
        if isinstance(result, Exception):
            raise result
        self.pending -= 1
        return result

    async def _answer(self, request: SearchRequest) -> None:
        self.counters["searches"] += 1
        try:
            self.done.put(await self.result(request))
        except Failed as error:
            self.counters["failures"] += 1
            self.done.put(SearchResult(key=request.key, failure=f"{self.name}: {error}"))
        except Exception as error:  # noqa: BLE001
            # This is no failed search but the end of the run, or a bug: poll raises it.
            self.done.put(error)

    async def result(self, request: SearchRequest) -> SearchResult:
        query = self.shortened(request.query)
        documents = await self.look_up(query, self.call(query)) if query else ()
        return SearchResult(key=request.key, documents=documents)

    def shortened(self, query: str) -> str:
        """As much of the query as the server takes, without control characters."""
        # Half characters, which a policy can write, cannot be sent.
        query = query.encode("utf-8", "replace").decode("utf-8")
        kept = (c for c in query if c.isspace() or unicodedata.category(c) != "Cc")
        query = " ".join("".join(kept).split())

        def fits(text: str) -> bool:
            return len(text) <= self.longest_query and text.count(" ") < self.most_words

        shortened = beginning(query, fits)
        self.counters["cut"] += len(shortened) < len(query)
        return shortened

    async def look_up(self, query: str, call: Call) -> tuple[Document, ...]:
        """Documents from the file, from the same search under way, or from the server; they are
        kept under `query`."""
        stored = None
        if self.cache is not None and (self.http.mode != "record" or query in self.recorded):
            # Files of former versions have the name alone.
            names = (self._engine(call), self.name)
            keys = [(name, self.endpoint, query, self.count) for name in names]
            stored = await self.loop.run_in_executor(self.disk, self.cache.get, *keys)
        if stored is not None:
            self.counters["cached"] += 1
            return stored
        if self.http.mode == "replay":
            lacking = f"{self.http.cache} holds no answer to the query {query[:100]!r}"
            raise Rejected(f"{lacking}; record it with {self.place}.http.mode: record")
        if query in self.under_way:
            # Rollouts of one question often begin with the same query, and providers cost money.
            documents = await self.under_way[query]
            self.counters["cached"] += 1
            return documents
        self.under_way[query] = asyncio.ensure_future(self._fetch(query, call))
        try:
            return await self.under_way[query]
        finally:
            del self.under_way[query]

    def _engine(self, call: Call) -> str:
        """The engine with a hash of what it sends, which may depend on options of its own; without
        what holds the key."""
        secret = layer.Secret(self.key)
        sent = [secret.hide(call.json)]
        for given in (call.params, call.headers):
            hidden = secret.hide(given)
            sent.append({name: text for name, text in hidden.items() if text and layer.HIDDEN not in text})
        text = json.dumps(sent, sort_keys=True)
        return f"{self.name} {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    async def _fetch(self, query: str, call: Call) -> tuple[Document, ...]:
        # The time of a search begins here: what waits for its turn has not begun.
        async with self.slots:
            begun = time.monotonic()
            try:
                found = await self.ask(call, self.servers)
                self.failed_in_a_row = 0
            except Failed as error:
                # A rejection says that the server is there.
                self.failed_in_a_row = 0 if isinstance(error, Rejected) else self.failed_in_a_row + 1
                if self.failed_in_a_row < MOST_FAILURES:
                    raise
                self.failed_in_a_row = 0
                reason = f"{MOST_FAILURES} searches in a row failed, the last one with: {error}"
                to = "repair the server, then go on with --ckpt_path or begin anew"
                raise RunError(f"{self.place}: {self.name}: {reason}; {to}") from None
            finally:
                self.counters["seconds"] += time.monotonic() - begun
        documents = tuple(document for document in found if document is not None)[: self.count]
        self.counters["skipped"] += found.count(None)
        if self.cache is not None:
            key = (self._engine(call), self.endpoint, query, self.count)
            await self.loop.run_in_executor(self.disk, self.cache.put, key, documents)
            self.recorded.add(query)
        return documents

    def _parsed(self, answer: Any) -> Found:
        try:
            return self.parse(answer)
        except UNREADABLE as error:
            raise Failed(f"the answer cannot be read ({type(error).__name__}: {str(error)[:160]})") from error

    async def ask(self, call: Call, servers: Sequence[Server]) -> Found:
        """The documents of a server's answer within `http.timeout` seconds, or Failed."""
        # One deadline for all: calls, repetitions and the pauses between them.
        number = next(self.numbers)
        end = time.monotonic() + self.http.timeout
        before = ""
        try:
            async with asyncio.timeout(self.http.timeout):
                for repeated in itertools.count():
                    # At a repetition the next one of several servers: the first may be gone.
                    server = servers[(number + repeated) % len(servers)]
                    self.counters["calls"] += 1
                    self.counters["retries"] += repeated > 0
                    try:
                        return self._parsed(await server.ask(call))
                    except Failed as error:
                        error.args = (server.said(str(error)),)
                        if not isinstance(error, Busy):
                            raise
                        # Behind a key somebody pays, perhaps for what was lost on its way back too.
                        if repeated + 1 == (2 if self.key and error.sent else ATTEMPTS):
                            raise
                        # A draw of its own: calls that failed together do not return together.
                        chance = 0.5 + uniform("retry", call.params, call.json, repeated)
                        pause = max(error.wait, BACKOFF * 2**repeated * chance)
                        # It would end in the pause: the reason says more than "no answer".
                        if time.monotonic() + pause > end:
                            raise
                        before = f"; before that: {error}"
                    await asyncio.sleep(pause)
        except TimeoutError:
            reason = server.said(f"no answer within {self.http.timeout:g} s")
            # A server that loads its model says so at once, and then not a word for a while.
            raise Failed(f"{reason} ({self.place}.http.timeout){before}") from None
        raise AssertionError("the loop ends with a return or an error")
