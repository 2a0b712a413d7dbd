"""What a simulator is told to write for a search: useful documents, noise of a named kind, or a
list of both."""

import math
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from zs_lightning.errors import UserError
from zs_lightning.search.dense import Encoder
from zs_lightning.search.guard import GuardModel, asks_nothing, holds_answer, withholds
from zs_lightning.streams import derive_seed, uniform
from zs_lightning.text.prompts import EMPTY, NOISY, USEFUL, Prompts
from zs_lightning.text.protocol import disarm
from zs_lightning.types import Document, SearchRequest, SearchResult

Guard = Literal["rule", "paper"] | GuardModel


def draw_noisy(seed: int, noise_prob: float) -> bool:
    """One draw per search: all its documents are of one kind (paper: u > p is useful)."""
    return uniform(seed, "noise") < noise_prob


def draw_kind(seed: int, weights: Mapping[str, float]) -> str:
    """The kind of a search's noise, each as often as its weight says."""
    # By name: the order in a configuration changes no draw.
    names = sorted(weights)
    reached = list(accumulate(weights[name] for name in names))
    return names[min(bisect(reached, uniform(seed, "kind") * reached[-1]), len(names) - 1)]


@dataclass(frozen=True)
class Part:
    """Documents of one label that are written together."""

    label: str
    count: int
    seed: int


@dataclass(frozen=True)
class Plan:
    """What is written for one search."""

    label: str
    """Useful, or its kind of noise."""
    marks: tuple[bool, ...]
    """For each place of the list whether noise stands there."""
    withheld: bool
    parts: tuple[Part, ...]
    """None where nothing is written."""

    @property
    def noise(self) -> float:
        return sum(self.marks) / len(self.marks)

    def assembled(self, written: Sequence[Sequence[Document]]) -> tuple[Document, ...]:
        """The documents of the parts in one list; a place for which none was written is left
        out."""
        if len(self.parts) == 1:
            return tuple(written[0])
        left = {part.label: list(found) for part, found in zip(self.parts, written, strict=True)}
        documents = []
        for is_noise in self.marks:
            if found := left.get(self.label if is_noise else USEFUL):
                documents.append(found.pop(0))
        return tuple(documents)

    def result(self, key: str, documents: tuple[Document, ...]) -> SearchResult:
        return SearchResult(key=key, documents=documents, label=self.label, noise=self.noise, withheld=self.withheld)


class Orders:
    """Plans searches as the options of a simulated engine say, which are explained there. Raises
    UserError if a weight is negative, all are 0, or one is of a kind that the set does not know."""

    def __init__(
        self,
        prompts: Prompts,
        count: int,
        noise: Mapping[str, float] | None,
        mixed: bool,
        guard: Guard,
        variants: int | None,
    ) -> None:
        weights = {NOISY: 1.0} if noise is None else dict(noise)
        known = [*prompts.noises, EMPTY]
        for name, weight in weights.items():
            if name not in known:
                expected = f"expected {', '.join(known)}, or a kind of your own in a file of prompts"
                raise UserError(f"search.noise: there is no kind {name!r}; {expected}")
            if not 0 <= weight < math.inf:
                raise UserError(f"search.noise: expected weights of 0 or more; got {name}: {weight:g}")
        if not sum(weights.values()):
            raise UserError("search.noise: expected a weight above 0; with no noise at all, anneal it to 0")
        if variants is not None and variants < 1:
            raise UserError(f"search.variants: expected 1 or more, or null; got {variants}")
        # Not in its class: an error there is one of many that a union of types has.
        if isinstance(guard, GuardModel) and not -1 <= guard.threshold <= 1:
            raise UserError(f"search.guard.threshold: expected -1 to 1, a cosine; got {guard.threshold:g}")
        self.count = count
        self.weights = weights
        self.mixed = mixed
        self.guard = guard
        self.encoder: Any = None
        self.variants = variants

    @contextmanager
    def only(self, label: str, guard: Guard | None = None) -> Iterator[None]:
        """All noise is of this kind meanwhile, and golden answers are guarded so."""
        before = (self.weights, self.guard)
        self.weights, self.guard = {label: 1.0}, guard or self.guard
        try:
            yield
        finally:
            self.weights, self.guard = before

    def load(self, device: str = "auto") -> None:
        """Loads the model of the guard, if there is one."""
        if isinstance(self.guard, GuardModel) and self.encoder is None:
            self.encoder = Encoder(self.guard.model, device, "search.guard.model")

    def plan(self, request: SearchRequest) -> Plan:
        return self.plans([request])[0]

    def plans(self, requests: Sequence[SearchRequest]) -> list[Plan]:
        """The plan of each request: a function of it alone, whatever else is searched."""
        withheld = [self.guard != "paper" and withholds(request) for request in requests]
        rows = enumerate(requests)
        doubtful = [n for n, r in rows if withheld[n] and not holds_answer(r.query, r.example)]
        if doubtful and isinstance(self.guard, GuardModel):
            self.load()
            found = self.guard.related([requests[n] for n in doubtful], self.encoder)
            for n, is_related in zip(doubtful, found, strict=True):
                withheld[n] = not is_related
        return [self._plan(request, blind) for request, blind in zip(requests, withheld, strict=True)]

    def _plan(self, request: SearchRequest, withheld: bool) -> Plan:
        seed = request.seed
        if self.mixed:
            draws = [uniform(seed, "noise", place) for place in range(self.count)]
            marks = tuple(draw < request.noise_prob for draw in draws)
        else:
            marks = (draw_noisy(seed, request.noise_prob),) * self.count
        label = draw_kind(seed, self.weights) if any(marks) else USEFUL
        if asks_nothing(request.query) and self.guard != "paper":
            return Plan(label, marks, True, ())
        parts = []
        for name, count in ((USEFUL, marks.count(False)), (label, marks.count(True))):
            if count and name != EMPTY:
                parts.append(Part(name, count, self._seed(seed, name)))
        return Plan(label, marks, withheld, tuple(parts))

    def _seed(self, seed: int, label: str) -> int:
        """The seed of what is written, one of a few where a file of results is to be hit again."""
        if self.variants is not None:
            return derive_seed("simulator", int(uniform(seed, "variant") * self.variants))
        # All useful and all noisy results are drawn as before there were kinds.
        return derive_seed(seed, "simulator", *([label] if self.mixed else []))

    def fields(self, request: SearchRequest, count: int) -> dict[str, str]:
        """The fields of a template; their texts speak no tags."""
        # They hold the request's own question and answer; the reference pairs them by batch
        # position.
        answers = request.example.golden_answers
        fields = {
            "question": request.example.question,
            "answer": ", ".join(answers),
            "first_answer": answers[0] if answers else "",
            "query": request.query,
            "count": str(count),
        }
        return {name: disarm(text) for name, text in fields.items()}
