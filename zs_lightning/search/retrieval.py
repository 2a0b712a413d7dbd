"""Clients of retrieval servers that one runs oneself, in the two forms that published code speaks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from zs_lightning.search.client import Client
from zs_lightning.search.http import BadAnswer, Call
from zs_lightning.search.json_documents import Found, collect, document, field, titled
from zs_lightning.types import Document


@dataclass(eq=False, repr=False)
class RetrieveSearch(Client):
    """A retrieval server as Search-R1 has it: POST {"queries": [query], "topk": 3, "return_scores": true}.

    It answers {"result": [[{"document": {"contents": "\\"Title\\"\\nText"}, "score": 0.9}]]}, one list for each query.

        search:
          class_path: RetrieveSearch
          init_args: {endpoint: "http://127.0.0.1:8000/retrieve", count: 3}
    """

    name = "retrieve"

    endpoint: str = "http://127.0.0.1:8000/retrieve"
    count: int = 3

    def call(self, query: str) -> Call:
        # One query in a call, so that no answer can be taken for another's. The reference server fails without scores.
        return Call(self.endpoint, json={"queries": [query], "topk": self.count, "return_scores": True})

    @staticmethod
    def parse(answer: Any) -> Found:
        rows = field(answer, "result")
        if not isinstance(rows, list) or len(rows) != 1:
            got = len(rows) if isinstance(rows, list) else type(rows).__name__
            raise BadAnswer(f"expected the results of 1 query; got {got}")
        found = collect(rows[0], _passage)
        if rows[0] and not found.documents:
            raise BadAnswer(f"none of the {len(rows[0])} results is a document with contents and a score that is a number")
        return found


def _passage(item: dict[str, Any]) -> Document | None:
    """Servers without scores give the passage itself."""
    inner, score = item.get("document", item), item.get("score", 0.0)
    if not isinstance(inner, dict) or not isinstance(inner.get("contents"), str):
        return None
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        return None
    title, _, text = inner["contents"].strip().partition("\n")
    quoted = len(title) > 2 and title[0] == title[-1] == '"'
    return (document(text, title[1:-1]) if quoted else None) or document(inner["contents"])


@dataclass(eq=False, repr=False)
class ZeroSearchWikiSearch(Client):
    """The retrieval server that ZeroSearch's published code asks: POST {"query": query, "top_k": 5}.

    It answers [{"text": "…"}].

        search:
          class_path: ZeroSearchWikiSearch
          init_args: {endpoint: "http://127.0.0.1:6002/retrieve"}
    """

    name = "zerosearch_wiki"

    endpoint: str = "http://127.0.0.1:6002/retrieve"

    def call(self, query: str) -> Call:
        return Call(self.endpoint, json={"query": query, "top_k": self.count})

    @staticmethod
    def parse(answer: Any) -> Found:
        return titled(answer, "text")
