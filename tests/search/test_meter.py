"""Measures of simulated documents, by hand on small texts."""

import pytest

from zs_lightning.search import meter
from zs_lightning.types import Document, QAExample, SearchRecord


def documents(*texts):
    return tuple(Document(text=text) for text in texts)


def record(question="Who wrote Emma?", answers=("Jane Austen",), query="author of Emma", evidence=(), shown=()):
    example = QAExample(id=question, question=question, golden_answers=tuple(answers), source="test")
    return SearchRecord(
        example=example,
        query=query,
        label="useful",
        documents=(),
        evidence=tuple(evidence),
        shown=documents(*shown),
    )


def test_recall_is_of_the_evidence_and_a_leak_of_the_answer():
    asked = record(evidence=["Emma is by Jane Austen", "wrote Emma"])
    for texts, recalled, leaked in [
        (["Nothing.", "EMMA is, by Jane Austen!"], 1.0, 1.0),
        (["Jane Austen was born in Steventon."], 0.0, 1.0),
        (["She wrote Emma."], 1.0, 0.0),
        (["Jane", "Austen"], 0.0, 0.0),
        (["Jane Austenson"], 0.0, 0.0),
        ([], 0.0, 0.0),
    ]:
        assert (meter.recalled(asked, documents(*texts)), meter.leaked(asked, documents(*texts))) == (recalled, leaked)
    assert meter.leaked(asked, [Document(title="Jane Austen", text="A life.")]) == 1.0
    assert meter.leaked(record(answers=["no", "False"]), documents("There is no harbor.", "false")) == 0.0


def test_words_that_two_results_share():
    one = documents("The red harbor is in Bergen.", "Bergen")
    assert meter.words_of(one) == {"red", "harbor", "bergen"}
    assert meter.shared_words(one, documents("A harbor of Oslo and Bergen")) == 2 / 4
    assert meter.shared_words(one, one) == meter.shared_words((), documents("of the")) == 1.0
    assert meter.shared_words(one, ()) == 0.0


def test_distinct_documents_and_repeated_words():
    assert meter.distinct(documents("A cat.", "the cat", "A dog")) == pytest.approx(2 / 3)
    # Rows of three: "one two three", "two three four", then "one two three" again; not over the border.
    assert meter.repeated(documents("one two three four", "one two three")) == pytest.approx(1 / 3)
    assert meter.repeated(documents("one two", "one two")) == 0.0
    assert meter.repeated(documents("no no no no no")) == pytest.approx(2 / 3)


def test_sentences_that_a_corpus_supports():
    text = "Emma is a novel. It was written in 1815! The?\nNobody knows"
    sentences = ["Emma is a novel.", "It was written in 1815!", "Nobody knows"]
    assert meter.sentences_of(documents(text, "小説。猫。")) == [*sentences, "小説。", "猫。"]
    known = {"Emma is a novel.", "Nobody knows"}.__contains__
    assert meter.supported(documents(text), known) == pytest.approx(2 / 3)
    assert meter.supported(documents("The?"), known) is None


def test_a_query_in_other_words():
    assert meter.turned("author of the novel Emma") == "novel Emma author of the"
    assert meter.turned("Emma") == "the Emma"
    assert meter.turned("no no") == "the no no"


def test_unrelated_queries_have_no_word_in_common():
    records = [
        record(),
        record("Where is Bergen?", ["Norway"], "location of Bergen"),
        # It has Emma in its question, so that it is near to the first though its query is not.
        record("What is the colour of Emma?", ["red"], "colour words"),
        # What it has found before is about Bergen.
        record("Who is king of Sweden?", ["Carl"], "king Sweden", shown=["Bergen is a city."]),
    ]
    for seed in range(20):
        first, second, third, fourth = meter.unrelated_queries(records, seed)
        assert first in ("location of Bergen", "king Sweden")
        assert second in ("author of Emma", "colour words", "king Sweden")
        assert third in ("location of Bergen", "king Sweden")
        assert fourth in ("author of Emma", "colour words")
    assert len({meter.unrelated_queries(records, seed)[0] for seed in range(20)}) == 2
    assert meter.unrelated_queries(records, 5) == meter.unrelated_queries(records, 5)
    assert meter.unrelated_queries(records[:1], 0) == [None]
