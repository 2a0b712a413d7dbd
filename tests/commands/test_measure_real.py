"""What simulated results are held against: a real engine, a corpus, an encoder; and how a report shows them."""

import numpy as np
import pytest
from rich.console import Console

from support.encoders import make_encoder
from zs_lightning.commands.measure_simulator.measurement import corpus_holds, cosines, examples, of_real, real_documents
from zs_lightning.commands.measure_simulator.report import Measured, Report
from zs_lightning.commands.measure_simulator.trial import Study
from zs_lightning.data.sources import MiniatureSource
from zs_lightning.runs.intervals import Interval
from zs_lightning.search import BM25Search
from zs_lightning.search.dense import Encoder
from zs_lightning.types import Document, SearchResult

RECORDS = MiniatureSource().search_records("test", 30)


def test_a_corpus_holds_a_sentence_whose_words_are_in_one_passage(tmp_path):
    (tmp_path / "a.txt").write_text("Emma is a novel by Jane Austen, printed in 1815.")
    (tmp_path / "b.txt").write_text("Bergen is a town in Norway.")
    holds = corpus_holds(BM25Search(corpus=str(tmp_path), cache=str(tmp_path / "cache")))
    assert holds("Jane Austen is the author of nothing.") is False
    assert holds("The novel Emma, by Austen!") is True
    assert holds("Emma is in Norway.") is False
    assert holds("Unknown words entirely.") is False


def test_cosines_are_those_of_the_encoder(tmp_path):
    words = "passage : red blue harbor tower sea".split()
    folder = make_encoder(tmp_path / "encoder", words)
    one, other = "red harbor", "blue tower sea"
    first, second = Encoder(folder).encode("passage", [one, other])
    # More pairs than are encoded at a time.
    found = cosines(folder)([one, one] * 40, [one, other] * 40)
    np.testing.assert_allclose(found, [1.0, float(first @ second)] * 40, atol=1e-5)


def test_the_real_documents():
    without = real_documents(RECORDS, 0, None)
    assert set(without) == {n for n, record in enumerate(RECORDS) if record.label == "useful"}
    assert without[min(without)] == RECORDS[min(without)].documents
    found = real_documents(RECORDS, 0, BM25Search())
    assert list(found) == list(range(30))
    study = Study(RECORDS, [], 0, found, None, None, None)
    measured = of_real(study, BM25Search())
    assert measured.measures["recall/useful"].mean > 0.5
    assert "form/ordered" not in measured.measures


NASTY = "<script>alert(1)</script> | [x](javascript:y) \u202e"


@pytest.fixture
def report():
    measures = {"recall/useful": Interval(0.412, 0.35, 0.47), "gap/noisy": Interval(0.3, 0.2, 0.4)}
    measures |= {"form/words": Interval(12.34, 11.0, 14.0), "cost/seconds": Interval(0.5, 0.5, 0.5)}
    real = Measured("bm25", "bm25", "", {"recall/useful": Interval(1.0, 0.9, 1.0)}, is_real=True)
    return Report([Measured("sft", "simulator", "runs/a", measures), real], {"rows": 40, "split": "test", "seed": 0})


def test_a_table_by_hand(report):
    rows = [[cell.value + (f" ({cell.below})" if cell.below else "") for cell in row] for row in report.table().rows()]
    assert rows == [
        ["answer in useful", "41.2 ✗ (35.0–47.0)", "100 (90.0–100)"],
        ["useful − noisy", "+30.0 (+20.0 to +40.0)", "–"],
        ["words per document", "12.3 (11–14)", "–"],
        ["seconds per search", "0.5", "–"],
    ]
    assert report.headline() == "Not yet"


def test_many_columns_fit_a_terminal(report, capsys):
    names = ("untuned", "shipped", "built")
    kind = {"named/contradicting": Interval(0.546, 0.474, 0.62), "gap/contradicting": Interval(-0.123, -0.205, -0.044)}
    measured = [Measured(name, "simulator", "", report.measured[0].measures | kind) for name in names]
    many = Report([*measured, Measured("bm25", "bm25", "", {}, is_real=True)], report.about)
    many.show(Console(width=80, highlight=False))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in [
        "answer in useful" + " 41 ✗ 35–47" * 3 + " –",
        "useful − contradicting" + " −12 −20…−4" * 3 + " –",
        "contradicting as named" + " 55 ✗ 47–62" * 3 + " –",
        "words per document" + " 12.3" * 3 + " –",
    ]:
        assert line in lines
    report.show(Console(width=80, highlight=False))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "answer in useful 41.2 ✗ (35–47) 100 (90–100)" in lines
    assert "useful − noisy +30.0 (+20…+40) –" in lines
    assert "words per document 12.3 (11–14) –" in lines


def test_untrusted_text_stays_text(report):
    report.measured.append(Measured(NASTY, "bm25", "", {}, is_real=True))
    results = {"sft": {"useful": {0: SearchResult(key="0", documents=(Document(title=NASTY, text=NASTY),)), 1: None}}}
    shown = examples(RECORDS[:1], results, {0: (Document(text=NASTY),)})
    page, markdown = report.html(shown), report.markdown()
    assert page.count("&lt;script&gt;alert(1)") >= 4
    for text in (page, markdown):
        assert "<script>" not in text
        assert "\u202e" not in text
    assert "[x](" not in markdown
