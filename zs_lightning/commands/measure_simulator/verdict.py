"""Whether a simulated engine is worth a night of training, and what to change."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from zs_lightning.runs.intervals import FEW, Interval
from zs_lightning.runs.tables import percent

TITLES = {
    "recall": "answer in {}",
    "gap": "useful − {}",
    "named": "{} as named",
    "guard": "withheld, good queries",
    "leak": "leaks, {}",
    "unguarded": "unguarded, {}",
    "consistent/same": "same seed: equal",
    "consistent/seed": "other seed: alike",
    "consistent/words": "other words: alike",
    "form/ordered": "documents of ordered",
    "form/documents": "distinct documents",
    "form/results": "distinct results",
    "form/repeated": "repeated 3 words",
    "form/supported": "sentences in corpus",
    "form/words": "words per document",
    "near/words": "alike the real engine",
    "near/cosine": "cosine to the real",
    "cost/tokens": "tokens per search",
    "cost/seconds": "seconds per search",
    "cost/failed": "failed searches",
}
"""Rows of the table in their order, by a measure's key or the part of it before the slash."""


def title(key: str) -> str:
    group, _, name = key.partition("/")
    return TITLES.get(key, TITLES.get(group, "{}")).format(name)


@dataclass(frozen=True)
class Bar:
    """A share that measures have to reach (`least`) or must not exceed."""

    key: str
    """Of a measure, or of several the part before the slash."""
    limit: float
    least: bool
    wrong: str
    """What is wrong below or above it; {found} are the measures' shares."""
    change: str
    """What to change; {names} are the parts of the keys after the slash."""

    def met(self, interval: Interval) -> bool | None:
        """None where the interval leaves it open."""
        reached, missed = interval.low >= self.limit, interval.high < self.limit
        if not self.least:
            reached, missed = interval.high <= self.limit, interval.low > self.limit
        return True if reached else False if missed else None


_KINDS = "train it on more records of {names}, take prompts that order them better, or leave them out of search.noise"
BARS = (
    Bar(
        "recall/useful", 0.8, True, "useful results hold the answer in {found} only",
        "train it longer or on more useful records, or take a larger model",
    ),
    Bar("recall", 0.2, False, "noise holds the answer ({found})", _KINDS),
    Bar("named", 0.9, True, "noise is not always what it is called ({found})", _KINDS),
    Bar(
        "leak", 0.05, False, "poor queries are told the answer ({found})",
        "set search.guard: rule, or train it on records with such queries",
    ),
    Bar(
        "guard/withheld", 0.05, False, "the answer is withheld from {found} of good queries",
        "look at the records' queries, or set search.guard: paper",
    ),
    Bar(
        "form/ordered", 0.9, True, "{found} of the ordered documents are written",
        "raise search.max_new_tokens, lower search.count, or train it longer",
    ),
    Bar(
        "form/documents", 0.8, True, "{found} of a result's documents differ",
        "raise search.sampling.temperature, or train it on distinct documents",
    ),
)  # fmt: skip
"""The first that fits a measure counts."""


@dataclass(frozen=True)
class Finding:
    """One measure against its bar."""

    key: str
    bar: Bar
    met: bool | None
    interval: Interval

    @property
    def name(self) -> str:
        return self.key.partition("/")[2]

    def row(self) -> dict[str, object]:
        """As results.json has it."""
        return {"measure": self.key, "limit": self.bar.limit, "least": self.bar.least, "met": self.met}


def findings(measures: Mapping[str, Interval], rows: int) -> Iterator[Finding]:
    """Each measure that has a bar, over so many queries."""
    for key, interval in measures.items():
        for bar in BARS:
            if bar.key in (key, key.partition("/")[0]):
                yield Finding(key, bar, bar.met(interval) if rows >= FEW else None, interval)
                break


def verdict(measures: Mapping[str, Interval], rows: int) -> str:
    """The verdict in words, with what to change."""
    found = list(findings(measures, rows))
    wrong = [finding for finding in found if finding.met is False]
    undecided = [finding for finding in found if finding.met is None]
    if wrong:
        said = "; ".join(_said(wrong, "wrong"))
        return f"Not yet: {said}. To change: {'; '.join(_said(wrong, 'change'))}."
    if undecided:
        said = "; ".join(f"{title(finding.key)} {percent(finding.interval.mean)} %" for finding in undecided)
        return f"Cannot tell, take more rows: {said}."
    useful = percent(measures["recall/useful"].mean)
    return f"Usable: all {len(found)} bars are met; useful results hold the answer in {useful} %."


def _said(found: Sequence[Finding], what: str) -> Iterator[str]:
    """Each sentence of the bars, with all measures that it is about."""
    sentences: dict[str, list[Finding]] = {}
    for finding in found:
        sentences.setdefault(getattr(finding.bar, what), []).append(finding)
    for sentence, mine in sentences.items():
        shares = []
        for finding in mine:
            name = "" if "/" in finding.bar.key else f"{finding.name} "
            shares.append(f"{name}{percent(finding.interval.mean)} %")
        names = dict.fromkeys(finding.name for finding in mine)
        yield sentence.format(found=", ".join(shares), names=", ".join(names))
