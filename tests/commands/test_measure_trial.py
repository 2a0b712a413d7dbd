"""The searches of a measurement, with an engine of which everything is known."""

from dataclasses import replace

import pytest

from support.oracle import AWAY, TRUTH, Oracle
from zs_lightning.commands.measure_simulator.trial import NOTHING, Study, Trial, every_result, form
from zs_lightning.commands.measure_simulator.verdict import findings, verdict
from zs_lightning.data.sources import MiniatureSource
from zs_lightning.errors import RunError
from zs_lightning.runs.intervals import Interval, paired_difference, score_interval
from zs_lightning.search.base import SearchEngine
from zs_lightning.search.meter import unrelated_queries
from zs_lightning.types import Document, QAExample, SearchRequest, SearchResult

RECORDS = MiniatureSource().search_records("test", 12)


def study(**changed):
    found = Study(RECORDS, unrelated_queries(RECORDS, 0), 0, {}, TRUTH, TRUTH.holds, None)
    return replace(found, **changed)


def tried(engine, kinds=("noisy", "off_topic"), **changed):
    trial = Trial(engine, study(**changed), lambda what: None)
    results = trial.run(kinds)
    return {key: interval.mean for key, interval in trial.measures.items()}, results, trial


def test_a_simulator_that_obeys():
    engine = Oracle()
    means, results, trial = tried(engine)
    assert set(results) == {"useful", "noisy", "off_topic"}
    assert (means["recall/useful"], means["recall/noisy"], means["gap/noisy"]) == (1.0, 0.0, 1.0)
    # Spouses are stated of others, but for a query that asks for a spouse it may be the very one.
    assert means["named/noisy"] == means["named/off_topic"] == 1.0
    assert means["form/supported"] == means["form/ordered"] == means["consistent/same"] == 1.0
    assert (means["cost/tokens"], means["cost/failed"]) == (10.0, 0.0)
    assert trial.measures["gap/noisy"].low < 1.0
    # Six searches of each of 12 records; for each of 2 guards empty queries, and unrelated ones twice.
    unrelated = sum(query is not None for query in study().unrelated)
    assert len(engine.requests) == trial.asked == 12 * 6 + 2 * (12 + 2 * unrelated)
    assert (engine.orders.weights, engine.orders.guard) == ({"noisy": 1.0}, "rule")


def test_every_simulator_is_asked_the_same():
    asked = []
    for kinds in (["noisy"], ["off_topic"]):
        engine = Oracle()
        tried(engine, kinds)
        asked.append([(request.query, request.seed, request.noise_prob) for request in engine.requests])
    assert asked[0] == asked[1]
    assert [query for query, *_ in asked[0][:12]] == [record.query for record in RECORDS]
    # The same draw for useful and noisy documents.
    assert [seed for _, seed, _ in asked[0][:12]] == [seed for _, seed, _ in asked[0][12:24]]


class Told(Oracle):
    """It answers no query, and tells what it is told."""

    def texts(self, request, label, withheld):
        return [AWAY[0]] if withheld else [f"It is {request.example.golden_answers[0]}."]


def test_leaks_with_the_guard_and_without():
    means, _, _ = tried(Told(), [])
    # What was withheld is not shown to the repetition either, though it names what the query names.
    assert [means[f"leak/{name}"] for name in ("empty", "unrelated", "repeated")] == [0.0, 0.0, 0.0]
    assert [means[f"unguarded/{name}"] for name in ("empty", "unrelated", "repeated")] == [1.0, 1.0, 1.0]
    assert means["guard/withheld"] == 0.0
    means, _, _ = tried(Told("paper"), [])
    assert [means[f"leak/{name}"] for name in ("empty", "unrelated", "repeated")] == [1.0, 1.0, 1.0]
    assert not any(key.startswith("unguarded/") for key in means)


def test_a_repeated_query_comes_after_what_it_found_and_an_empty_one_has_no_word():
    engine = Oracle("paper")
    tried(engine, [])
    # After 12 useful searches, those without a word.
    assert [request.query for request in engine.requests[12:24]] == [NOTHING[number % 3] for number in range(12)]
    unrelated = [query for query in study().unrelated if query is not None]
    first = engine.requests[24 : 24 + len(unrelated)]
    again = engine.requests[24 + len(unrelated) : 24 + 2 * len(unrelated)]
    assert [request.query for request in first] == [request.query for request in again] == unrelated
    for one, two in zip(first, again, strict=True):
        assert one.seed != two.seed
        assert two.shown[: len(one.shown)] == one.shown
        assert len(two.shown) == len(one.shown) + 2


def test_a_simulator_that_does_not_obey():
    means, _, trial = tried(Oracle(obeys=False))
    assert (means["recall/noisy"], means["gap/noisy"], means["named/noisy"]) == (1.0, 0.0, 0.0)
    said = verdict(trial.measures, 32)
    assert said.startswith("Not yet: noise holds the answer (noisy 100 %, off_topic 100 %); noise is not always what it is")
    # What two bars advise is said once.
    assert said.endswith(
        "To change: train it on more records of noisy, off_topic, take prompts that order them better, or leave them out "
        "of search.noise."
    )


def test_whether_yes_leaks_is_not_told():
    records = [replace(record, example=replace(record.example, golden_answers=("Yes",))) for record in RECORDS[:2]]
    means, _, _ = tried(Oracle(), [], records=[*records, RECORDS[2]], unrelated=["a", "b", "c"])
    assert means["leak/empty"] == 0.0
    means, _, _ = tried(Oracle(), [], records=records, unrelated=["a", "b"])
    assert not {key for key in means if key.startswith(("leak", "unguarded"))}


def test_failed_searches_are_counted_and_left_out():
    query = RECORDS[3].query
    means, results, trial = tried(Oracle(failing=[query]), ["noisy"])
    assert 3 not in results["useful"]
    assert means["recall/useful"] == 1.0
    share = sum(request.query == query for request in trial.engine.requests) / trial.asked
    assert means["cost/failed"] == pytest.approx(share)
    # A difference is of those queries for which neither failed.
    _, _, trial = tried(Oracle(failing=[(query, "useful")]), ["noisy"])
    assert trial.measures["recall/noisy"] == score_interval([0.0] * 12)
    assert trial.measures["gap/noisy"] == paired_difference([0.0] * 11, [1.0] * 11)
    everything = {record.query for record in RECORDS}
    with pytest.raises(RunError, match="every search failed, the first one with: gone"):
        tried(Oracle(failing=everything))


def test_distances_to_the_real_engine():
    real = {0: (), 1: (Document(text="Nothing in common"),)}
    means, results, _ = tried(Oracle(), [], real=real)
    assert means["near/words"] == 0.0
    real = {number: results["useful"][number].documents for number in (2, 5)}
    near = lambda ones, others: [0.25 if one == other else 0.0 for one, other in zip(ones, others, strict=True)]  # noqa: E731
    means, _, _ = tried(Oracle(), [], real=real, near=near)
    assert (means["near/words"], means["near/cosine"]) == (1.0, 0.25)
    # Where nothing was written, nothing is near or far.
    trial = Trial(Oracle(), study(real=real), lambda what: None)
    trial.distances({2: real[2], 5: ()})
    assert trial.measures["near/words"] == score_interval([1.0])
    assert not any(key.startswith("near/") for key in tried(Oracle(), [])[0])


def test_the_form_of_results_by_hand():
    def documents(*texts):
        return tuple(Document(text=text) for text in texts)

    true = AWAY[0]
    found = {0: documents(true, true), 1: documents("one two three four one two three"), 2: documents(true, true), 3: ()}
    measures = {key: interval.mean for key, interval in form(found, study(), 2).items()}
    length = len(true.split())
    assert measures["form/ordered"] == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert measures["form/words"] == pytest.approx((length + 7 + length) / 3)
    assert measures["form/documents"] == pytest.approx((0.5 + 1 + 0.5) / 3)
    # The first and the third are equal, of different queries.
    assert measures["form/results"] == pytest.approx(1 / 3)
    rows = length - 2
    assert measures["form/repeated"] == pytest.approx((rows / (2 * rows) * 2 + 1 / 5) / 3)
    assert measures["form/supported"] == pytest.approx(2 / 3)
    assert "form/ordered" not in form(found, study())


@pytest.mark.parametrize(
    ("key", "hits", "rows", "met"),
    [
        ("recall/useful", 190, 200, True),
        ("recall/useful", 160, 200, None),
        ("recall/useful", 82, 200, False),
        ("recall/noisy", 10, 200, True),
        ("recall/my_kind", 40, 200, None),
        ("recall/noisy", 100, 200, False),
        ("leak/unrelated", 0, 200, True),
        ("leak/unrelated", 0, 40, None),
        ("leak/empty", 60, 200, False),
    ],
)
def test_an_interval_decides_what_is_met(key, hits, rows, met):
    measures = {key: score_interval([1.0] * hits + [0.0] * (rows - hits))}
    (finding,) = findings(measures, rows)
    assert finding.met is met
    # Intervals of a few values may have no width.
    assert next(findings(measures, 31)).met is None


def test_verdicts_in_words():
    good = {"recall/useful": Interval(0.95, 0.9, 0.98), "recall/noisy": Interval(0.02, 0.0, 0.05)}
    good["unguarded/empty"] = Interval(1.0, 1.0, 1.0)
    assert verdict(good, 200) == "Usable: all 2 bars are met; useful results hold the answer in 95.0 %."
    open_ = good | {"leak/empty": Interval(0.03, 0.01, 0.08)}
    assert verdict(open_, 200) == "Cannot tell, take more rows: leaks, empty 3.0 %."
    bad = open_ | {"recall/useful": Interval(0.41, 0.3, 0.5), "leak/unrelated": Interval(0.5, 0.4, 0.6)}
    assert verdict(bad, 200) == (
        "Not yet: useful results hold the answer in 41.0 % only; poor queries are told the answer (unrelated 50.0 %). "
        "To change: train it longer or on more useful records, or take a larger model; set search.guard: rule, or train it "
        "on records with such queries."
    )


def test_an_engine_that_loses_a_search_ends_the_measurement():
    class Lossy(SearchEngine):
        name = "lossy"

        def submit(self, requests):
            self.pending = list(requests)[1:]

        def poll(self):
            return [SearchResult(key=self.pending.pop().key)] if self.pending else []

    example = QAExample(id="1", question="Who?", golden_answers=("Foo",), source="test")
    requests = [SearchRequest(key=str(i), query="q", example=example, turn=0, seed=i) for i in range(3)]
    with pytest.raises(RunError, match=r"^the search engine lossy lost 1 requests$"):
        every_result(Lossy(), requests)
