"""Asking a server for JSON: calls, what may go wrong, connections that show no key; and reading
documents out of answers, which need not be what was documented."""

import dataclasses
import email.utils
import html
import ipaddress
import json
import logging
import os
import re
import time
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from zs_lightning import __version__
from zs_lightning.errors import UserError
from zs_lightning.types import Document

CONNECT_SECONDS = 4.0
"""A server that does not even take a call for so long counts as not there."""
MOST_BYTES = 1_000_000
"""Largest answer, unpacked. Parsed, an unkind one takes some 30 MB."""
MOST_CHARACTERS = 20_000
"""Longest text of a document; far more than any policy reads of one."""

HIDDEN = "[key]"

Found = list[Document | None]
"""What a server's results are, in its order; None for one that is no document."""


class Failed(Exception):
    """A search that cannot be answered; the message is the reason."""


class Busy(Failed):
    """A failure that may pass: the call is repeated, after `wait` seconds if the server says so.
    The server may have done its work nevertheless, if the call was `sent`."""

    def __init__(self, reason: str, wait: float = 0.0, sent: bool = False) -> None:
        super().__init__(f"{reason} and asks to wait {wait:.0f} s" if wait else reason)
        self.wait = wait
        self.sent = sent


class Rejected(Failed):
    """The server is well, but does not take this one request."""


@dataclass(frozen=True)
class HttpSpec:
    """How a search server is asked.

    Args:
        timeout: seconds that one search may take in all, its repetitions included.
        concurrency: searches on their way at the same time; 1 asks one after another.
        cache: sqlite file that keeps answers over runs; null keeps none.
        mode: `cache` asks the server only for what the file lacks. `record` asks it for everything
            once and writes that down. `replay` never asks it: a query that the file lacks is a
            failed search.
    """

    timeout: float = 20.0
    concurrency: int = 8
    cache: str | None = None
    mode: Literal["cache", "record", "replay"] = "cache"

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= 3600 or self.concurrency < 1:
            wanted = "0 < timeout <= 3600 and concurrency >= 1"
            raise UserError(f"search.http: expected {wanted}; got {self.timeout}, {self.concurrency}")
        if self.mode != "cache" and not self.cache:
            raise UserError(f"search.http: mode {self.mode} needs a file; set search.http.cache")


@dataclass(frozen=True)
class Call:
    """One request to a server: a POST if it has `json`. What may hold a key is not shown."""

    params: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)
    json: Any = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)


class Secret:
    """A key that is hidden in what is shown and kept, as it is and in the spellings of JSON, HTML
    and addresses, in which servers send it back."""

    def __init__(self, key: str) -> None:
        self.pattern = re.compile("".join(map(_spelled, key)) or "(?!)")

    def hide(self, value: Any) -> Any:
        """A value of JSON without the key in its texts."""
        if isinstance(value, str):
            return self.pattern.sub(HIDDEN, value)
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        return {name: self.hide(item) for name, item in value.items()} if isinstance(value, dict) else value


def _spelled(c: str) -> str:
    plain = f"{re.escape(c)}|\\\\{re.escape(c)}|{re.escape(html.escape(c))}"
    return f"(?:{plain}|(?i:%{ord(c):02x}|\\\\u{ord(c):04x}|&#0*{ord(c)};|&#x0*{ord(c):x};))"


class Server:
    """The connections to one server, from one event loop.

    `address` decides whether the environment's proxy is used; `key` is removed from what is shown;
    `refused` says what to change when the server answers 401 or 403; `agent` is the end of the
    User-Agent; the statuses `rejects` mean that one request is wrong and not the server.
    """

    def __init__(self, address: str, key: str, refused: str, agent: str, rejects: Collection[int]) -> None:
        import httpx2

        # Their messages hold whole addresses, and with them keys.
        for name in ("httpx2", "httpcore2"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self.address = address
        self.refused = refused
        self.rejects = rejects
        self.secret = Secret(key)
        self.proxy = proxy_of(address)
        agent = f"zs_lightning/{__version__}{agent}"
        headers = {"User-Agent": agent, "Accept": "application/json", "Accept-Encoding": "gzip"}
        self.client = httpx2.AsyncClient(
            headers=headers,
            # What a server remembers of one search is not for the next one.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            # A single read has no time limit: the whole search has one, which also ends an answer
            # that arrives byte by byte.
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
            # The number of searches is limited elsewhere; by default only 100 would get through.
            limits=httpx2.Limits(max_connections=None),
            trust_env=bool(self.proxy),
            # Certificates of one's own (SSL_CERT_FILE) count without a proxy too.
            verify=httpx2.create_ssl_context() if address.startswith("https:") else True,
        )

    async def ask(self, call: Call) -> Any:
        """The JSON of the answer, or Failed. The caller ends it at a deadline, and shows no reason
        but by `said`."""
        import httpx2

        method = "GET" if call.json is None else "POST"
        options = {"params": call.params or None, "json": call.json, "headers": call.headers}
        try:
            async with self.client.stream(method, self.address, **options) as response:
                body = await _body(response)
        except httpx2.TransportError as error:
            detail = f": {error}" if str(error) else ""
            sent = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
            raise Busy(f"no connection ({type(error).__name__}{detail})", sent=sent) from None
        except zlib.error:
            raise Failed("the answer is damaged: no gzip") from None
        except (httpx2.InvalidURL, UnicodeError) as error:
            raise Failed(f"{self.address} is no address ({error})") from None
        excerpt = self._excerpt(body) if response.status_code != 200 else ""
        self._check_status(response, excerpt)
        try:
            return self.secret.hide(json.loads(body))
        except (ValueError, RecursionError):
            raise Failed(f"the answer is no JSON{self._excerpt(body)}") from None

    def _excerpt(self, body: bytes) -> str:
        # Hidden before it is cut: half a key is a secret as well.
        text = self._hidden(body.decode("utf-8", "replace"))[:160]
        return f': "{text}"' if text else ""

    def _hidden(self, text: str) -> str:
        """The text in one line, without the key and control characters."""
        # A terminal would stumble over them, and a key in UTF-16 has one after each letter.
        text = "".join(c for c in text if c.isprintable() or c.isspace())
        return str(self.secret.hide(" ".join(text.split())))

    def _check_status(self, response: Any, excerpt: str) -> None:
        status = response.status_code
        answers = f"the server answers {status}{excerpt}"
        if status == 429 or status >= 500:
            raise Busy(answers, wait_asked(response.headers.get("retry-after", "")))
        if 300 <= status < 400:
            # A server may send on with the whole of what it was asked, and so with its key.
            target = re.split("[?#]", self._hidden(response.headers.get("location", "elsewhere")))[0][:200]
            raise Failed(f"the server sends on to {target}; name the final address")
        if status in (401, 403):
            raise Failed(f"the server refuses with {status}{excerpt}; {self.refused}")
        if status in self.rejects:
            raise Rejected(answers)
        if status != 200:
            raise Failed(answers)

    def said(self, reason: str) -> str:
        """A reason as it is shown: in one line, without keys, and with the name of a proxy."""
        reason = self._hidden(reason)
        # What a proxy answers may look like the server's own trouble.
        proxy = f" (asked through the environment's proxy {self.proxy})"
        return reason + proxy if self.proxy else reason


async def _body(response: Any) -> bytes:
    """The answer's bytes. Raises Failed if they are too many, zlib.error if they are no gzip."""
    packed = response.headers.get("content-encoding", "").strip().lower() in ("gzip", "x-gzip")
    unpack = zlib.decompressobj(wbits=31)
    body, sent = b"", 0
    async for piece in response.aiter_raw():
        sent += len(piece)
        # Unpacked piece by piece: a small answer could grow beyond all memory.
        body += unpack.decompress(piece, MOST_BYTES + 1 - len(body)) if packed else piece
        if max(sent, len(body)) > MOST_BYTES:
            raise Failed(f"the answer is larger than {MOST_BYTES} bytes")
        if unpack.unused_data:
            raise Failed("the answer is damaged: more follows its end")
    if packed and sent and not unpack.eof:
        raise Failed("the answer is damaged: its end is missing")
    return body


def wait_asked(header: str) -> float:
    """Seconds of a Retry-After header, a number or a date; 0 if it is neither."""
    header = header.strip()[:40]
    if header.isascii() and header.isdigit():
        return float(header)
    try:
        then = email.utils.parsedate_to_datetime(header).timestamp()
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, then - time.time())


def proxy_of(address: str) -> str:
    """The host of the environment's proxy by which a server is asked, without user and password;
    empty for none."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    # No proxy finds a server on this machine or in a private network.
    try:
        is_near = not ipaddress.ip_address(host).is_global
    except ValueError:
        is_near = "." not in host or host.endswith(".localhost")
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
    if is_near or not proxy or proxy_bypass(host):
        return ""
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}").netloc.rpartition("@")[2]


def check_address(address: str, setting: str, example: str) -> None:
    """Raises UserError, which names the setting, if it is not http(s)://host[:port]/path."""
    try:
        parts = urlsplit(address)
        host = parts.hostname if parts.port != -1 else None
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https") or re.search(r"[\s\x00-\x1f]", address):
        # With one of these signs, it may hold a password or a key.
        got = "" if re.search("[?#@]", address) else f"; got {address}"
        raise UserError(f"{setting}: expected an address such as {example}{got}")
    if parts.username is not None or parts.query or parts.fragment:
        raise UserError(f"{setting}: expected an address without a user, a password, ? and #")


def find_key(name: str, place: str) -> str:
    """The value of the environment variable; empty for an empty name. Raises UserError if there is
    no key in it, which names the place of the options."""
    key = os.environ.get(name, "").strip()
    if name and (len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key):
        state = "does not hold a key: expected 8 or more letters and digits" if key else "is not set"
        to = f"put the key in it, or name another one in {place}.api_key_env"
        raise UserError(f"{place}: the environment variable {name} {state}; {to}")
    return key


def field(answer: Any, *path: str) -> Any:
    """The value at the end of a path of keys. Raises Failed if it is not there."""
    for name in path:
        if not isinstance(answer, dict) or name not in answer:
            raise Failed(f"the answer has no {'.'.join(path)}")
        answer = answer[name]
    return answer


def rows(items: Any) -> list[dict[str, Any]]:
    """The list, with nothing in place of what is no object. Raises Failed if it is no list."""
    if not isinstance(items, list):
        raise Failed(f"the results are no list but {type(items).__name__}")
    return [item if isinstance(item, dict) else {} for item in items]


def unmarked(text: str) -> str:
    """The text of HTML."""
    return html.unescape(re.sub(r"<[^<>]*>", "", text)).strip()


def titled(items: Any, text: str, clean: Callable[[str], str] = str.strip) -> Found:
    """Documents of a list of objects with a `title` and, under the key `text`, a text. Raises
    Failed if the items are no list, or none of them has either key."""
    found = [document(item.get(text), item.get("title"), clean) for item in rows(items)]
    # Pages without a snippet are no documents; an answer in another form is a failure.
    if items and not any(found) and not any({text, "title"} & item.keys() for item in rows(items)):
        raise Failed(f"none of the {len(items)} results has a {text}")
    return found


def document(text: Any, title: Any = "", clean: Callable[[str], str] = str.strip) -> Document | None:
    """None without a text; a title that is no text is left out."""
    cleaned = clean(text[:MOST_CHARACTERS]) if isinstance(text, str) else ""
    named = clean(title[:MOST_CHARACTERS]) if isinstance(title, str) else ""
    return Document(text=cleaned, title=named) if cleaned else None
