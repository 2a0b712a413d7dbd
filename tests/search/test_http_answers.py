"""Answers of a search server that are no answers: malformed, half, or too large."""

import gzip
import json
import tracemalloc
import zlib

import pytest

from support.faultserver import Reply, search, zipped
from support.providers import answering, is_good
from zs_lightning.search import remote

TEXT = [{"document": {"contents": '"T"\nbody'}, "score": 1.0}]
MALFORMED = {
    "html": (Reply(b"<html><body>502</body></html>"), None, 0),
    "half JSON": (Reply(b'{"result": [[{"document": {"conte'), None, 0),
    "nothing": (Reply(b""), None, 0),
    "null": (Reply(None), None, 0),
    "a list": (Reply([]), None, 0),
    "another key": (Reply({"results": [TEXT]}), None, 0),
    "null result": (Reply({"result": None}), None, 0),
    "no row": (Reply({"result": []}), None, 0),
    "a row more": (Reply({"result": [TEXT, TEXT]}), None, 0),
    "null row": (Reply({"result": [None]}), None, 0),
    "a text as row": (Reply({"result": ["abc"]}), None, 0),
    "numbers as items": (Reply({"result": [[1, 2]]}), None, 0),
    "an empty row": (Reply({"result": [[]]}), [], 0),
    "a missing key": (Reply({"result": [[{"document": {"id": 1}, "score": 1.0}, *TEXT]]}), ["body"], 1),
    "wrong types": (Reply({"result": [[{"document": {"contents": 5}}, {"document": []}, None, *TEXT]]}), ["body"], 3),
    "NaN score": (Reply(b'{"result": [[{"document": {"contents": "a"}, "score": NaN}]]}'), None, 0),
    "one NaN score": (Reply({"result": [[{"document": {"contents": "a"}, "score": float("nan")}, *TEXT]]}), ["body"], 1),
    "a text as score": (Reply({"result": [[{"document": {"contents": "a"}, "score": "1"}, *TEXT]]}), ["body"], 1),
    "blank text": (Reply({"result": [[{"document": {"contents": " \n "}}, *TEXT]]}), ["body"], 1),
    "no score": (Reply({"result": [[{"document": {"contents": '"T"\nbody'}}]]}), ["body"], 0),
    "bare passage": (Reply({"result": [[{"id": "1", "contents": '"T"\nbody'}]]}), ["body"], 0),
    "no title": (Reply({"result": [[{"contents": "only text\nin lines"}]]}), ["only text\nin lines"], 0),
    "only a title": (Reply({"result": [[{"contents": '"T"\n '}]]}), ['"T"'], 0),
    "too many": (Reply({"result": [TEXT * 9]}), ["body"] * 3, 0),
    "Latin-1": (Reply('{"result": [[{"contents": "T\nMünchen"}]]}'.encode("latin-1")), None, 0),
    "half a character": (Reply(b'{"result": [[{"contents": "T\\nx\\ud800"}]]}'), ["T\nx\ud800"], 0),
    "deep": (Reply(b"[" * 100_000), None, 0),
    "a long number": (Reply(b'{"result": ' + b"9" * 10_000 + b"}"), None, 0),
    "cut off": (Reply({"result": [TEXT]}, hang_up=10), None, 0),
    "no gzip": (Reply(b"abc", headers={"Content-Encoding": "gzip"}), None, 0),
    "half gzip": (
        Reply(gzip.compress(json.dumps({"result": [TEXT]}).encode())[:-20], headers={"Content-Encoding": "gzip"}),
        None,
        0,
    ),
    "gzip": (zipped(json.dumps({"result": [TEXT]}).encode()), ["body"], 0),
    "other packing": (Reply({"result": [TEXT]}, headers={"Content-Encoding": "br"}), ["body"], 0),
    "created": (Reply({"result": [TEXT]}, status=201), None, 0),
}


def test_malformed_answers_are_failures_of_their_row_or_skipped_documents(serve, engines, monkeypatch):
    monkeypatch.setattr(remote, "MOST_FAILURES", 1000)
    server = serve(answering({name: reply for name, (reply, _, _) in MALFORMED.items()}))
    engine = engines(server.url(), concurrency=3)
    for name, (_, texts, skipped) in MALFORMED.items():
        before = engine.counters["skipped"]
        results = search(engine, f"before {name}", name, f"after {name}")
        assert is_good(results[f"before {name}"]), name
        assert is_good(results[f"after {name}"]), name
        result = results[f"{name}"]
        assert bool(result.failure) == (texts is None), (name, result)
        assert [document.text for document in result.documents] == (texts or []), name
        assert engine.counters["skipped"] - before == skipped, name
    assert engine.counters["failures"] == sum(texts is None for _, texts, _ in MALFORMED.values())


def test_failures_are_one_printable_line(serve, engines):
    engine = engines(serve(answering({"bad": Reply(b"\x1b[31m\n\x00\xff red \u202e", status=400)})).url())
    failure = search(engine, "bad")["bad"].failure
    assert failure.isprintable()
    assert "red" in failure


# ------------------------------------------------------------------------------ answers that are too large

PIECE = b" " * 65536


def bomb(size):
    """So many blanks, packed."""
    packer = zlib.compressobj(wbits=31)
    return b"".join(packer.compress(PIECE) for _ in range(size // len(PIECE))) + packer.flush()


HUGE = {
    "100 MB": Reply(pieces=(PIECE for _ in range(1600))),
    "100 MB declared": Reply(headers={"Content-Length": str(1600 * len(PIECE))}, pieces=(PIECE for _ in range(1600))),
    "gzip bomb": Reply(bomb(100_000_000), headers={"Content-Encoding": "gzip"}),
    "a million items": Reply(b'{"result": [[' + b"{}," * 1_000_000 + b"{}]]}"),
    "as many items as allowed": Reply(b'{"result": [[' + b"{}," * 330_000 + b"{}]]}"),
}


@pytest.mark.parametrize("fault", HUGE)
def test_huge_answers_are_cut_at_the_limit(serve, engines, fault):
    engine = engines(serve(answering({"huge": HUGE[fault]})).url())
    search(engine, "warm up")
    tracemalloc.start()
    try:
        result = search(engine, "huge")["huge"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (5e6 if fault.startswith("100 MB") else 80e6), peak
    assert ("larger than 1000000 bytes" in result.failure) == (fault != "as many items as allowed"), result
