"""What a policy did with a question, a line of questions.jsonl, and the metrics of many."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, Self, get_args, get_origin

from zs_lightning.runs.intervals import DIGITS, mean_of_groups, score_interval
from zs_lightning.text.answers import cover_match, exact_match, f1_score, folded_match
from zs_lightning.text.protocol import forges, query_key
from zs_lightning.types import ActionKind, Status, Trajectory, Turn

GREEDY, SAMPLED = "greedy", "sampled"
SCORES = {"em": exact_match, "em_folded": folded_match, "cover_em": cover_match, "f1": f1_score}
"""Scores of an answer. `cover_em` is what the published code calls EM."""
NORMALISATION = (
    "em and cover_em normalise as SQuAD does, after NFKC; em_folded and f1, as rewards, also drop "
    "typographic punctuation and count scripts without blanks by character."
)
MEANS = ("turns", "sampled_tokens", "truncated", "invalid", "invalid_actions", "forged")
FOLLOWED = ("repeated", "reworded", "other_query")


@dataclass
class Outcome:
    """One question's outcome. A line of questions.jsonl has these names in this order."""

    id: str
    source: str
    decoding: str
    """`greedy` or `sampled`; empty in training."""
    subset: str
    question: str
    golden_answers: list[str]
    answer: str | None
    em: float
    em_folded: float
    cover_em: float
    f1: float
    searches: int
    empty_searches: int | None
    """Searches that found nothing; None in a file of before they were counted."""
    turns: int
    """Turns that the policy wrote."""
    invalid_actions: int
    forged: float
    """1 if the policy wrote an <information> of its own, in a thought or outside of one."""
    truncated: float
    invalid: float
    status: str
    sampled_tokens: int
    noisy_searches: float
    """The noise of its searches, each from 0 to 1, added up."""
    fruitless: int
    """Results without a document that is known to help; 0 where the data set names none."""
    repeated: int
    """How often the same query followed a fruitless result, …"""
    reworded: int
    """… other words about the same thing, …"""
    other_query: int
    """… or another query."""
    first_fruitless: int
    """Fruitless results that did not follow another: no wording had been tried in vain."""
    first_repeated: int
    first_reworded: int
    first_other_query: int

    @classmethod
    def of(cls, trajectory: Trajectory, decoding: str = "") -> Self:
        example, turns = trajectory.example, trajectory.turns
        return cls(
            id=example.key,
            source=example.source,
            decoding=decoding,
            subset=example.subset,
            question=example.question,
            golden_answers=list(example.golden_answers),
            answer=trajectory.answer,
            **scores(trajectory.answer, example.golden_answers),
            searches=len(trajectory.searches),
            empty_searches=sum(not turn.documents for turn in trajectory.searches),
            turns=len(trajectory.written),
            invalid_actions=sum(turn.kind is ActionKind.INVALID for turn in turns),
            forged=float(forges(turns)),
            truncated=float(trajectory.status.is_truncated),
            invalid=float(trajectory.status is Status.FAILED),
            status=str(trajectory.status),
            sampled_tokens=sum(trajectory.loss_mask),
            noisy_searches=sum(turn.noise or 0 for turn in trajectory.searches),
            **search_again(trajectory),
        )

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Self:
        """The outcome in a line of questions.jsonl. Raises KeyError for a name that it lacks, and
        ValueError for a value that cannot be one of an outcome."""
        if not isinstance(line, dict):
            raise ValueError("no object with names")
        line = {"empty_searches": None, "status": "", "noisy_searches": 0, **line}
        if "em_folded" not in line:
            # A file of before it, when f1 knew the punctuation of ASCII only.
            if not fits(line["answer"], str | None) or not fits(line["golden_answers"], list[str]):
                raise ValueError("no outcome: answer or golden_answers is no text")
            line |= scores(line["answer"], line["golden_answers"])
        for field in fields(cls):
            if not fits(line[field.name], field.type):
                raise ValueError(f"no outcome: {field.name} is {str(line[field.name])[:80]!r}")
        return cls(**{field.name: line[field.name] for field in fields(cls)})


def fits(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of the kind. A number must be one that can be averaged, so not
    NaN."""
    if isinstance(kind, UnionType):
        return any(fits(value, part) for part in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(isinstance(part, str) for part in value)
    if kind in (int, float):
        return type(value) in (int, float) and -1e12 < value < 1e12
    return isinstance(value, kind)


def scores(answer: str | None, golden_answers: Sequence[str]) -> dict[str, Any]:
    """The SCORES of one answer."""
    return {name: score(answer, golden_answers) for name, score in SCORES.items()}


def search_again(trajectory: Trajectory) -> dict[str, int]:
    """The counts of what followed fruitless results, see Outcome."""
    counts = {f"{which}{name}": 0 for which in ("", "first_") for name in ("fruitless", *FOLLOWED)}
    support = set(trajectory.example.support)
    first = True
    for turn, following in zip(trajectory.turns, [*trajectory.turns[1:], None], strict=False):
        # A search without an observation ended the trajectory: it failed, or had no room.
        sent = turn.kind is ActionKind.SEARCH and turn.observation_span is not None
        if not support or not sent:
            continue
        # What helps ends the series: the next query looks for something else.
        if any(document.text in support for document in turn.documents):
            first = True
            continue
        for which in ("", "first_") if first else ("",):
            counts[f"{which}fruitless"] += 1
            if followed := _compared(turn, following):
                counts[f"{which}{followed}"] += 1
        first = False
    return counts


def _compared(turn: Turn, following: Turn | None) -> str:
    if following is None or following.kind is not ActionKind.SEARCH:
        return ""
    # By words, whatever their order, case and punctuation.
    words, others = (set(query_key(search.content).split()) for search in (turn, following))
    if words == others:
        return "repeated"
    # Half of the new words were asked before: the same thing is still looked for.
    return "reworded" if len(words & others) * 2 >= max(1, len(others)) else "other_query"


def column(rows: Sequence[Outcome], name: str) -> list[Any]:
    """One of the outcomes' numbers."""
    return [getattr(row, name) for row in rows]


def total(rows: Sequence[Outcome], name: str) -> float:
    return sum(column(rows, name))


def share(rows: Sequence[Outcome], name: str) -> float:
    """The mean of one of the outcomes' numbers; 0 for no outcomes."""
    return total(rows, name) / max(1, len(rows))


def empty_share(rows: Sequence[Outcome]) -> float:
    """The share of the searches that found nothing at all; 0 for no search."""
    return total(rows, "empty_searches") / max(1, total(rows, "searches"))


def by_decoding(rows: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """All metrics by decoding: of all questions, by data set and by subset."""
    found = {}
    # In the order in which the test used them.
    for decoding in dict.fromkeys(row.decoding for row in rows):
        part = [row for row in rows if row.decoding == decoding]
        found[decoding] = {**summarise(part), **by_source(part), "subsets": by_subset(part)}
    return found


def summarise(rows: Sequence[Outcome]) -> dict[str, Any]:
    """SCORES as intervals, unless the rows are few, the rest as means; None for `empty_searches`
    that were not counted."""
    counted = all(row.empty_searches is not None for row in rows)
    return {
        "questions": len(rows),
        **_scores(rows),
        "searches_per_question": round(share(rows, "searches"), DIGITS),
        "empty_searches": round(empty_share(rows), DIGITS) if counted else None,
        **{name: round(share(rows, name), DIGITS) for name in MEANS},
        "fruitless_results": total(rows, "fruitless"),
        "after_fruitless": _followed(rows, ""),
        "after_first_fruitless": _followed(rows, "first_"),
    }


def _followed(rows: Sequence[Outcome], which: str) -> dict[str, float | None]:
    """Shares of what followed; None if there was no fruitless result."""
    fruitless = total(rows, f"{which}fruitless")
    if not fruitless:
        # 0 would read as a result.
        return dict.fromkeys(FOLLOWED)
    return {name: round(total(rows, f"{which}{name}") / fruitless, DIGITS) for name in FOLLOWED}


def _scores(rows: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    return {name: score_interval(column(rows, name)).told(len(rows)) for name in SCORES}


def by_subset(rows: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """Number of questions, EM (mean, low, high) and the other SCORES of each subset, and of each
    part of its name: new/one_hop, new, one_hop."""
    found: dict[str, dict[str, Any]] = {}
    groups = grouped(rows, lambda row: {row.subset, *row.subset.split("/")} - {""})
    for name, part in groups.items():
        intervals = _scores(part)
        found[name] = {"questions": len(part), **intervals.pop("em"), **intervals}
    return found


def by_source(rows: Sequence[Outcome]) -> dict[str, Any]:
    """SCORES of each data set; of several also `mean_of_sources`, what papers call average."""
    groups = grouped(rows, lambda row: [row.source.split("/")[0]])
    if len(groups) < 2:
        # A mixture's name of a source stands before the slash, that of a single one is whole.
        groups = grouped(rows, lambda row: [row.source])
    parts = {name: {"questions": len(part), **_scores(part)} for name, part in groups.items()}
    found: dict[str, Any] = {"sources": parts}
    if len(groups) > 1:
        found["mean_of_sources"] = means = {}
        for name in SCORES:
            values = {source: column(part, name) for source, part in groups.items()}
            means[name] = mean_of_groups(values).told(min(map(len, values.values())))
    return found


def grouped(rows: Sequence[Outcome], names: Callable[[Outcome], Iterable[str]]) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {}
    for row in rows:
        for name in names(row):
            groups.setdefault(name, []).append(row)
    return dict(sorted(groups.items()))
