"""Stage 1 of the paper: a model works on training questions with a real engine, and a judge says
which of its searches found something useful (section 3.3)."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import ge
from pathlib import Path
from typing import Any

from zs_lightning.commands.build_simulator_data.kinds import KINDS
from zs_lightning.commands.build_simulator_data.labelled import Judge, Labelled
from zs_lightning.commands.build_simulator_data.searcher import Searcher
from zs_lightning.commands.served import ServedSpec
from zs_lightning.commands.work import Work, going_on
from zs_lightning.data.columns import spelling
from zs_lightning.data.datamodule import fingerprint
from zs_lightning.data.sources import QASource, held_out
from zs_lightning.errors import RunError, UserError
from zs_lightning.models.specs import ModelSpec
from zs_lightning.rollout import RolloutSpec
from zs_lightning.search import SearchEngine
from zs_lightning.streams import uniform
from zs_lightning.text.prompts import USEFUL, get_prompts
from zs_lightning.types import QAExample, SearchRecord

WORK = "work.jsonl"
FREE = ("folder", "records", "pairs", "kinds", "variants", "schema", "config")
"""Options that may change between two parts of a build: no batch depends on them."""
POOR = (4, 256)
"""After so many batches, and rollouts, without anything useful a build ends: the rest is paid for
in vain."""
Tell = Callable[[Labelled, int, int], None]


@dataclass
class Builder:
    """Builds the records that a simulator learns from.

    Args:
        source: of the questions; those of its train split are searched for.
        search: the engine that the simulator is to play.
        model: the model that searches.
        served: a model on a server that searches in its place, and judges where no judge_model is
            given.
        prompts: template set of the model that searches.
        rollout: limits of a rollout, and how its tokens are drawn.
        judge: who says which searches found something useful: rule goes by answers and words,
            model asks a language model, and both keeps what the two agree on.
        judge_model: the model that judges; null takes the one that searches.
        pairs: labelled pairs (query, documents) to aim at, half of them useful.
        group_size: rollouts of each question.
        batch_size: questions that are searched for at a time; what a batch found is kept.
        kinds: kinds of noise to make of the useful pairs by rule: off_topic, partial,
            contradicting, outdated.
        variants: unlike noisy results, and results of each kind, for the query of a useful pair.
            More of them teach a small simulator to tell noise from what is useful.
        folder: where everything is left. The same command goes on with what it finds there; pairs,
            kinds, variants and records may be others then.
        records: name of the file of records in it, .jsonl or .parquet.
        seed: of every draw.
    """

    source: QASource
    search: SearchEngine
    model: ModelSpec = ModelSpec()
    served: ServedSpec | None = None
    prompts: str = "zerosearch"
    rollout: RolloutSpec = RolloutSpec()
    judge: Judge = "rule"
    judge_model: ModelSpec | None = None
    pairs: int = 2000
    group_size: int = 4
    batch_size: int = 64
    kinds: list[str] = field(default_factory=list)
    variants: int = 1
    folder: str = "runs/simulator_data"
    records: str = "records.jsonl"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pairs", "group_size", "batch_size", "variants"):
            if (size := getattr(self, name)) < 1:
                raise UserError(f"{name}: expected 1 or more; got {size}")
        for kind in self.kinds:
            if kind not in KINDS:
                raise UserError(f"kinds: {kind!r} cannot be made by rule; expected {', '.join(KINDS)}")
        if Path(self.records).suffix not in (".jsonl", ".parquet") or Path(self.records).name != self.records:
            raise UserError(f"records: expected a name that ends in .jsonl or .parquet; got {self.records}")
        if self.judge_model is not None and self.judge == "rule":
            raise UserError("judge_model: judge: rule asks no model; set judge: model or both")
        self.templates = get_prompts(self.prompts)
        self.place = Path(os.path.expanduser(self.folder))
        if self.served is not None:
            self.served = self.served.kept_in(self.place)

    def questions(self) -> list[QAExample]:
        """The train questions in the order in which they are searched for."""
        found = {question.key: question for question in self.source.questions("train")}
        return sorted(found.values(), key=lambda q: uniform(self.seed, "questions", q.key))

    def labelled(self, settings: dict[str, Any], tell: Tell) -> Labelled:
        """Searches and judges until there are enough pairs, or no more questions.

        Args:
            settings: the options as they were given.
            tell: gets the pairs so far, the batches that are done and those that there are.

        Raises:
            UserError: the folder holds another build.
            RunError: the engine is gone, or nothing useful was found; what was judged is kept.
        """
        questions = self.questions()
        work = Work(self.place / WORK, settings | {"questions": fingerprint(questions)}, FREE)
        labelled = Labelled(self.judge, {question.key: question for question in questions})
        for batch in work.batches:
            labelled.take(batch)
        starts = range(0, len(questions), self.batch_size)
        searcher: Searcher | None = None
        for number in range(len(work.batches), len(starts)):
            if labelled.enough(self.pairs):
                break
            searcher = searcher or Searcher(self)
            try:
                batch = searcher.batch(questions[starts[number] :][: self.batch_size])
            except RunError as error:
                raise going_on(error, f"{len(labelled.records)} pairs") from error
            work.add(batch)
            labelled.take(batch)
            tell(labelled, number + 1, len(starts))
            done = (number + 1, labelled.counts["trajectories"])
            if not labelled.of(USEFUL) and all(map(ge, done, POOR)):
                break
        if searcher is not None:
            searcher.close()
        self._check(labelled)
        return labelled

    def _check(self, labelled: Labelled) -> None:
        searches = labelled.counts["searches"]
        if not searches:
            change = "take an instruct model, other prompts or a larger rollout.max_new_tokens or max_length"
            raise RunError(f"build: the model made no search in {labelled.counts['trajectories']} rollouts; {change}")
        if not labelled.of(USEFUL):
            change = "see whether search.corpus holds answers to the questions of source, and what work.jsonl found"
            raise RunError(f"build: no search of {searches} found anything useful; {change}")

    def overlap(self, records: list[SearchRecord]) -> dict[str, int]:
        """How many held-out questions of the source, in any spelling, the records have as well;
        nothing of a split that cannot be read."""
        known = {spelling(record.example.question) for record in records}
        shared: dict[str, int] = {}
        for split, questions in held_out(self.source, "build", "the records"):
            shared[split] = len({spelling(question.question) for question in questions} & known)
        return shared
