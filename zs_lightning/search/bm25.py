"""BM25: a real, local search engine over files of one's own or over the miniature world's corpus."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zs_lightning.errors import UserError
from zs_lightning.search.corpus import CACHE, Passage, Passages, indexed
from zs_lightning.search.local import Hit, LocalSearch
from zs_lightning.streams import stream, uniform
from zs_lightning.text.answers import UNSPACED

_MARKS = "".join(chr(c) for c in range(0x300, 0x1C00) if unicodedata.category(chr(c)).startswith("M"))
_WORD = rf"[^\W{UNSPACED}]+(?:[{_MARKS}]+[^\W{UNSPACED}]*)*"
"""Marks are part of a word: many scripts write vowels so."""
_PATTERN = (
    rf"(?=([{UNSPACED}]{{2}}|(?<![{UNSPACED}])[{UNSPACED}]|(?!(?<=\w['’])\w(?![\w{_MARKS}])){_WORD}))"
    rf"(?:[{UNSPACED}]|{_WORD})"
)
"""Words, but not the letter after an apostrophe (author's), and each two neighbours in a script without blanks."""


class BM25Search(LocalSearch):
    """BM25 (bm25s) over a corpus, or over the documents of a miniature world.

    Args:
        world_seed: which world's documents to search if there is no corpus.
        count: documents per search.
        drop: share of the calls that return unrelated documents instead: a poorer engine for tests of robustness. As with
            a real engine, the same query gets the same answer, so a dropped one stays dropped.
        seed: of the dropped calls.
        corpus: a folder of texts (.txt, .md, .markdown, .rst; cut into passages of about 100 words) and of .jsonl files
            ({id, contents} or {id, title, text} in each line, a passage each), or one such file. A text or line above
            1 MB is skipped.
        cache: folder that keeps the index of a corpus until the corpus changes.
    """

    name = "bm25"

    def __init__(
        self,
        world_seed: int = 0,
        count: int = 3,
        drop: float = 0.0,
        seed: int = 0,
        corpus: str | None = None,
        cache: str = CACHE,
    ) -> None:
        if not 0 <= drop <= 1 or count < 1:
            raise UserError(f"search: expected count >= 1 and 0 <= drop <= 1; got count={count}, drop={drop}")
        super().__init__(count)
        self.world_seed, self.drop, self.seed = world_seed, drop, seed
        self.corpus, self.cache = corpus, cache
        self.index: Any = None
        self.unknown = 0

    def setup(self) -> None:
        if self.index is not None:
            return
        if self.corpus is None:
            from zs_lightning.miniature.world import make_world

            texts = make_world(self.world_seed).corpus()
            self.documents = [Passage(id=str(i), text=text) for i, text in enumerate(texts)]
            self.index = _made(texts)
        else:
            import bm25s

            folder = indexed(self.corpus, self.cache, "bm25 2", _build)
            self.documents, self.index = Passages(folder), bm25s.BM25.load(folder, mmap=True)

    def rank(self, queries: Sequence[str], count: int) -> list[list[Hit]]:
        self.setup()
        return [self._best(query, min(count, len(self.documents))) for query in queries]

    def counted(self) -> dict[str, float]:
        return {"without_a_known_word": self.unknown} if self.unknown else {}

    def _best(self, query: str, count: int) -> list[Hit]:
        if uniform(self.seed, "drop", query.lower()) < self.drop:
            drawn = stream(self.seed, "unrelated", query.lower()).sample(range(len(self.documents)), count)
            return [Hit(self.documents[i], 0.0) for i in drawn]
        known = [word for word in _words(query) if word in self.index.vocab_dict]
        self.unknown += not known
        if self.corpus is not None:
            best = _top(self.index.get_scores(known), count) if known else []
            return [Hit(self.documents[i], score) for i, score in best]
        ranked, scores = self.index.retrieve([known], k=count, show_progress=False)
        # An engine that knows none of the words finds nothing.
        return [Hit(self.documents[int(i)], float(score)) for i, score in zip(ranked[0], scores[0], strict=True) if score > 0]


def _top(scores: Any, count: int) -> list[tuple[int, float]]:
    """Numbers and scores of the best passages, equal ones in the order of the corpus; none that shares no word.

    The library's own choice partitions all scores, of which nearly all are 0: 100 times slower at 200,000 passages.
    """
    found = np.flatnonzero(scores > 0)
    values = scores[found]
    if len(found) > count:
        kept = values >= np.partition(values, -count)[-count]
        found, values = found[kept], values[kept]
    order = np.lexsort((found, -values))[:count]
    return list(zip(found[order].tolist(), values[order].tolist(), strict=True))


def _made(texts: Iterable[str]) -> Any:
    """An index in memory."""
    import bm25s

    index = bm25s.BM25()
    texts = (unicodedata.normalize("NFKC", text) for text in texts)
    index.index(bm25s.tokenize(texts, token_pattern=_PATTERN, stopwords="en", show_progress=False), show_progress=False)
    return index


def _build(folder: Path, passages: Passages) -> None:
    _made(passage.contents for passage in passages).save(folder, show_progress=False)


def _words(query: str) -> list[str]:
    import bm25s

    query = unicodedata.normalize("NFKC", query)
    words: list[str] = bm25s.tokenize(query, token_pattern=_PATTERN, stopwords="en", return_ids=False, show_progress=False)[0]
    return words
