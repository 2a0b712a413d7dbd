"""What engines over a corpus on this machine share: they rank passages, and answer requests with the best."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from zs_lightning.errors import UserError
from zs_lightning.search.base import SearchEngine
from zs_lightning.search.corpus import Passage
from zs_lightning.types import Document, SearchRequest, SearchResult


@dataclass(frozen=True, slots=True)
class Hit:
    """One passage that was found, and how well it fits (comparable within one query only)."""

    passage: Passage
    score: float


class LocalSearch(SearchEngine):
    """An engine that holds its passages itself. To add one, write `rank`.

    Args:
        count: documents per search.
    """

    def __init__(self, count: int = 3) -> None:
        if count < 1:
            raise UserError(f"search: expected count >= 1; got {count}")
        self.count = count
        self.documents: Sequence[Passage] = []
        self.pending: list[SearchRequest] = []

    @abstractmethod
    def rank(self, queries: Sequence[str], count: int) -> list[list[Hit]]:
        """At most `count` hits for each query, best first."""

    def submit(self, requests: Sequence[SearchRequest]) -> None:
        self.pending += requests

    def poll(self) -> list[SearchResult]:
        requests, self.pending = self.pending, []
        if not requests:
            return []
        # Half characters, which JSON of others can hold, are no text for a tokenizer.
        queries = [request.query.encode("utf-8", "replace").decode("utf-8") for request in requests]
        found = self.rank(queries, self.count)
        return [
            SearchResult(key=request.key, documents=tuple(Document(text=h.passage.text, title=h.passage.title) for h in hits))
            for request, hits in zip(requests, found, strict=True)
        ]
