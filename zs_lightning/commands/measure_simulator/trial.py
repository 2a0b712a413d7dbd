"""The searches of a measurement, and what they tell of an engine."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zs_lightning.errors import RunError
from zs_lightning.miniature.checks import Truth
from zs_lightning.runs.intervals import Interval, bootstrap_interval, paired_difference, score_interval
from zs_lightning.search.base import SearchEngine, answered
from zs_lightning.search.meter import contents, distinct, leaked, recalled, repeated, shared_words, supported, turned
from zs_lightning.streams import derive_seed
from zs_lightning.text.answers import telling
from zs_lightning.text.prompts import USEFUL
from zs_lightning.types import Document, SearchRecord, SearchRequest, SearchResult

NOTHING = ("", "?", "what is the")
"""Queries without a word that could be looked for, in turn."""
Results = dict[int, SearchResult]
"""By the record's number; failed searches are missing."""
Found = Mapping[int, tuple[Document, ...]]


@dataclass(frozen=True)
class Study:
    """What is asked of every engine alike, and what its answers are held against."""

    records: Sequence[SearchRecord]
    unrelated: Sequence[str | None]
    """For each record a query that has nothing to do with it."""
    seed: int
    real: Found
    """What the real engine finds, as far as it is known."""
    truth: Truth | None
    holds: Callable[[str], bool] | None
    """Whether a corpus supports a sentence."""
    near: Callable[[Sequence[str], Sequence[str]], list[float]] | None
    """Cosines of the embeddings of pairs of texts."""

    def other_words(self, query: str) -> str:
        return (self.truth.reworded(query) if self.truth else None) or turned(query)


@dataclass
class Trial:
    """The searches with one simulated engine."""

    engine: Any
    study: Study
    say: Callable[[str], None]
    measures: dict[str, Interval] = field(default_factory=dict)
    asked: int = 0
    kept: int = 0
    """Useful results that the engine's file had before."""
    failures: list[str] = field(default_factory=list)

    def put(self, key: str, values: Sequence[float]) -> None:
        if values:
            self.measures[key] = score_interval(values)

    def search(self, what: str, queries: Mapping[int, str], label: str = USEFUL, **changed: Any) -> Results:
        """One search for each record that has a query.

        Args:
            changed: `guard`, `seed` or `shown` (documents found before, by the record's number) in
                place of the engine's, the study's and the record's own.
        """
        self.say(what)
        requests = []
        noise = float(label != USEFUL)
        for number, query in queries.items():
            record = self.study.records[number]
            seed = derive_seed(changed.get("seed", self.study.seed), "measure", record.example.key, record.query)
            asked = SearchRequest(key=str(number), query=query, example=record.example, turn=0, seed=seed, noise_prob=noise)
            requests.append(replace(asked, shown=changed.get("shown", {}).get(number, record.shown)))
        with self.engine.orders.only(label, changed.get("guard")):
            results = every_result(self.engine, requests)
        self.asked += len(results)
        self.failures += [result.failure for result in results if result.failure is not None]
        return {int(result.key): result for result in results if result.failure is None}

    def run(self, kinds: Sequence[str]) -> dict[str, Results]:
        """All searches; returns those of useful documents and of each kind of noise, by label.
        Raises RunError if every search failed."""
        queries = {number: record.query for number, record in enumerate(self.study.records)}
        counted = self.engine.counted()
        begun = time.monotonic()
        useful = self.search(USEFUL, queries)
        if not useful:
            raise RunError(f"every search failed, the first one with: {self.failures[0]}")
        self.costs(time.monotonic() - begun, counted, len(useful))
        self.put("guard/withheld", [float(result.withheld) for result in useful.values()])
        results = {USEFUL: useful}
        for kind in kinds:
            results[kind] = self.search(kind, queries, kind)
        for label, found in results.items():
            self.control(label, found, useful)
        self.leaks()
        self.consistency(useful, queries)
        documents = {number: result.documents for number, result in useful.items()}
        self.measures |= form(documents, self.study, self.engine.count)
        self.distances(documents)
        self.put("cost/failed", [1.0] * len(self.failures) + [0.0] * (self.asked - len(self.failures)))
        return results

    def costs(self, seconds: float, before: Mapping[str, float], searches: int) -> None:
        """Of searches that were not in a cache."""
        counted = self.engine.counted()
        tokens, cached = (counted.get(name, 0) - before.get(name, 0) for name in ("tokens", "cached"))
        self.kept = int(cached)
        # One figure for all of them: they run side by side, and none has a time of its own.
        for name, spent in {"seconds": seconds, "tokens": tokens}.items():
            if searches > cached and spent:
                self.measures[f"cost/{name}"] = Interval(*[spent / (searches - cached)] * 3)

    def control(self, label: str, results: Results, useful: Results) -> None:
        """Whether documents hold what their label says, and how far from useful ones they are."""
        records, truth = self.study.records, self.study.truth
        recall: dict[int, float] = {}
        named: list[float] = []
        for number, result in results.items():
            query = records[number].query
            recall[number] = recalled(records[number], result.documents)
            if truth and truth.asked(query):
                named.append(float(label in truth.kinds(query, [document.text for document in result.documents])))
        self.put(f"recall/{label}", list(recall.values()))
        if label == USEFUL:
            return
        if both := [number for number in recall if number in useful]:
            high = [recalled(records[number], useful[number].documents) for number in both]
            self.measures[f"gap/{label}"] = paired_difference([recall[n] for n in both], high)
        # The world knows the kinds of this program alone.
        if label in ("noisy", "off_topic", "partial", "contradicting", "outdated", "empty"):
            self.put(f"named/{label}", named)

    def leaks(self) -> None:
        """Whether queries that deserve nothing get a golden answer, with the guard and without."""
        records = self.study.records
        nothing = {number: NOTHING[number % len(NOTHING)] for number in range(len(records))}
        unrelated = {n: query for n, query in enumerate(self.study.unrelated) if query is not None}
        for guard in dict.fromkeys((self.engine.orders.guard, "paper")):
            group = "leak" if guard == self.engine.orders.guard else "unguarded"
            leaks = {"empty": self.search("empty queries", nothing, guard=guard)}
            leaks["unrelated"] = self.search("unrelated queries", unrelated, guard=guard)
            shown = {n: records[n].shown for n in leaks["unrelated"]}
            for number, result in leaks["unrelated"].items():
                # As in a rollout: what asked for nothing is no reason to tell the next.
                shown[number] += () if result.withheld else result.documents
            again = {number: unrelated[number] for number in shown}
            seed = derive_seed(self.study.seed, "again")
            leaks["repeated"] = self.search("repeated queries", again, guard=guard, shown=shown, seed=seed)
            for name, results in leaks.items():
                # Of yes and no nobody can tell whether they leak.
                told = {n: result.documents for n, result in results.items() if telling(records[n].example.golden_answers)}
                self.put(f"{group}/{name}", [leaked(records[n], documents) for n, documents in told.items()])

    def consistency(self, useful: Results, queries: Mapping[int, str]) -> None:
        """What stays of a result when the search, its seed or its words come again."""
        same = self.search("the same again", queries)
        reseeded = self.search("another seed", queries, seed=derive_seed(self.study.seed, "other"))
        other = {number: self.study.other_words(query) for number, query in queries.items()}
        reworded = self.search("other words", other)
        self.put("consistent/same", [float(useful[n].documents == same[n].documents) for n in useful if n in same])
        for name, results in (("seed", reseeded), ("words", reworded)):
            found = [shared_words(useful[n].documents, results[n].documents) for n in useful if n in results]
            self.put(f"consistent/{name}", found)

    def distances(self, documents: Found) -> None:
        """How near documents are to the real engine's for the same query."""
        real = self.study.real
        both = [number for number in documents if documents[number] and real.get(number)]
        self.put("near/words", [shared_words(documents[number], real[number]) for number in both])
        if self.study.near and both:
            texts = ["\n".join(map(contents, found[number])) for found in (documents, real) for number in both]
            self.put("near/cosine", self.study.near(texts[: len(both)], texts[len(both) :]))


def every_result(engine: SearchEngine, requests: Sequence[SearchRequest]) -> list[SearchResult]:
    found = answered(engine, requests)
    # In the order in which they were asked for: intervals are drawn from the values in their order.
    return [found[request.key] for request in requests]


def form(found: Found, study: Study, count: int | None = None) -> dict[str, Interval]:
    """The looks of results, of a simulator that was ordered `count` documents or of a real
    engine."""
    written = [documents for documents in found.values() if documents]
    lengths = [len(" ".join(map(contents, documents)).split()) / len(documents) for documents in written]
    by_result: dict[tuple[Document, ...], set[str]] = {}
    for number, documents in found.items():
        by_result.setdefault(documents, set()).add(study.records[number].query)
    values: dict[str, list[float]] = {
        "form/ordered": [len(documents) / count for documents in found.values()] if count else [],
        "form/documents": list(map(distinct, written)),
        "form/results": [float(len(by_result[documents]) == 1) for documents in written],
        "form/repeated": list(map(repeated, written)),
    }
    if study.holds:
        shares = (supported(documents, study.holds) for documents in written)
        values["form/supported"] = [share for share in shares if share is not None]
    measures = {key: score_interval(listed) for key, listed in values.items() if listed}
    # No shares, even where all are 1.
    return measures | ({"form/words": bootstrap_interval(lengths)} if lengths else {})
