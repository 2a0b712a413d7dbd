"""A small HTTP server with the API of Search-R1's retriever, for any engine that ranks passages.

POST /retrieve {"queries": [text], "topk": 3, "return_scores": true} answers
{"result": [[{"document": {"id": text, "contents": text}, "score": number}]]}; without return_scores
a hit is its document alone. What cannot be answered gets a 4xx status and {"error": sentence}.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from zs_lightning.errors import UserError
from zs_lightning.search.corpus import LocalSearch

LARGEST_BODY = 4_000_000


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
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"serve: cannot listen at {host}, port {port}: {error}; change --host or --port") from error

    def retrieve(self, asked: object) -> list[list[Any]]:
        """The `result` of a request's JSON. Raises BadRequest."""
        asked = asked if isinstance(asked, dict) else {}
        queries = asked.get("queries")
        topk = self.engine.count if asked.get("topk") is None else asked["topk"]
        scores = asked.get("return_scores", False)
        if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
            raise BadRequest(400, "queries: expected a list of texts")
        if type(topk) is not int or not 1 <= topk <= 100:
            raise BadRequest(400, "topk: expected a whole number from 1 to 100")
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
    # Seconds that a client may take to send the next bytes of its request.
    timeout = 30.0
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        try:
            self._answer(200, {"result": self.server.retrieve(self._asked())})
        except BadRequest as error:
            status, sentence = error.args
            self._answer(status, {"error": sentence})

    do_GET = do_POST

    def _asked(self) -> object:
        length = self.headers.get("Content-Length", "")
        if self.command != "POST" or self.path != "/retrieve":
            raise BadRequest(404, "expected POST /retrieve")
        if not length.isascii() or not length.isdigit():
            raise BadRequest(411, "expected a Content-Length")
        if int(length) > LARGEST_BODY:
            raise BadRequest(413, f"expected at most {LARGEST_BODY} bytes")
        try:
            return json.loads(self.rfile.read(int(length)))
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
