"""A real HTTP server on loopback that answers as it is told: late, byte by byte, wrongly, or too much."""

import gzip
import json
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from support.ports import free_port
from zs_lightning.types import QAExample, SearchRequest


@dataclass
class Asked:
    """One request as it arrived."""

    method: str
    path: str
    params: dict
    body: object
    headers: dict
    at: float = field(default_factory=time.monotonic)


@dataclass
class Reply:
    """What the server does. `pieces` makes the body, and may be endless; without it `body` does."""

    body: object = None
    status: int = 200
    headers: dict = field(default_factory=dict)
    delay: float = 0.0
    """Seconds before the first byte."""
    drip: float = 0.0
    """Seconds between bytes, those of the head included."""
    pieces: Iterable[bytes] | None = None
    hang_up: int | None = None
    """The connection ends after so many bytes of the body."""

    def head_and_pieces(self):
        raw = self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        headers = {"Content-Type": "application/json", "Connection": "close", **self.headers}
        if self.pieces is None:
            headers["Content-Length"] = str(len(raw))
        head = f"HTTP/1.1 {self.status} X\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n"
        return head.encode(), self.pieces if self.pieces is not None else [raw[: self.hang_up]]


def zipped(raw, **options):
    """A reply that is packed as gzip."""
    return Reply(gzip.compress(raw), headers={"Content-Encoding": "gzip"}, **options)


class Listener(ThreadingHTTPServer):
    """Many may wait to be accepted: of more than the usual 5, some would be heard seconds later, or not at all."""

    request_queue_size = 256
    daemon_threads = True
    block_on_close = False


class FaultServer:
    """Answers each request with `answer(asked)`, a Reply or a JSON value. Keeps every request in `asked`."""

    def __init__(self, answer):
        self.answer, self.asked, self.stopped = answer, [], threading.Event()
        self.open, self.most_open, self.lock = 0, 0, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.handle(self)

            do_POST = do_HEAD = do_GET

            def log_message(self, *_):
                pass

        # Behind its end nobody else may answer there.
        self.server = Listener(("127.0.0.1", free_port()), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def url(self, path="/retrieve"):
        return f"http://127.0.0.1:{self.server.server_port}{path}"

    def handle(self, handler):
        length = int(handler.headers.get("Content-Length") or 0)
        raw, parts = handler.rfile.read(length), urlsplit(handler.path)
        params = {name: values[0] for name, values in parse_qs(parts.query).items()}
        headers = {name.lower(): value for name, value in handler.headers.items()}
        asked = Asked(handler.command, parts.path, params, json.loads(raw) if raw else None, headers)
        with self.lock:
            self.asked.append(asked)
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        try:
            try:
                reply = self.answer(asked)
                reply = reply if isinstance(reply, Reply) else Reply(reply)
                self.stopped.wait(reply.delay)
            finally:
                # Not after the last byte: a client that has its answer may ask again before this thread goes on.
                with self.lock:
                    self.open -= 1
            self.send(handler, reply)
        except OSError:
            handler.close_connection = True  # The client has had enough.

    def send(self, handler, reply):
        handler.close_connection = True
        head, pieces = reply.head_and_pieces()
        for piece in [head, *pieces] if isinstance(pieces, list) else self.after(head, pieces):
            for part in (piece[i : i + 1] for i in range(len(piece))) if reply.drip else [piece]:
                if self.stopped.is_set():
                    return
                handler.wfile.write(part)
                handler.wfile.flush()
                self.stopped.wait(reply.drip)

    @staticmethod
    def after(head, pieces):
        yield head
        yield from pieces

    def close(self):
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()


def request(query, key=None):
    """A search; its key is its query, unless another one is given."""
    example = QAExample(id="1", question="Who?", golden_answers=("Foo",), source="test")
    return SearchRequest(key=key or query, query=query, example=example, turn=1, seed=1)


def search(engine, *queries):
    """Results by key, in the order in which they came."""
    engine.submit([request(query) for query in queries])
    results = {}
    while found := engine.poll():
        results |= {result.key: result for result in found}
    assert results.keys() == set(queries)
    assert not any(result.documents for result in results.values() if result.failure)
    return results


def searching():
    """The threads of search engines."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("search-")}
