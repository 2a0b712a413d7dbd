"""The pairs of a build: labelled, without repetitions, and as many of each label as are wanted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from zs_lightning.commands.build_simulator_data.kinds import Kinds
from zs_lightning.search.judges import kappa
from zs_lightning.streams import drawn
from zs_lightning.text.prompts import NOISY, USEFUL
from zs_lightning.text.protocol import query_key
from zs_lightning.types import Document, QAExample, SearchRecord

Judge = Literal["rule", "model", "both"]


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
        """Whether half of the pairs are there of either label."""
        return min(len(self.of(USEFUL)), len(self.of(NOISY))) >= (pairs + 1) // 2

    def kappa(self) -> float | None:
        return kappa(self.verdicts)

    def chosen(self, pairs: int, kinds: Sequence[str], seed: int) -> list[SearchRecord]:
        """As many useful records as noisy ones, as far as there are enough, and of each kind one for
        every useful record that it can be made of."""
        chosen: list[SearchRecord] = []
        for label in (USEFUL, NOISY):
            found = self.of(label)
            keys = [f"{record.example.key} {record.query}" for record in found]
            kept = drawn(keys, (pairs + 1) // 2, seed, label)
            chosen += [found[place] for place in kept]
            self.counts[f"left_out_{label}"] = len(found) - len(kept)
        maker = Kinds(self.records, seed)
        useful = [record for record in chosen if record.label == USEFUL]
        for kind in kinds:
            made = [noise for record in useful if (noise := maker.made(kind, record))]
            self.counts[f"without_{kind}"] = len(useful) - len(made)
            chosen += made
        return chosen
