"""A model behind OpenAI's API that works on a build: what it wrote was paid for, and is kept."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from zs_lightning.generation import Sampling
from zs_lightning.search.http import Call, Found, HttpSpec, Rejected
from zs_lightning.search.served import ServedRequests
from zs_lightning.types import Document, SearchRequest, SearchResult

CHARACTERS = 4
"""Of a token, about: a server does not say how many tokens a text has before it is sent."""

GREEDY = Sampling(temperature=0.0)
PAID = "served.sqlite"
"""What a served model wrote, where served.http.cache names no file: it was paid for."""


@dataclass(frozen=True)
class ServedSpec:
    """A model on a server that speaks OpenAI's API, in place of one in this process.

    Args:
        hosts: address of a server, or a list of servers that hold the same model.
        model: name by which the servers know it; null sends none.
        api: chat sends what was said as messages, completions as one text.
        options: more fields of each request.
        http: how a server is asked; its cache keeps what was written, so that nothing is paid
            twice; without one, served.sqlite in the folder does.
        api_key_env: name of the environment variable that holds the key; empty for none.
    """

    hosts: list[str] | str = "http://127.0.0.1:8000"
    model: str | None = None
    api: Literal["chat", "completions"] = "chat"
    options: dict[str, Any] | None = None
    http: HttpSpec = HttpSpec(timeout=120.0, concurrency=64)
    api_key_env: str = ""

    def kept_in(self, folder: Path) -> "ServedSpec":
        """The same, keeping what was written in the folder if no file is named for it."""
        if self.http.cache is not None:
            return self
        return replace(self, http=replace(self.http, cache=str(folder / PAID)))


@dataclass(eq=False, repr=False)
class Writer(ServedRequests):
    """Asks the servers to write; an answer has the number of its tokens and the reason of its end as
    title."""

    name = "served"
    place = "served"
    advice = "see whether it runs and can write with served.model and served.api, or set served.hosts"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.counters |= {"read_tokens": 0, "written_tokens": 0}
        self.rejected: set[str] = set()
        """Keys of the last requests that the server did not take, though it is well."""

    def call(self, query: str) -> Call:
        """What setup asks; requests are asked by `result`."""
        return self.posted(self.asked([query], 1, GREEDY, 0))

    async def result(self, request: SearchRequest) -> SearchResult:
        try:
            return await super().result(request)
        except Rejected as error:
            if self.http.mode == "replay":
                raise
            self.rejected.add(request.key)
            longer = "give the server a longer context, or build in another folder with a lower rollout.max_new_tokens"
            raise Rejected(f"{error}; if its prompt is too long, {longer}") from error

    def parse(self, answer: Any) -> Found:
        text, _, ending = self.written(answer)
        usage = answer.get("usage") or {}
        tokens = int(usage.get("completion_tokens") or 0)
        # Answers of the cache, which were paid for before, do not come here.
        self.counters["written_tokens"] += tokens
        self.counters["read_tokens"] += int(usage.get("prompt_tokens") or 0)
        return [Document(text=text or "", title=f"{tokens} {ending}")]

    def answers(self, bodies: Mapping[str, dict[str, Any]]) -> dict[str, SearchResult]:
        self.rejected.clear()
        return super().answers(bodies)
