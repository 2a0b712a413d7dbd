"""Clients of retrieval servers of one's own, in the two forms that published code speaks."""

import math
from dataclasses import dataclass
from typing import Any

from zs_lightning.search.http import Call, Failed, Found, document, field, rows
from zs_lightning.search.remote import RemoteSearch
from zs_lightning.types import Document


@dataclass(eq=False, repr=False)
class RetrieveSearch(RemoteSearch):
    """A retrieval server as Search-R1 has it, and as `serve` is one.

    POST {"queries": [query], "topk": 3, "return_scores": true} gives one list for each query:
    {"result": [[{"document": {"contents": "\\"Title\\"\\nText"}, "score": 0.9}]]}.
    """

    name = "retrieve"

    endpoint: str = "http://127.0.0.1:8000/retrieve"
    count: int = 3

    def call(self, query: str) -> Call:
        # One query in a call, so that no answer can be taken for another's. The reference server
        # fails without return_scores.
        return Call(json={"queries": [query], "topk": self.count, "return_scores": True})

    def parse(self, answer: Any) -> Found:
        lists = field(answer, "result")
        if not isinstance(lists, list) or len(lists) != 1:
            raise Failed("the answer is no list with the results of 1 query")
        found = [_passage(item) for item in rows(lists[0])]
        if found and not any(found):
            wanted = "a document with contents and a score that is a number"
            raise Failed(f"none of the {len(found)} results is {wanted}")
        return found


def _passage(item: dict[str, Any]) -> Document | None:
    # Servers without scores give the passage itself.
    inner = item.get("document", item)
    score = item.get("score", 0.0)
    contents = inner.get("contents") if isinstance(inner, dict) else None
    is_number = type(score) in (int, float) and math.isfinite(score)
    if not isinstance(contents, str) or not is_number:
        return None
    title, _, text = contents.strip().partition("\n")
    quoted = len(title) > 2 and title[0] == title[-1] == '"'
    return (document(text, title[1:-1]) if quoted else None) or document(contents)


@dataclass(eq=False, repr=False)
class ZeroSearchWikiSearch(RemoteSearch):
    """The retrieval server that ZeroSearch's published code asks.

    POST {"query": query, "top_k": 5} gives [{"text": "…"}].
    """

    name = "zerosearch_wiki"

    endpoint: str = "http://127.0.0.1:6002/retrieve"

    def call(self, query: str) -> Call:
        return Call(json={"query": query, "top_k": self.count})
