"""A real, local search engine: BM25 over a folder's documents or over the miniature world's corpus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zs_lightning.search.base import SearchEngine
from zs_lightning.streams import stream, uniform
from zs_lightning.types import Document, SearchRequest, SearchResult


class BM25Search(SearchEngine):
    """BM25 (bm25s) over the documents of a miniature world.

    Args:
        world_seed: which world's corpus to search.
        count: documents per search.
        drop: share of the calls that return unrelated documents instead: a poorer engine for tests of robustness. As with
            a real engine, the same query gets the same answer, so a dropped one stays dropped.
        seed: of the dropped calls.
    """

    name = "bm25"

    def __init__(self, world_seed: int = 0, count: int = 3, drop: float = 0.0, seed: int = 0) -> None:
        if not 0 <= drop <= 1 or count < 1:
            raise ValueError(f"search: expected count >= 1 and 0 <= drop <= 1; got count={count}, drop={drop}")
        self.world_seed, self.count, self.drop, self.seed = world_seed, count, drop, seed
        self.pending: list[SearchRequest] = []
        self.texts: list[str] = []
        self.index: Any = None

    def setup(self) -> None:
        if self.index is not None:
            return
        import bm25s

        from zs_lightning.miniature.world import make_world

        self.texts = make_world(self.world_seed).corpus()
        self.index = bm25s.BM25()
        self.index.index(self._tokens(self.texts), show_progress=False)

    @staticmethod
    def _tokens(texts: Sequence[str]) -> Any:
        import bm25s

        return bm25s.tokenize(list(texts), stopwords="en", show_progress=False)

    def submit(self, requests: Sequence[SearchRequest]) -> None:
        self.pending += requests

    def poll(self) -> list[SearchResult]:
        self.setup()
        requests, self.pending = self.pending, []
        if not requests:
            return []
        vocabulary = self.index.vocab_dict
        results = []
        words = [[w for w in self._words(request.query) if w in vocabulary] for request in requests]
        for request, known in zip(requests, words, strict=True):
            # An engine that knows none of the words finds nothing.
            found: list[int] = []
            if uniform(self.seed, "drop", request.query.lower()) < self.drop:
                found = stream(self.seed, "unrelated", request.query.lower()).sample(range(len(self.texts)), self.count)
            else:
                ranked, scores = self.index.retrieve([known], k=min(self.count, len(self.texts)), show_progress=False)
                found = [int(i) for i, score in zip(ranked[0], scores[0], strict=True) if score > 0]
            documents = tuple(Document(text=self.texts[i]) for i in found)
            results.append(SearchResult(key=request.key, documents=documents))
        return results

    @staticmethod
    def _words(query: str) -> list[str]:
        import bm25s

        return bm25s.tokenize(query, stopwords="en", return_ids=False, show_progress=False)[0]
