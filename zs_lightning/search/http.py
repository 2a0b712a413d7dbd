"""Asking a server for JSON: a circuit breaker, a size limit and counters, shared by all engines on the network."""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import time
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from zs_lightning import __version__
from zs_lightning.errors import UserError
from zs_lightning.search.proxy import proxy_of

ATTEMPTS = 4
BACKOFF = 0.5
"""Seconds before the first repetition, give or take a half; doubled each time."""
CONNECT_SECONDS = 4.0
"""Until a server that does not even take the call counts as not there."""
MOST_BYTES = 1_000_000
"""Of an answer, unpacked. Parsed, an unkind one takes some 30 MB."""
MOST_FAILURES = 5
"""Failed calls in a row after which the server counts as broken."""
COOL_DOWN = 10.0
"""Seconds until a server that counts as broken gets another call."""

T = TypeVar("T")


class Failed(Exception):
    """A search that cannot be answered; the message is the reason."""


class Busy(Failed):
    """A failure that may pass: the call is repeated."""


class NoConnection(Busy):
    """The server is not there, or went away before it had answered."""


class BadAnswer(Failed):
    """An answer that is not what the engine's documentation says."""


class Late(Failed):
    """There was no answer before the deadline."""


class Rejected(Failed):
    """The server is well, but does not take this one request."""


@dataclass(frozen=True)
class HttpSpec:
    """How a search server is asked.

    Args:
        timeout: seconds that one search may take in all, its repetitions included.
        concurrency: searches on their way at the same time; 1 asks one after another.
        cache: sqlite file that keeps answers over runs; null keeps none.
        mode: `cache` asks the server only for what the file lacks. `record` asks it for everything once and writes that
            down. `replay` never asks it: a query that the file lacks is a failed search.
    """

    timeout: float = 20.0
    concurrency: int = 8
    cache: str | None = None
    mode: Literal["cache", "record", "replay"] = "cache"

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= 3600 or self.concurrency < 1:
            raise UserError(
                f"search.http: expected 0 < timeout <= 3600 and concurrency >= 1; got {self.timeout}, {self.concurrency}"
            )
        if self.mode != "cache" and not self.cache:
            raise UserError(f"search.http: mode {self.mode} needs a file; set search.http.cache")


@dataclass(frozen=True)
class Call:
    """One request. `json` makes it a POST. What may hold a key is not shown."""

    url: str
    params: dict[str, str] = field(default_factory=dict, repr=False)
    json: Any = None
    headers: dict[str, str] = field(default_factory=dict, repr=False)


@dataclass
class Counters:
    """What a run asked. Each search is answered by calls of its own, without one (`cached`), or not (`failures`)."""

    searches: int = 0
    calls: int = 0
    """Requests sent, with repetitions and the first one of `setup`."""
    retries: int = 0
    cached: int = 0
    """Searches answered from the file, or together with the same query that was on its way."""
    failures: int = 0
    skipped: int = 0
    """Results that were no documents: without a text or of a wrong type."""
    cut: int = 0
    """Queries longer than the server allows, of which the beginning was sent."""
    seconds: float = 0.0
    """Spent in searches that went to the server, summed over searches."""


@dataclass
class Breaker:
    """Opens after MOST_FAILURES failed calls in a row; then one call per COOL_DOWN tries whether the server is back."""

    failures: int = 0
    closed_again: float = 0.0
    reason: str = ""

    def enter(self) -> None:
        """Before a call.

        Raises:
            Failed: the breaker is open.
        """
        if self.failures < MOST_FAILURES:
            return
        if time.monotonic() < self.closed_again:
            raise Failed(f"not asked, since {self.failures} calls in a row failed, the last one with: {self.reason}")
        # This call is the only one until it has succeeded.
        self.closed_again = time.monotonic() + COOL_DOWN

    def failed(self, reason: str) -> None:
        self.failures, self.reason = self.failures + 1, reason
        self.closed_again = time.monotonic() + COOL_DOWN

    def succeeded(self) -> None:
        self.failures = 0


class Http:
    """A client of one server. Use it in one event loop.

    Args:
        endpoint: decides whether the environment's proxy is used, see `proxy_of`.
        secret: never shown: it is removed from answers and messages.
        refused: what to change when the server answers 401 or 403.
        setting: where the user names the server.
        rejects: statuses that say that a request is wrong and not the server: they leave the breaker as it is.
    """

    def __init__(
        self,
        endpoint: str,
        counters: Counters,
        breaker: Breaker,
        secret: str,
        refused: str,
        agent: str,
        setting: str = "search.endpoint",
        rejects: Collection[int] = (),
    ) -> None:
        import httpx2

        # Their messages hold whole addresses, and with them keys.
        for name in ("httpx2", "httpcore2"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self.counters, self.breaker, self.refused = counters, breaker, refused
        self.setting, self.rejects = setting, rejects
        self.secrets = {secret, quote(secret, safe="")} - {""}
        self.not_before = 0.0
        headers = {"User-Agent": f"zs_lightning/{__version__}{agent}", "Accept": "application/json", "Accept-Encoding": "gzip"}
        self.proxy = proxy_of(endpoint)
        # No time limit for a single read: the whole search has one, which also ends what arrives byte by byte.
        timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS)
        # As many connections as searches, whose number is limited before they come here. Unless told so it takes 100.
        limits = httpx2.Limits(max_connections=None)
        # Certificates of one's own (SSL_CERT_FILE) count without a proxy too.
        verify = httpx2.create_ssl_context() if endpoint.startswith("https:") else True
        self.client = httpx2.AsyncClient(
            headers=headers, timeout=timeout, limits=limits, trust_env=bool(self.proxy), verify=verify
        )

    async def close(self) -> None:
        await self.client.aclose()

    @property
    def via(self) -> str:
        """As the end of a reason: what a proxy answers may look like the server's own trouble."""
        return f" (asked through the environment's proxy {self.proxy})" if self.proxy else ""

    async def attempt(self, call: Call, parse: Callable[[Any], T], deadline: float, repeated: bool) -> T:
        """The parsed answer. The caller ends it at the deadline (of time.monotonic).

        Raises:
            Failed: there is none; says why.
        """
        await self._pause(deadline)
        self.breaker.enter()
        self.counters.calls += 1
        self.counters.retries += repeated
        try:
            answer = parse(await self._exchange(call))
        except Failed as error:
            reason = self._shown(str(error)) + self.via
            if not isinstance(error, Rejected):
                self.breaker.failed(reason)
            raise type(error)(reason) from None
        self.breaker.succeeded()
        return answer

    async def _pause(self, deadline: float) -> None:
        """Waits as long as the server asked for, whoever was told."""
        while (pause := self.not_before - time.monotonic()) > 0:
            if self.not_before > deadline:
                raise Failed(f"the server asks to wait {pause:.0f} s, longer than a search may take (search.http.timeout)")
            await asyncio.sleep(pause)

    async def _exchange(self, call: Call) -> Any:
        import httpx2

        method = "GET" if call.json is None else "POST"
        try:
            async with self.client.stream(
                method, call.url, params=call.params or None, json=call.json, headers=call.headers
            ) as response:
                self.not_before = max(self.not_before, time.monotonic() + wait_asked(response.headers.get("retry-after", "")))
                body = await read(response)
        except httpx2.TransportError as error:
            raise NoConnection(f"no connection ({type(error).__name__}{': ' if str(error) else ''}{error})") from None
        except (httpx2.InvalidURL, UnicodeError) as error:
            raise Failed(f"{self.setting} is no address ({error})") from None
        for secret in self.secrets:
            body = body.replace(secret.encode(), b"[key]")
        self._check_status(response, body)
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise BadAnswer(f"the answer is no JSON{excerpt(body)}") from None

    def _check_status(self, response: Any, body: bytes) -> None:
        status = response.status_code
        if status == 429 or status >= 500:
            raise Busy(f"the server answers {status}{excerpt(body)}")
        if 300 <= status < 400:
            target = response.headers.get("location", "elsewhere")[:200]
            raise Failed(f"the server sends on to {target}; set {self.setting} to the final address")
        if status in (401, 403):
            raise Failed(f"the server refuses with {status}{excerpt(body)}; {self.refused}")
        if status in self.rejects:
            longer = "if its prompt is too long, lower search.max_new_tokens or give the server a longer context"
            raise Rejected(f"the server answers {status}{excerpt(body)}; {longer}")
        if status != 200:
            raise Failed(f"the server answers {status}{excerpt(body)}")

    def _shown(self, text: str) -> str:
        """Without keys, and without characters that a terminal or a file would stumble over."""
        for secret in self.secrets:
            text = text.replace(secret, "[key]")
        return "".join(c for c in text if c.isprintable())


async def read(response: Any) -> bytes:
    """The body, unpacked piece by piece so that a small answer cannot grow beyond MOST_BYTES.

    Raises:
        Failed: it is larger, or packed otherwise than asked for.
    """
    packing = response.headers.get("content-encoding", "").strip().lower() or "identity"
    if packing not in ("identity", "gzip"):
        raise BadAnswer(f"the answer is packed as {packing[:20]}, which was not asked for")
    unpack = zlib.decompressobj(wbits=31) if packing == "gzip" else None
    body = bytearray()
    async for piece in response.aiter_raw():
        try:
            body += unpack.decompress(piece, MOST_BYTES + 1 - len(body)) if unpack else piece
        except zlib.error:
            raise BadAnswer("the answer is damaged: no gzip") from None
        if len(body) > MOST_BYTES:
            raise BadAnswer(f"the answer is larger than {MOST_BYTES} bytes")
    return bytes(body)


def wait_asked(header: str) -> float:
    """Seconds of a Retry-After header: a number or a date. 0 if there is none or it is unreadable."""
    header = header.strip()[:40]
    if header.isascii() and header.isdigit():
        return min(float(header), 86400.0)
    try:
        seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(0.0, seconds), 86400.0)


def excerpt(body: bytes) -> str:
    """The beginning of what a server says, as a part of a message."""
    text = " ".join(body[:400].decode("utf-8", "replace").split())[:160]
    return f': "{text}"' if text else ""
