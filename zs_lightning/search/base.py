"""What every search engine is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from zs_lightning.errors import RunError
from zs_lightning.types import SearchRequest, SearchResult

if TYPE_CHECKING:
    from zs_lightning.search.simulator import SimulatorSearch


class SearchEngine(ABC):
    """A source of documents. To add an engine, write `submit` and `poll` in a class of its own.

    Results may come back in any order and in any number of polls; each carries its request's key.
    A request that cannot be answered comes back as a result with `failure` set, never as a
    placeholder document.
    """

    name: str = "engine"

    @abstractmethod
    def submit(self, requests: Sequence[SearchRequest]) -> None:
        """Takes requests; returns at once if the engine can work on its own."""

    @abstractmethod
    def poll(self) -> list[SearchResult]:
        """Results that are ready. Waits until there is at least one, unless nothing is pending."""

    def ready(self) -> list[SearchResult]:
        """Results that are there already, without waiting."""
        # Engines without it are polled when every trajectory waits for a search, so that they
        # answer all searches at once.
        return []

    def counted(self) -> dict[str, float]:
        """What the engine counted since it was made; fit and test write it to search.json."""
        return {}

    def hit_rate(self) -> float | None:
        """The share of what was looked up that was kept from before; None if nothing is kept."""
        return None

    def setup(self) -> None:  # noqa: B027 - optional
        """Loads what the engine needs; called once before the first rollout."""

    def close(self) -> None:  # noqa: B027 - optional
        """Gives memory back until the next submit."""

    @property
    def simulator(self) -> SimulatorSearch | None:
        """The engine itself if it is a model in this process, which loading has to know of."""
        return None


def answered(engine: SearchEngine, requests: Sequence[SearchRequest]) -> dict[str, SearchResult]:
    """The results of all requests, by key. Raises RunError if the engine loses one."""
    results: dict[str, SearchResult] = {}
    if requests:
        engine.submit(requests)
    while len(results) < len(requests):
        found = engine.poll()
        if not found:
            raise RunError(f"the search engine {engine.name} lost {len(requests) - len(results)} requests")
        results |= {result.key: result for result in found}
    return results


def most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to the limit that fits, of numbers of which only the first ones do."""
    return bisect_left(range(1, limit + 1), True, key=lambda number: not fits(number))


def beginning(text: str, fits: Callable[[str], bool]) -> str:
    """As much of the beginning of a text as fits, in whole words if one of them fits."""
    if fits(text):
        return text
    words = text.split()
    count = most(len(words), lambda number: fits(" ".join(words[:number])))
    if count or not words:
        return " ".join(words[:count])
    return words[0][: most(len(words[0]), lambda number: fits(words[0][:number]))]
