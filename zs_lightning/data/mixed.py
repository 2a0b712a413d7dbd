"""Several data sets as one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from zs_lightning.data.sources import MissingSplit, QASource, say
from zs_lightning.errors import UserError
from zs_lightning.streams import stream
from zs_lightning.types import QAExample, SearchRecord


class MixedSource(QASource):
    """Several sources as one; results are reported for each by its name, and for all.

    All rows of all sources take part; a source's own `limit` says how many it gives. A source
    without a split is left out of that split.

    Args:
        sources: the sources, by the names that results are reported under.
        seed: of the rows' order.
    """

    def __init__(self, sources: dict[str, QASource], seed: int = 0) -> None:
        if not sources or any(not name or "/" in name for name in sources):
            said = f"expected sources with names without a slash; got {list(sources)}"
            raise UserError(f"data.source.sources: {said}")
        self.sources = sources
        self.seed = seed

    def questions(self, split: str) -> list[QAExample]:
        return self._mixed(split, lambda source: source.questions(split))

    def search_records(self, split: str, count: int) -> list[SearchRecord]:
        return self._mixed(split, lambda source: source.search_records(split, count))[:count]

    def _mixed(self, split: str, rows_of: Callable[[QASource], Sequence[Any]]) -> list[Any]:
        mixed: list[Any] = []
        missing = []
        for name, source in self.sources.items():
            try:
                mixed += [_named(name, row) for row in rows_of(source)]
            except MissingSplit:
                missing.append(name)
        if len(missing) == len(self.sources):
            raise MissingSplit(f"data.source: none of {', '.join(missing)} has a {split} split")
        if missing:
            say(f"data: {', '.join(missing)}: no {split} split, left out of it")
        stream(self.seed, "mixed", split).shuffle(mixed)
        return mixed


def _named(name: str, row: Any) -> Any:
    if isinstance(row, SearchRecord):
        return replace(row, example=_named(name, row.example))
    # Ids of two data sets may collide: the source's name keeps keys unique. The subset begins
    # with it too, for the tables of results.
    inner = "" if row.source == name else f"/{row.source}"
    part = "" if row.subset in ("", name) else f"/{row.subset}"
    return replace(row, source=name + inner, subset=name + part)
