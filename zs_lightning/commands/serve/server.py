"""A small HTTP server with the API of Search-R1's retriever, for any engine that ranks passages.

POST /retrieve {"queries": [text], "topk": 3, "return_scores": true} answers
{"result": [[{"document": {"id": text, "contents": text}, "score": number}]]}: a list of hits for each query, in order;
without return_scores a hit is its document alone. What cannot be answered gets a 4xx status and {"error": sentence}.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from zs_lightning.errors import UserError
from zs_lightning.search.corpus import Hit, LocalSearch

LARGEST_BODY = 4_000_000
"""Bytes of one request."""
MOST_HITS = 100
"""Largest topk."""
PATIENCE = 30.0
"""Seconds a client may take to send the next bytes of its request."""


class Retriever(ThreadingHTTPServer):
    """Answers with the engine's passages until `shutdown`.

    Args:
        engine: ready to rank; one request at a time reaches it.
        host: address to listen at. Everyone who reaches it can search.
        port: 0 takes a free one; `server_port` says which.

    Raises:
        UserError: nothing can listen there.
    """

    daemon_threads = True
    request_queue_size = 128
    """Clients that may wait to be accepted; of more than the usual 5 at once, some would wait for seconds or be turned away."""

    def __init__(self, engine: LocalSearch, host: str = "127.0.0.1", port: int = 8000) -> None:
        self.engine, self.turn = engine, threading.Lock()
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"serve: cannot listen at {host}, port {port}: {error}; change --host or --port") from error

    def retrieve(self, asked: object) -> list[list[Any]]:
        """The `result` of a request's JSON. Raises BadRequest."""
        if not isinstance(asked, Mapping):
            raise BadRequest("expected a JSON object with queries")
        queries, topk, scores = asked.get("queries"), asked.get("topk"), asked.get("return_scores", False)
        if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
            raise BadRequest("queries: expected a list of texts")
        topk = self.engine.count if topk is None else topk
        if type(topk) is not int or not 1 <= topk <= MOST_HITS:
            raise BadRequest(f"topk: expected a whole number from 1 to {MOST_HITS}")
        if not isinstance(scores, bool):
            raise BadRequest("return_scores: expected true or false")
        # A half character, which JSON can hold, is no text that an encoder takes.
        queries = [query.encode("utf-8", "replace").decode() for query in queries]
        with self.turn:
            found = self.engine.rank(queries, topk)
        return [[_hit(hit, scores) for hit in hits] for hits in found]


class BadRequest(Exception):
    """The client has something to change; the message is one sentence that says what."""


def _hit(hit: Hit, score: bool) -> dict[str, Any]:
    document = {"id": hit.passage.id, "contents": hit.passage.contents}
    return {"document": document, "score": hit.score} if score else document


class _Handler(BaseHTTPRequestHandler):
    server: Retriever
    timeout = PATIENCE
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != "/retrieve":
            self._answer(404, {"error": "expected POST /retrieve"})
        elif not length.isascii() or not length.isdigit():
            self._answer(411, {"error": "expected a Content-Length"})
        elif int(length) > LARGEST_BODY:
            self._answer(413, {"error": f"expected at most {LARGEST_BODY} bytes"})
        else:
            try:
                asked = json.loads(self.rfile.read(int(length)))
            except (ValueError, RecursionError):
                self._answer(400, {"error": "expected JSON"})
                return
            try:
                result = self.server.retrieve(asked)
            except BadRequest as error:
                self._answer(400, {"error": str(error)})
                return
            self._answer(200, {"result": result})

    def do_GET(self) -> None:
        self._answer(404, {"error": "expected POST /retrieve"})

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
        """Nothing: what clients send is not for the terminal."""
