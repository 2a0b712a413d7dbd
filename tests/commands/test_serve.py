"""The server of local search engines: its API over plain HTTP, and the command that runs it."""

import http.client
import json
import random
import re
import signal
import socket
import struct
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from zs_lightning.cli import main
from zs_lightning.commands.serve import server as server_module
from zs_lightning.commands.serve.server import LARGEST_BODY, Retriever
from zs_lightning.search import BM25Search
from zs_lightning.search.corpus import Hit, LocalSearch, Passage

ROOT = Path(__file__).parents[2]
TEXTS = ["red harbor", "the author of the blue tower", "sea", "a novel by the river", "gold ship of the sea red", "blue blue"]


@contextmanager
def serving(engine):
    """A function that posts to the engine's server: (status, answer)."""
    with Retriever(engine, port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        def post(body, path="/retrieve", method="POST", headers=None):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, raw, headers or {})
            answer = connection.getresponse()
            content = json.loads(answer.read())
            connection.close()
            return answer.status, content

        yield post
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """An engine and what posts to its server."""
    folder = tmp_path_factory.mktemp("served")
    rows = [{"id": f"d{i}", "title": "The Red" if i == 1 else "", "text": text} for i, text in enumerate(TEXTS)]
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine = BM25Search(corpus=str(folder / "c.jsonl"), cache=str(folder / "cache"))
    with serving(engine) as post:
        yield engine, post


def test_the_server_answers_as_the_engine_ranks(served):
    engine, post = served
    queries = ["author of the blue tower", "gold sea", "zzz"]
    status, answer = post({"queries": queries, "topk": 2, "return_scores": True})
    assert status == 200
    expected = engine.rank(queries, 2)
    assert [[(h["document"]["id"], h["score"]) for h in hits] for hits in answer["result"]] == [
        [(h.passage.id, h.score) for h in hits] for hits in expected
    ]
    assert answer["result"][0][0]["document"] == {"id": "d1", "contents": '"The Red"\nthe author of the blue tower'}
    assert answer["result"][2] == []
    status, answer = post({"queries": queries[:1]})
    assert answer["result"] == [[{"id": h.passage.id, "contents": h.passage.contents} for h in engine.rank(queries[:1], 3)[0]]]
    assert post({"queries": []}) == (200, {"result": []})
    assert len(post({"queries": ["red"], "topk": 100})[1]["result"][0]) == 3


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "JSON"),
        (b"[" * 100_000, 400, "JSON"),
        (b"\xff", 400, "JSON"),
        ([], 400, "queries"),
        ({}, 400, "queries"),
        ({"queries": "red"}, 400, "queries"),
        ({"queries": [1]}, 400, "queries"),
        ({"queries": ["red"], "topk": 0}, 400, "topk"),
        ({"queries": ["red"], "topk": 101}, 400, "topk"),
        ({"queries": ["red"], "topk": True}, 400, "topk"),
        ({"queries": ["red"], "return_scores": 1}, 400, "return_scores"),
    ],
)
def test_a_wrong_request_gets_one_sentence_and_the_server_goes_on(served, body, status, said):
    _, post = served
    found, answer = post(body)
    assert (found, list(answer)) == (status, ["error"])
    assert said in answer["error"]
    assert post({"queries": ["red \ud800 harbor"]})[0] == 200


def test_other_requests_are_refused(served):
    _, post = served
    assert post({}, path="/other")[0] == 404
    assert post(b"", method="GET")[0] == 404
    assert post(b"", headers={"Content-Length": str(LARGEST_BODY + 1)})[0] == 413
    assert post(b"", headers={"Content-Length": "-1"})[0] == 411
    assert post({"queries": ["red"]})[0] == 200


class OneAtATime(LocalSearch):
    """As a tokenizer: two threads in it at once are an error."""

    def __init__(self):
        super().__init__()
        self.entered, self.most = 0, 0

    def rank(self, queries, count):
        self.entered += 1
        self.most = max(self.most, self.entered)
        time.sleep(0.02)
        self.entered -= 1
        return [[Hit(Passage(id=query, text=query), 1.0)] for query in queries]


def test_many_clients_are_answered_one_at_a_time():
    engine, got = OneAtATime(), []
    with serving(engine) as post:
        threads = [threading.Thread(target=lambda t=text: got.append((t, post({"queries": [t]})))) for text in TEXTS * 4]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(got) == 24
    assert all(answer == (200, {"result": [[{"id": text, "contents": text}]]}) for text, answer in got)
    assert engine.most == 1


def test_many_clients_may_wait_to_be_accepted():
    """Nobody accepts them here: with the usual queue of 5, the later ones would wait for a second and more."""
    with Retriever(OneAtATime(), port=0) as server, ExitStack() as clients:
        for _ in range(40):
            clients.enter_context(socket.create_connection(("127.0.0.1", server.server_port), timeout=0.5))


def test_a_port_in_use_is_said(served):
    engine, _ = served
    with Retriever(engine, port=0) as server, pytest.raises(ValueError, match=r"^serve: cannot listen at .*change --host or"):
        Retriever(engine, port=server.server_port)
    with pytest.raises(ValueError, match="cannot listen"):
        Retriever(engine, port=70_000)


# ---------------------------------------------------------------------- who may ask, how much, how slowly


def test_a_request_is_bounded(served):
    _, post = served
    assert post({"queries": ["red"] * 256, "topk": 39})[0] == 200
    assert "at most 256" in post({"queries": ["red"] * 257})[1]["error"]
    assert "at most 10000 passages" in post({"queries": ["red"] * 101, "topk": 100})[1]["error"]
    assert "20000 characters" in post({"queries": ["x" * 20_001]})[1]["error"]


def test_no_web_page_can_ask(served):
    """A page may post without asking first, and by a name of its own that points here it may read the answer."""
    _, post = served
    for name in ("localhost", "localhost:80", "127.0.0.1:1", "[::1]:8", "127.8.8.8"):
        assert post({"queries": ["red"]}, headers={"Host": name})[0] == 200
    for name in ("evil.example", "evil.example:8000", "192.168.0.1", "localhost.evil.example", "[", "127.0.0.1.nip.io"):
        assert post({"queries": ["red"]}, headers={"Host": name})[0] == 403
    assert post({"queries": ["red"]}, headers={"Origin": "http://localhost", "Content-Type": "text/plain"})[0] == 403


def raw(port, sent, wait=60.0):
    """All that the server answers to these bytes until it or we hang up."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as client:
        try:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: client.recv(65536), b""))
        except OSError:
            return b""


@contextmanager
def listening(engine, host="127.0.0.1"):
    with Retriever(engine, host, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


HEAD = b"POST /retrieve HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
GOOD = HEAD + b'20\r\nConnection: close\r\n\r\n{"queries": ["red"]}'


def test_the_server_survives_hundreds_of_broken_requests(capfd):
    draws = random.Random(0)
    parts = [
        b"\r\n",
        b"\0",
        b" ",
        b"HTTP/9.9",
        b"9" * 5000,
        b"Content-Length: 5\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"\xff" * 9,
    ]
    with listening(OneAtATime()) as server:
        for _ in range(300):
            sent = bytearray(GOOD)
            for _ in range(draws.randint(1, 4)):
                place = draws.randrange(len(sent) + 1)
                sent[place : place + draws.randint(0, 9)] = draws.choice([*parts, draws.randbytes(4)])
            answer = raw(server.server_port, bytes(sent[: draws.randint(1, 2 * len(sent))]))
            assert re.match(rb"|HTTP/1\.[01] (200|4\d\d|50[15]) |<!DOCTYPE HTML>", answer), (sent, answer)
        assert b" 200 " in raw(server.server_port, GOOD)
        assert b" 413 " in raw(server.server_port, HEAD + b"9" * 5000 + b"\r\n\r\n")
        # A client that is gone before its answer comes, and an engine that fails.
        with socket.create_connection(("127.0.0.1", server.server_port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(GOOD * 20)
        server.engine.rank = lambda queries, count: 1 / 0
        assert b"500" in raw(server.server_port, GOOD)
        end = time.monotonic() + 5
        while server.awaited and time.monotonic() < end:
            time.sleep(0.02)
        assert not server.awaited
    assert "Traceback" not in capfd.readouterr().err.replace("serve: the engine failed\nTraceback", "")


def test_slow_and_many_clients_hold_no_thread_for_ever(monkeypatch):
    monkeypatch.setattr(server_module, "PATIENCE", 1.5)
    monkeypatch.setattr(server_module, "MOST_CLIENTS", 2)
    with listening(OneAtATime()) as server, ExitStack() as clients:
        begun = time.monotonic()
        slow = [clients.enter_context(socket.create_connection(("127.0.0.1", server.server_port))) for _ in range(2)]
        for client, sent in zip(slow, (HEAD, HEAD + b"4000\r\n\r\n{"), strict=True):
            client.sendall(sent)
        # Connections are taken in their order: both slow ones are held already when this one's turn comes.
        assert raw(server.server_port, GOOD) == b""
        for client in slow:
            with suppress(OSError):
                while time.monotonic() < begun + 15:
                    time.sleep(0.1)
                    client.sendall(b" ")
            assert 1.4 < time.monotonic() - begun < 14
        # Their threads end a moment after the connections.
        while b" 200 " not in raw(server.server_port, GOOD):
            assert time.monotonic() < begun + 30
            time.sleep(0.05)


def test_the_address_of_other_machines_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Retriever, "serve_forever", lambda self: None)
    (tmp_path / "c.jsonl").write_text('{"id": "7", "contents": "red"}\n')
    options = ["serve", "--port=0", f"--search.corpus={tmp_path / 'c.jsonl'}", f"--search.cache={tmp_path / 'cache'}"]
    for host, shown, warned in (("0.0.0.0", "0.0.0.0", True), ("::1", "[::1]", False), ("127.0.0.1", "127.0.0.1", False)):
        main([*options, f"--host={host}"])
        out, err = capsys.readouterr()
        assert f"http://{shown}:" in out
        assert ("WARNING: other machines reach this address" in err) == warned


def test_the_server_listens_at_an_address_of_the_newer_kind():
    with listening(OneAtATime(), "::1") as server, socket.create_connection(("::1", server.server_port)) as client:
        client.sendall(GOOD.replace(b"localhost", b"[::1]:8000"))
        assert client.recv(100).startswith(b"HTTP/1.1 200 ")


# ---------------------------------------------------------------------- the command


def test_serve_runs_until_ctrl_c(tmp_path, warm):
    (tmp_path / "c.jsonl").write_text(json.dumps({"id": "7", "contents": '"Harbor"\nred'}) + "\n")
    options = [f"--search.corpus={tmp_path / 'c.jsonl'}", f"--search.cache={tmp_path / 'cache'}", "--search.count", "1"]
    command = warm.begin(["serve", "--port=0", "--search=BM25Search", *options], tmp_path)
    said = command.said.with_suffix(".out")
    while not said.read_text().endswith("\n") and command.runs():
        time.sleep(0.05)
    found = re.fullmatch(r"bm25: 1 passages at http://127\.0\.0\.1:(\d+)/retrieve\n", said.read_text())
    connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
    connection.request("POST", "/retrieve", json.dumps({"queries": ["red"]}))
    assert json.loads(connection.getresponse().read()) == {"result": [[{"id": "7", "contents": '"Harbor"\nred'}]]}
    command.send(signal.SIGINT)
    code, out, err = command.end()
    assert (code, out) == (0, found[0] + "\nstopped\n")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--serach=BM25Search"], "serve: unrecognized arguments: --serach=BM25Search"),
        (["--port=text"], "--port: invalid int value"),
        (["--search=Nothing"], "there is no class Nothing"),
        (["--search=SimulatorSearch"], "SimulatorSearch ranks no passages"),
    ],
)
def test_wrong_options_of_serve_are_one_sentence(options, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(["serve", *options])
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert err.count("\n") == 1
    assert said in err
