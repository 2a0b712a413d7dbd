"""Corpora of one's own: what is read of them, what is skipped, when they are indexed again, and what BM25 finds in them."""

import json
import math
import os
import random
import re
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zs_lightning.errors import UserError
from zs_lightning.search import BM25Search
from zs_lightning.search.corpus import LARGEST, WORDS, Passage, indexed, read_passages
from zs_lightning.types import QAExample, SearchRequest

EXAMPLE = QAExample(id="1", question="Who?", golden_answers=("a",), source="test")


def jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return str(path)


def read(path):
    skipped = Counter()
    return list(read_passages(str(path), skipped)), skipped


def bm25(path, tmp_path, **options):
    engine = BM25Search(corpus=str(path), cache=str(tmp_path / "cache"), **options)
    engine.setup()
    return engine


def found(engine, query, count=3):
    return [(hit.passage.id, hit.score) for hit in engine.rank([query], count)[0]]


# ---------------------------------------------------------------------- reading


def test_both_kinds_of_lines_are_read(tmp_path):
    path = jsonl(
        tmp_path / "c.jsonl",
        [
            {"id": "0", "contents": '"Red Harbor"\nA novel by Foo Bar.\nFirst edition.'},
            {"id": 1, "title": "Blue Tower", "text": "A tower."},
            {"id": "2", "text": "No title.", "title": None},
            {"contents": "One line only, of no id."},
            {"id": "4", "contents": 'He said "no".\n"Yes", she said.'},
        ],
    )
    passages, skipped = read(path)
    assert passages == [
        Passage(id="0", title="Red Harbor", text="A novel by Foo Bar.\nFirst edition."),
        Passage(id="1", title="Blue Tower", text="A tower."),
        Passage(id="2", text="No title."),
        Passage(id="c.jsonl:4", text="One line only, of no id."),
        Passage(id="4", title='He said "no".', text='"Yes", she said.'),
    ]
    assert not skipped
    assert passages[0].contents == '"Red Harbor"\nA novel by Foo Bar.\nFirst edition.'
    assert passages[2].contents == "No title."


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.text("ab\u00e9\u4e2d#", min_size=1, max_size=4), min_size=1, max_size=900))
def test_a_text_is_cut_into_passages_of_about_100_words_without_losing_any(tmp_path_factory, words):
    file = tmp_path_factory.mktemp("t") / "My notes.txt"
    file.write_text("x " + "  \n".join(words), "utf-8")
    passages, skipped = read(file)
    assert [w for p in passages for w in p.text.split()] == ["x", *words]
    sizes = [len(p.text.split()) for p in passages]
    assert max(sizes) <= 1.5 * WORDS
    assert len(sizes) == 1 or min(sizes) >= WORDS // 2 + 16
    assert len({p.id for p in passages}) == len(passages)
    assert not skipped


def test_titles_of_texts(tmp_path):
    (tmp_path / "a.md").write_text("intro\n# The *Harbor* \nbody\n# Second")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b c.rst").write_text("\ufeffbody", "utf-8")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    passages, _ = read(tmp_path)
    assert [(p.id, p.title, p.text) for p in passages] == [
        ("a.md#0", "The *Harbor*", "intro # The *Harbor* body # Second"),
        ("deep/b c.rst#0", "b c", "body"),
    ]


def test_bad_documents_are_skipped_and_counted(tmp_path, caplog):
    jsonl(
        tmp_path / "a.jsonl",
        [
            {"id": "0", "contents": "good one"},
            '{"id": "1", "contents": "half a li',
            {"id": "2", "body": "no contents"},
            {"id": "3", "contents": ["a list"]},
            {"id": "4", "contents": "  "},
            '["a", "list"]',
            "[" * 100_000,
            "",
            {"id": "5", "contents": "y" * LARGEST},
            "z" * (3 * LARGEST),
            '{"id": "6", "contents": "half a \\ud800 character"}',
            {"id": "7", "contents": "good two"},
        ],
    )
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b'{"id": "8", "contents": "\xff\xfe"}\n{"id": "9", "contents": "good three"}')
    (tmp_path / "big.txt").write_text("word " * (LARGEST // 5 + 1))
    (tmp_path / "empty.txt").write_text(" \n ")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    engine = bm25(tmp_path, tmp_path.parent / "elsewhere")
    assert [p.id for p in engine.documents] == ["0", "7", "9"]
    assert [i for i, _ in found(engine, "good")] == ["0", "7", "9"]
    _, skipped = read(tmp_path)
    assert skipped == {
        "not JSON": 2,
        "without contents or text": 3,
        "empty": 3,
        "larger than 1 MB": 3,
        "half characters": 1,
        "not UTF-8": 2,
    }
    message = next(r.getMessage() for r in caplog.records if r.name.startswith("zs_lightning"))
    said = f"search: 3 passages in {tmp_path}; skipped 14 documents: 2 not JSON, 3 without contents or text"
    assert message.startswith(said)


def test_files_that_are_passed_over_are_named_once(tmp_path, caplog):
    notes = tmp_path / "notes"
    (notes / ".git").mkdir(parents=True)
    for name in ("a.md", "b.txt", "c.org", "d.PDF", "deep.d/LICENSE", ".hidden", ".git/HEAD"):
        (notes / name).parent.mkdir(exist_ok=True)
        (notes / name).write_text("the red harbor")
    for _ in range(2):
        bm25(notes, tmp_path)
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("zs_lightning")]
    assert message == f"search: 2 passages in {notes}; passed over 3 other files: .org 1, .pdf 1, no ending 1"


def test_a_corpus_of_files_that_are_all_passed_over(tmp_path):
    (tmp_path / "a.pdf").write_text("a")
    said = r"nothing to search in .*; passed over 1 other files: \.pdf 1; expected a file or a folder of files that end in"
    with pytest.raises(ValueError, match=said):
        bm25(tmp_path, tmp_path.parent / "elsewhere")


def test_only_plain_files_of_the_folder_are_read(tmp_path, caplog):
    """A pipe would never end, and a link could lead to what is nobody's text."""
    notes = tmp_path / "notes"
    notes.mkdir()
    (tmp_path / "secret.txt").write_text("a password")
    (notes / "a.txt").write_text("a red harbor")
    (notes / "b.txt").symlink_to(notes / "a.txt")
    (notes / "gone.txt").symlink_to(notes / "nowhere")
    (notes / "c.txt").symlink_to(tmp_path / "secret.txt")
    os.mkfifo(notes / "z.txt")
    engine = bm25(notes, tmp_path)
    assert {i for i, _ in found(engine, "harbor password")} == {"a.txt#0", "b.txt#0"}
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("zs_lightning")]
    assert message.endswith("passed over 3 other files: not plain 2, links to elsewhere 1")


def test_odd_names_ids_titles_and_contents(tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / os.fsdecode(b"caf\xe9.txt")).write_text("a red harbor")
    rows = [{"id": None, "contents": None, "text": "a tower", "title": "of\nstone "}, {"id": 0, "text": "a mill"}]
    jsonl(notes / "c.jsonl", rows)
    assert read(notes)[0] == [
        Passage(id="c.jsonl:1", text="a tower", title="of stone"),
        Passage(id="0", text="a mill"),
        Passage(id="caf\\xe9.txt#0", text="a red harbor", title="caf\\xe9"),
    ]
    assert [i for i, _ in found(bm25(notes, tmp_path), "harbor")] == ["caf\\xe9.txt#0"]


def test_an_index_that_cannot_be_made_is_one_sentence(tmp_path):
    path = jsonl(tmp_path / "c.jsonl", [{"id": "0", "contents": "the of and a"}])
    with pytest.raises(UserError, match=r"^search\.corpus: no passage has a word to search for$"):
        bm25(path, tmp_path)
    with pytest.raises(UserError, match=r"^search\.cache: the index of .* cannot be written to .*: Not a directory; name"):
        bm25(jsonl(tmp_path / "d.jsonl", [{"contents": "red"}]), Path(path))


@pytest.mark.parametrize("path", ["~nouser/x", "x" * 300])
def test_places_that_cannot_be_are_one_sentence(path, tmp_path):
    known = not path.startswith("~")
    said = f"there is no file or folder {path}" if known else f"{path} is in the home of a user who is not known"
    with pytest.raises(UserError, match=rf"^search\.corpus: {said}"):
        bm25(path, tmp_path)
    corpus = jsonl(tmp_path / "c.jsonl", [{"contents": "red"}])
    said = "the index of .*File name too long" if known else f"{path} is in the home of a user who is not known"
    with pytest.raises(UserError, match=rf"^search\.cache: {said}"):
        BM25Search(corpus=corpus, cache=path).setup()


def test_an_index_of_somebody_else_is_used(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "c.jsonl", [{"id": "0", "contents": "red"}])
    bm25(path, tmp_path)

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    assert [i for i, _ in found(bm25(path, tmp_path), "red")] == ["0"]


def test_an_index_cut_short_is_made_anew(tmp_path):
    path = jsonl(tmp_path / "c.jsonl", [{"id": str(i), "contents": f"red {i}"} for i in range(9)])
    bm25(path, tmp_path)
    (stored,) = tmp_path.glob("cache/*/passages.jsonl")
    os.truncate(stored, stored.stat().st_size // 2)
    assert len(found(bm25(path, tmp_path), "red", 9)) == 9


def test_processes_that_index_one_changed_corpus_at_once(tmp_path):
    path, cache = tmp_path / "c.jsonl", tmp_path / "cache"
    folders, made = [], []

    def build(folder, passages):
        made.append(folder)
        time.sleep(0.02)

    def index():
        folder = indexed(str(path), str(cache), "test", build)
        folders.append((folder / "offsets.npy").is_file())

    for number in range(12):
        jsonl(path, [{"contents": "a" * (number + 1)}])
        for old in cache.glob("*-*"):
            os.utime(old, (0, 0))
        threads = [threading.Thread(target=index) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert folders == [True] * 36
    assert len(made) == 12


@pytest.mark.parametrize("make", ["missing", "empty folder", "wrong ending", "nothing good"])
def test_nothing_to_search_is_said(make, tmp_path):
    path = tmp_path / "corpus"
    if make == "empty folder":
        path.mkdir()
    elif make == "wrong ending":
        path.write_text("a")
    elif make == "nothing good":
        path = tmp_path / "c.jsonl"
        path.write_text("{\n\n")
    said = r"no(thing to search| passage) in .*(\.jsonl|1 not JSON, 1 empty)"
    with pytest.raises(ValueError, match=rf"^search\.corpus: ({said}|there is no file or folder {path})$"):
        bm25(path, tmp_path)
    assert not [left for left in tmp_path.glob("cache/*") if left.suffix != ".lock"]


# ---------------------------------------------------------------------- the index on disk


def test_an_index_is_made_once_and_again_after_a_change(tmp_path):
    path, built = jsonl(tmp_path / "c.jsonl", [{"id": "0", "contents": "a"}]), []

    def index():
        return indexed(path, str(tmp_path / "cache"), "test", lambda folder, passages: built.append(len(passages)))

    first = index()
    assert index() == first
    assert built == [1]
    jsonl(tmp_path / "c.jsonl", [{"id": "0", "contents": "b"}])
    stat = os.stat(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    second = index()
    assert second != first
    stat = os.stat(path)
    jsonl(tmp_path / "c.jsonl", [{"id": "0", "contents": "b"}, {"id": "1", "contents": "c"}])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for old in (first, second):
        # Longer ago than somebody could still be about to open it; the second was just asked for.
        os.utime(old, (0, 0) if old == first else None)
    third = index()
    assert built == [1, 1, 2]
    assert set((tmp_path / "cache").glob("*-*")) == {second, third}
    os.utime(second, (0, 0))
    assert index() == third
    assert not second.exists()
    other = indexed(path, str(tmp_path / "cache"), "another kind", lambda *_: built.append(0))
    assert other != third
    assert third.is_dir()


def test_a_new_file_in_a_folder_is_a_change(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.txt").write_text("the red harbor")
    assert found(bm25(folder, tmp_path), "tower") == []
    (folder / "b.txt").write_text("the blue tower")
    assert [i for i, _ in found(bm25(folder, tmp_path), "tower")] == ["b.txt#0"]


def test_an_index_that_could_not_be_finished_leaves_nothing(tmp_path):
    path = jsonl(tmp_path / "c.jsonl", [{"id": "0", "contents": "a"}])

    def fail(folder, passages):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        indexed(path, str(tmp_path / "cache"), "test", fail)
    assert [left.suffix for left in (tmp_path / "cache").iterdir()] == [".lock"]


# ---------------------------------------------------------------------- BM25


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """2,000 passages of words with very different frequencies, many of them equal."""
    folder, rng = tmp_path_factory.mktemp("large"), random.Random(0)
    words = [f"w{i}" for i in range(300)]
    weights = [1 / (i + 1) for i in range(300)]
    texts = [" ".join(rng.choices(words, weights, k=rng.randint(3, 12))) for _ in range(1900)] + ["w7 w8 w9"] * 100
    path = jsonl(folder / "c.jsonl", [{"id": str(i), "title": f"t{i % 40}", "text": text} for i, text in enumerate(texts)])
    return path, folder, [f"t{i % 40} {text}" for i, text in enumerate(texts)]


def test_ranks_are_those_of_the_formula_equal_ones_in_order(large):
    """Lucene's BM25, k1 1.5 and b 0.75, computed for every passage and sorted."""
    path, folder, texts = large
    rows = [re.findall(r"\w\w+", text) for text in texts]
    mean, having = sum(map(len, rows)) / len(rows), Counter(word for row in rows for word in set(row))

    def score(query, row):
        total = 0.0
        for word in query:
            idf = math.log(1 + (len(rows) - having[word] + 0.5) / (having[word] + 0.5))
            total += idf * row.count(word) / (row.count(word) + 1.5 * (0.25 + 0.75 * len(row) / mean))
        return total

    engine, rng = bm25(path, folder), random.Random(1)
    for count in (1, 3, 10):
        for _ in range(8):
            query = rng.sample(rng.choice(rows), k=2)
            scores = {str(i): s for i, row in enumerate(rows) if (s := score(query, row)) > 0}
            got = found(engine, " ".join(query), count)
            assert [s for _, s in got] == pytest.approx(sorted(scores.values(), reverse=True)[:count], abs=1e-4)
            assert [s for _, s in got] == pytest.approx([scores[i] for i, _ in got], abs=1e-4)
    equal = [i for i, s in found(engine, "w7 w8 w9", 300) if int(i) >= 1900]
    assert len(equal) == 100
    assert equal == sorted(equal, key=int)


def test_an_index_from_disk_finds_what_a_fresh_one_does(large, tmp_path):
    path, folder, texts = large
    old, fresh = bm25(path, folder), bm25(path, tmp_path)
    queries = [text for text in texts[:50]] + ["", "the of", "nothing known here"]
    assert old.rank(queries, 5) == fresh.rank(queries, 5)
    assert [len(hits) for hits in fresh.rank(queries[-3:], 5)] == [0, 0, 0]
    assert type(old.index.scores["data"]).__name__ == "memmap"


def test_documents_have_their_titles(tmp_path):
    path = jsonl(tmp_path / "c.jsonl", [{"id": "0", "contents": '"Harbor"\nA novel.'}, {"id": "1", "contents": "A tower."}])
    engine = bm25(path, tmp_path)
    engine.submit([SearchRequest(key=q, query=q, example=EXAMPLE, turn=1, seed=1) for q in ("harbor", "tower", "sea")])
    results = {result.key: [(d.title, d.text) for d in result.documents] for result in engine.poll()}
    assert results == {"harbor": [("Harbor", "A novel.")], "tower": [("", "A tower.")], "sea": []}
    assert engine.poll() == []


def test_more_documents_than_there_are(tmp_path):
    path = jsonl(tmp_path / "c.jsonl", [{"id": "0", "contents": "red"}, {"id": "1", "contents": "red blue"}])
    assert len(bm25(path, tmp_path, count=9).rank(["red"], 9)[0]) == 2
    assert len(bm25(path, tmp_path, count=9, drop=1.0).rank(["red"], 9)[0]) == 2


# ---------------------------------------------------------------------- edges of a search


@pytest.mark.parametrize("query", ["of the", "", "zzyzx", "?!"])
def test_a_query_of_unknown_words_finds_nothing(query, tmp_path):
    path = jsonl(tmp_path / "c.jsonl", [{"id": "0", "contents": "red harbor"}, {"id": "1", "contents": "blue tower"}])
    assert found(bm25(path, tmp_path), query, 10) == []


def test_more_documents_than_there_are_cannot_be_found(tmp_path):
    path = jsonl(tmp_path / "c.jsonl", [{"id": "0", "contents": "red harbor"}, {"id": "1", "contents": "red tower"}])
    assert {i for i, _ in found(bm25(path, tmp_path), "red", 10)} == {"0", "1"}
    dropped = bm25(path, tmp_path, drop=1.0)
    assert {i for i, _ in found(dropped, "red", 10)} == {"0", "1"}
    world = BM25Search(count=10**6)
    assert 0 < len(world.rank(["author"], 10**6)[0]) < 10**6
