"""BM25: a real, local search engine over one's own files or the miniature world's corpus."""

import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from zs_lightning.errors import UserError
from zs_lightning.search.corpus import CACHE, Hit, LocalSearch, Passage, Passages, indexed
from zs_lightning.streams import stream, uniform
from zs_lightning.text.answers import UNSPACED

_MARKS = "".join(c for c in map(chr, range(0x300, 0x1C00)) if unicodedata.category(c)[0] == "M")
# Marks are part of a word: many scripts write vowels so.
_WORD = rf"[^\W{UNSPACED}]+(?:[{_MARKS}]+[^\W{UNSPACED}]*)*"
# Words, but not the letter after an apostrophe (author's), and each two neighbours in a script
# without blanks.
_AFTER_APOSTROPHE = rf"(?<=\w['’])\w(?![\w{_MARKS}])"
_START = rf"[{UNSPACED}]{{2}}|(?<![{UNSPACED}])[{UNSPACED}]|(?!{_AFTER_APOSTROPHE}){_WORD}"
_PATTERN = rf"(?=({_START}))(?:[{UNSPACED}]|{_WORD})"


@dataclass(eq=False, repr=False, kw_only=True)
class BM25Search(LocalSearch):
    """BM25 (bm25s) over a corpus, or over the documents of a miniature world.

    Args:
        world_seed: which world's documents to search if there is no corpus.
        count: documents per search.
        drop: share of the calls that return unrelated documents instead: a poorer engine for tests
            of robustness. As with a real engine, the same query gets the same answer, so a dropped
            one stays dropped.
        seed: decides which calls are dropped.
        corpus: a folder of texts (.txt, .md, .markdown, .rst; cut into passages of about 100 words)
            and of .jsonl files ({id, contents} or {id, title, text} in each line, a passage each),
            or one such file. A text or line above 1 MB is skipped.
        cache: folder that keeps the index of a corpus until the corpus changes.
    """

    name = "bm25"

    world_seed: int = 0
    drop: float = 0.0
    seed: int = 0
    corpus: str | None = None
    cache: str = CACHE

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drop <= 1:
            raise UserError(f"search: expected 0 <= drop <= 1; got {self.drop}")
        self.index: Any = None
        self.unknown = 0

    def setup(self) -> None:
        if self.index is not None:
            return
        if self.corpus is None:
            from zs_lightning.miniature.world import make_world

            texts = make_world(self.world_seed).corpus()
            passages = [Passage(id=str(i), text=text) for i, text in enumerate(texts)]
            self.documents = passages
            self.index = _made(passages)
        else:
            bm25s = _library()
            folder = indexed(self.corpus, self.cache, f"bm25 2 {bm25s.__version__}", _build)
            self.documents = Passages(folder)
            self.index = bm25s.BM25.load(folder, mmap=True)

    def rank(self, queries: Sequence[str], count: int) -> list[list[Hit]]:
        self.setup()
        return [self._best(query, min(count, len(self.documents))) for query in queries]

    def counted(self) -> dict[str, float]:
        return {"without_a_known_word": self.unknown} if self.unknown else {}

    def _best(self, query: str, count: int) -> list[Hit]:
        if uniform(self.seed, "drop", query.lower()) < self.drop:
            drawn = stream(self.seed, "unrelated", query.lower()).sample(range(len(self.documents)), count)
            return [Hit(self.documents[i], 0.0) for i in drawn]
        words = _tokenized([query], return_ids=False)[0]
        # Without a known word nothing is found, and get_scores would fail.
        known = [word for word in words if word in self.index.vocab_dict]
        self.unknown += not known
        if self.corpus is not None:
            best = _top(self.index.get_scores(known), count) if known else []
            return [Hit(self.documents[i], score) for i, score in best]
        # The world's results keep the library's order of equal scores, which old runs have seen.
        ranked, scores = self.index.retrieve([known], k=count, show_progress=False, backend_selection="numpy")
        pairs = zip(ranked[0].tolist(), scores[0].tolist(), strict=True)
        return [Hit(self.documents[i], score) for i, score in pairs if score > 0]


@cache
def _library() -> Any:
    """bm25s, which must not see JAX: it would start it, and that takes most of a card's memory."""
    jax = sys.modules.setdefault("jax", None)  # type: ignore[arg-type]
    import bm25s

    if jax is None:
        del sys.modules["jax"]
    return bm25s


def _top(scores: Any, count: int) -> list[tuple[int, float]]:
    """Numbers and scores of the best passages, equal ones in the order of the corpus. The library's
    own choice partitions all scores, of which nearly all are 0: 100 times slower at 200,000
    passages."""
    found = np.flatnonzero(scores > 0)
    values = scores[found]
    if len(found) > count:
        kept = values >= np.partition(values, -count)[-count]
        found = found[kept]
        values = values[kept]
    order = np.lexsort((found, -values))[:count]
    return list(zip(found[order].tolist(), values[order].tolist(), strict=True))


def _tokenized(texts: Iterable[str], **options: Any) -> Any:
    texts = (unicodedata.normalize("NFKC", text) for text in texts)
    return _library().tokenize(texts, token_pattern=_PATTERN, stopwords="en", show_progress=False, **options)


def _made(passages: Passages | list[Passage]) -> Any:
    """An index in memory."""
    index = _library().BM25()
    words = _tokenized(passages[number].contents for number in range(len(passages)))
    if not any(words.ids):
        raise UserError("search.corpus: no passage has a word to search for")
    index.index(words, show_progress=False)
    return index


def _build(folder: Path, passages: Passages) -> None:
    _made(passages).save(folder, show_progress=False)
