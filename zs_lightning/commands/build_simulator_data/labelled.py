"""The pairs of a build: labelled, without repetitions, and as many of each label as are wanted."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from zs_lightning.commands.build_simulator_data.kinds import Kinds
from zs_lightning.search.guard import content, named
from zs_lightning.streams import drawn
from zs_lightning.text.prompts import NOISY, USEFUL
from zs_lightning.text.protocol import query_key
from zs_lightning.types import Document, QAExample, SearchRecord

Judge = Literal["rule", "model", "both"]
NATURAL = 0.25
"""Most of the noisy records that are as a search found them: their queries are poor ones, and a
simulator that learnt from these alone would write useful documents for any good query."""


class Labelled:
    """What the batches of a build say.

    Args:
        judge: whose verdict is the label. Where a model says neither useful nor noisy, the rule's
            is; of two judges that differ the pair has none, and is left out.
        examples: the questions by their keys.
    """

    def __init__(self, judge: Judge, examples: Mapping[str, QAExample]) -> None:
        self.judge = judge
        self.examples = examples
        self.records: list[SearchRecord] = []
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0
        self.verdicts: list[tuple[bool, bool]] = []
        """Of rule and model, where both gave one."""
        self.seen: set[tuple[object, ...]] = set()

    def take(self, batch: Mapping[str, Any]) -> None:
        """Adds a batch of the work file."""
        self.counts.update(batch["counts"])
        self.seconds += batch["seconds"]
        for row in batch["pairs"]:
            self._take_pair(row)

    def _take_pair(self, row: Mapping[str, Any]) -> None:
        documents, shown = (tuple(Document(title=t, text=x) for t, x in row[k]) for k in ("documents", "shown"))
        # Whichever question it is of: the same pair in two parts of the data would be known to one
        # from the other.
        same = (query_key(row["query"]), documents)
        if same in self.seen:
            self.counts["repeated"] += 1
            return
        self.seen.add(same)
        rule: bool = row["rule"]
        model: bool = rule if row["model"] is None else row["model"]
        if row["model"] is not None:
            self.verdicts.append((rule, model))
        if self.judge == "both" and rule != model:
            self.counts["disputed"] += 1
            return
        useful = rule if self.judge == "rule" else model
        self.records.append(
            SearchRecord(
                example=self.examples[row["key"]],
                query=row["query"],
                label=USEFUL if useful else NOISY,
                documents=documents,
                # Where a model calls useful what the rule does not, nothing in it is evidence.
                evidence=tuple(row["evidence"]) if rule or not useful else (),
                shown=shown,
            )
        )

    def of(self, label: str) -> list[SearchRecord]:
        return [record for record in self.records if record.label == label]

    def enough(self, pairs: int) -> bool:
        """Whether half of the pairs are useful: noisy twins are made of these."""
        return len(self.of(USEFUL)) >= (pairs + 1) // 2

    def chosen(self, pairs: int, kinds: Sequence[str], variants: int, seed: int) -> list[SearchRecord]:
        """Useful records; as many noisy ones, which are twins of these and a few that searches
        found; and of each kind one for every useful record, as far as they can be made. Of twins
        and kinds there are up to `variants` unlike ones."""
        useful = drawn_of(self.of(USEFUL), (pairs + 1) // 2, seed, USEFUL)
        found = drawn_of(list(filter(_poor, self.of(NOISY))), int(NATURAL * len(useful)), seed, NOISY)
        self.counts["left_out_useful"] = len(self.of(USEFUL)) - len(useful)
        self.counts["left_out_noisy"] = len(self.of(NOISY)) - len(found)
        chosen = dict.fromkeys([*useful, *found])
        maker = Kinds(self.records, seed)
        for maker.variant in range(variants):
            twins = [twin for record in useful if (twin := maker.twin(record))]
            twins = drawn_of(twins, len(useful) - len(found), seed, "twins")
            chosen.update(dict.fromkeys(twins))
            for kind in kinds:
                made = [noise for record in useful if (noise := maker.made(kind, record))]
                chosen.update(dict.fromkeys(made))
                if not maker.variant:
                    self.counts[f"without_{kind}"] = len(useful) - len(made)
        self.counts["twins"] = sum(record.label == NOISY for record in chosen) - len(found)
        return list(chosen)


def drawn_of(records: list[SearchRecord], most: int, seed: int, name: str) -> list[SearchRecord]:
    keys = [f"{record.example.key} {record.query}" for record in records]
    return [records[place] for place in drawn(keys, most, seed, name)]


def _poor(record: SearchRecord) -> bool:
    """Whether nothing was found about what the query names. Another query may have found what it
    asks for, which was of no use to the question alone."""
    names = named([record.query])
    return not any(names <= content(f"{found.title} {found.text}") for found in record.documents)
