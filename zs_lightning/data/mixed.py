"""Several data sets as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from zs_lightning.data.reading import Item, report_overlap, say
from zs_lightning.data.sources import MissingSplit, QASource
from zs_lightning.errors import UserError
from zs_lightning.streams import stream
from zs_lightning.types import QAExample, SearchRecord


class MixedSource(QASource):
    """Several sources as one; results are reported for each by its name, and for all.

    Weights are for training: as many rows as there can be in these proportions without one row twice; the others are left
    out, which is said. Validation and test take all rows. A source without a split is left out of that split.

    Args:
        sources: the sources, by the names that results are reported under.
        weights: of the sources' rows in training; 0 leaves a source out. null trains on all rows of all.
        seed: of the drawn rows and of their order.
    """

    def __init__(self, sources: dict[str, QASource], weights: dict[str, float] | None = None, seed: int = 0) -> None:
        if not sources or any(not name or "/" in name for name in sources):
            raise UserError(f"data.source.sources: expected sources with names without a slash; got {list(sources)}")
        if weights is not None and (set(weights) != set(sources) or min(weights.values()) < 0 or not any(weights.values())):
            raise UserError(
                f"data.source.weights: expected a number >= 0 for each of {', '.join(sources)}, not all 0; got {weights}"
            )
        self.sources, self.weights, self.seed = sources, weights, seed
        self._splits: dict[str, list[QAExample]] = {}

    def questions(self, split: str) -> list[QAExample]:
        if split not in self._splits:
            self._splits[split] = self._mixed(split, lambda source: source.questions(split), _named)
            if split == "train":
                report_overlap("all sources", self._splits[split], self._held)
        return list(self._splits[split])

    def search_records(self, split: str, count: int) -> list[SearchRecord]:
        def named(name: str, record: SearchRecord) -> SearchRecord:
            return replace(record, example=_named(name, record.example))

        return self._mixed(split, lambda source: source.search_records(split, count), named)[:count]

    def _held(self, split: str) -> list[QAExample]:
        return [row for rows in self._gathered(split, lambda source: source.questions(split)).values() for row in rows]

    def _mixed(self, split: str, rows_of: Callable[[QASource], list[Item]], named: Callable[[str, Item], Item]) -> list[Item]:
        found = self._gathered(split, rows_of)
        if missing := [name for name in self.sources if name not in found and self._weight(split, name)]:
            say(f"data: {', '.join(missing)}: no {split} split, left out of it")
        if not found:
            raise MissingSplit(f"data.source: none of {', '.join(self.sources)} has a {split} split")
        draw = stream(self.seed, "mixed", split)
        mixed: list[Item] = []
        for name, size in self._sizes(split, {name: len(rows) for name, rows in found.items()}).items():
            # The first rows of a source are a fair sample of it.
            mixed += [named(name, row) for row in found[name][:size]]
        draw.shuffle(mixed)
        return mixed

    def _gathered(self, split: str, rows_of: Callable[[QASource], list[Item]]) -> dict[str, list[Item]]:
        """Rows of each source that takes part in the split and has it."""
        found: dict[str, list[Item]] = {}
        for name, source in self.sources.items():
            if not self._weight(split, name):
                continue
            try:
                found[name] = rows_of(source)
            except MissingSplit:
                continue
        return found

    def _weight(self, split: str, name: str) -> float:
        return 1.0 if split != "train" or self.weights is None else self.weights[name]

    def _sizes(self, split: str, sizes: dict[str, int]) -> dict[str, int]:
        """Rows to take of each source."""
        if split != "train" or self.weights is None:
            return sizes
        unit = min(size / self.weights[name] for name, size in sizes.items())
        taken = {name: min(size, round(unit * self.weights[name])) for name, size in sizes.items()}
        say("data: train: " + ", ".join(f"{taken[name]} of {size} rows of {name}" for name, size in sizes.items()))
        return taken


def _named(name: str, example: QAExample) -> QAExample:
    """Keys stay unique over the sources, and the subset begins with the source's name."""
    inner = "" if example.source == name else f"/{example.source}"
    part = "" if example.subset in ("", name) else f"/{example.subset}"
    return replace(example, source=name + inner, subset=name + part)
