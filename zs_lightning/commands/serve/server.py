"""A small HTTP server with the API of Search-R1's retriever, for any engine that ranks passages.

POST /retrieve {"queries": [text], "topk": 3, "return_scores": true} answers
{"result": [[{"document": {"id": text, "contents": text}, "score": number}]]}; without return_scores
a hit is its document alone. What cannot be answered gets a 4xx status and {"error": sentence}.
"""

import contextlib
import ipaddress
import json
import logging
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from zs_lightning.errors import UserError
from zs_lightning.search.corpus import LocalSearch

LARGEST_BODY = 4_000_000
MOST_QUERIES = 256
MOST_PASSAGES = 10_000
"""Of all queries of a request together."""
LONGEST_QUERY = 20_000
MOST_CLIENTS = 256
"""At the same time; others are turned away."""
PATIENCE = 30.0
"""Seconds in which a request has to be there, from the first byte to the last."""

_log = logging.getLogger(__name__)


class BadRequest(Exception):
    """A status, and a sentence that says what the client has to change."""


class Retriever(ThreadingHTTPServer):
    """Answers with the passages of an engine that is ready to rank. Port 0 takes a free one."""

    daemon_threads = True
    # Of more than the usual 5 clients at once, some would wait for seconds or be turned away.
    request_queue_size = 128

    def __init__(self, engine: LocalSearch, host: str = "127.0.0.1", port: int = 8000) -> None:
        self.engine = engine
        # One request at a time reaches the engine: its tokenizer is not made for more.
        self.lock = threading.Lock()
        self.free = threading.Semaphore(MOST_CLIENTS)
        self.awaited: dict[socket.socket, float] = {}
        """Connections with the time by which their request must be there."""
        self.host = host
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"serve: cannot listen at {host}, port {port}: {error}; change --host or --port") from error

    @property
    def is_private(self) -> bool:
        """Whether only this machine reaches it."""
        return ipaddress.ip_address(str(self.server_address[0])).is_loopback

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.awaited.pop(request, None)
            self.free.release()

    def service_actions(self) -> None:
        """Ends connections whose request comes byte by byte; called twice a second."""
        for connection, end in list(self.awaited.items()):
            if time.monotonic() > end:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: a client that goes away is no error."""

    def check_caller(self, host: str, origin: str | None) -> None:
        """Raises BadRequest for a page in a browser, which may have been sent here by any site."""
        try:
            name = urlsplit(f"//{host}").hostname or "localhost"
        except ValueError:
            name = ""
        known = name in ("localhost", self.host)
        if not known and self.is_private:
            with contextlib.suppress(ValueError):
                known = ipaddress.ip_address(name).is_loopback
        if origin is not None or (self.is_private and not known):
            raise BadRequest(403, "expected a program of this machine, and no web page")

    def retrieve(self, asked: object) -> list[list[Any]]:
        """The `result` of a request's JSON. Raises BadRequest."""
        asked = asked if isinstance(asked, dict) else {}
        queries = asked.get("queries")
        topk = self.engine.count if asked.get("topk") is None else asked["topk"]
        scores = asked.get("return_scores", False)
        if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
            raise BadRequest(400, "queries: expected a list of texts")
        if len(queries) > MOST_QUERIES or any(len(query) > LONGEST_QUERY for query in queries):
            raise BadRequest(400, f"queries: expected at most {MOST_QUERIES}, each of at most {LONGEST_QUERY} characters")
        if type(topk) is not int or not 1 <= topk <= 100:
            raise BadRequest(400, "topk: expected a whole number from 1 to 100")
        if topk * len(queries) > MOST_PASSAGES:
            raise BadRequest(400, f"topk: expected at most {MOST_PASSAGES} passages for all queries together")
        if not isinstance(scores, bool):
            raise BadRequest(400, "return_scores: expected true or false")
        # A half character, which JSON can hold, is no text that an encoder takes.
        queries = [query.encode("utf-8", "replace").decode() for query in queries]
        with self.lock:
            found = self.engine.rank(queries, topk)
        result: list[list[Any]] = [[] for _ in found]
        for row, hits in zip(result, found, strict=True):
            for hit in hits:
                document = {"id": hit.passage.id, "contents": hit.passage.contents}
                row.append({"document": document, "score": hit.score} if scores else document)
        return result


class _Handler(BaseHTTPRequestHandler):
    server: Retriever
    # An answer that nobody takes ends then as well.
    timeout = PATIENCE
    protocol_version = "HTTP/1.1"

    def handle_one_request(self) -> None:
        self.server.awaited[self.connection] = time.monotonic() + PATIENCE
        super().handle_one_request()

    def do_POST(self) -> None:
        try:
            found = self.server.retrieve(self._asked())
        except BadRequest as error:
            status, sentence = error.args
            self._answer(status, {"error": sentence})
        except Exception:  # noqa: BLE001 - other clients are still served
            _log.exception("serve: the engine failed")
            self._answer(500, {"error": "the engine failed"})
        else:
            self._answer(200, {"result": found})

    do_GET = do_POST

    def _asked(self) -> object:
        length = self.headers.get("Content-Length", "")
        if self.command != "POST" or self.path != "/retrieve":
            raise BadRequest(404, "expected POST /retrieve")
        if not length.isascii() or not length.isdigit():
            raise BadRequest(411, "expected a Content-Length")
        self.server.check_caller(self.headers.get("Host", ""), self.headers.get("Origin"))
        if len(length) > 7 or int(length) > LARGEST_BODY:
            raise BadRequest(413, f"expected at most {LARGEST_BODY} bytes")
        body = self.rfile.read(int(length))
        self.server.awaited.pop(self.connection, None)
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise BadRequest(400, "expected JSON") from None

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status != 200:
            # What the client sends of a refused request is not read as the next one.
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: what clients send is not for the terminal."""
