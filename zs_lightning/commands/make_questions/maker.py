"""Questions from documents: what is asked of whom, kept batch by batch, and sifted at the end."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zs_lightning.commands.make_questions.passages import Task, chosen, document_of, pairs_of, parts_of
from zs_lightning.commands.make_questions.writer import Asker, Here, Questions, Served
from zs_lightning.commands.served import ServedSpec
from zs_lightning.commands.work import Work, going_on
from zs_lightning.data.columns import id_of, spelling
from zs_lightning.data.datamodule import fingerprint
from zs_lightning.data.parts import SUFFIXES
from zs_lightning.data.sources import SPLITS
from zs_lightning.errors import RunError, UserError
from zs_lightning.models.specs import ModelSpec
from zs_lightning.text.answers import folded_match

WORK = "work.jsonl"
FREE = ("corpus", "out", "slots", "schema", "config")
"""Options that may change between two parts: the passages themselves are compared."""
POOR = (4, 128)
"""Batches, and passages, without one good question, after which it ends: more would be in vain."""
Tell = Callable[[int, int, int, int], None]


@dataclass
class Maker:
    """Writes questions with short answers about texts of yours, and keeps those that need them.

    A model writes them, rules look at them, and the model answers them again: with the passage it
    must be right, without it wrong.

    Args:
        corpus: a folder of texts (.txt, .md, .rst), or a jsonl of passages, as BM25Search reads it.
        out: folder of train.jsonl, validation.jsonl and test.jsonl, which FileSource reads, and of
            a card; its `work` keeps what was written. The same command goes on with what is there.
        model: the model that writes and answers.
        served: a model on a server in its place.
        count: most questions about a passage.
        passages: most passages that are asked about, drawn from all.
        pairs: most pairs of passages with a question that takes two steps.
        splits: shares of the documents for train, validation and test. All questions about a
            document are in one part; two documents of different parts make no pair.
        f1: least F1 at which an answer counts as right.
        batch_size: passages, or pairs, that are written about at a time; what a batch gave is kept.
        max_new_tokens: most tokens that are written about a passage.
        max_length: most tokens of a model here of what it reads and writes.
        slots: most texts that a model here writes at the same time.
        seed: of every draw; the model writes greedily.
    """

    corpus: str
    out: str = "runs/questions"
    model: ModelSpec = ModelSpec()
    served: ServedSpec | None = None
    count: int = 2
    passages: int = 2000
    pairs: int = 200
    splits: dict[str, float] = field(default_factory=lambda: {"train": 0.8, "validation": 0.1, "test": 0.1})
    f1: float = 0.6
    batch_size: int = 32
    max_new_tokens: int = 200
    max_length: int = 2048
    slots: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("count", "passages", "batch_size", "max_new_tokens", "slots"):
            if (size := getattr(self, name)) < 1:
                raise UserError(f"{name}: expected 1 or more; got {size}")
        if self.pairs < 0:
            raise UserError(f"pairs: expected 0 or more; got {self.pairs}")
        if not 0 < self.f1 <= 1:
            raise UserError(f"f1: expected a number above 0, up to 1; got {self.f1:g}")
        if Path(self.out).suffix in SUFFIXES:
            files = ", ".join(f"{split}.jsonl" for split in SPLITS)
            raise UserError(f"out: expected a folder for {files}; got the file {self.out}; leave its ending out")
        unknown = self.splits.keys() - set(SPLITS)
        if unknown or "train" not in self.splits or not all(share > 0 for share in self.splits.values()):
            expected = "expected shares above 0 for train, and for validation and test if wanted"
            raise UserError(f"splits: {expected}; got {self.splits}")
        self.place = Path(os.path.expanduser(self.out))
        self.kept = self.place / "work"
        if self.served is not None:
            self.served = self.served.kept_in(self.kept)
        self.counts: Counter[str] = Counter()
        """What was passed over before anything was asked."""

    def tasks(self) -> list[Task]:
        """What is asked about, pairs first: they are few. Raises UserError without any passage."""
        passages = chosen(self.corpus, self.passages, self.seed, self.counts)
        if not passages:
            # The counts are there once all was read.
            counted = [f"{count} {reason}" for reason, count in self.counts.items() if count]
            reasons = ", ".join(counted) or "it is empty"
            raise UserError(f"corpus: no passage to ask about in {self.corpus}; {reasons}")
        parts = parts_of([document_of(passage) for passage in passages], self.splits, self.seed)
        pairs = pairs_of(passages, parts, self.pairs, self.counts)
        return [*pairs, *(Task((passage,), parts[document_of(passage)]) for passage in passages)]

    def made(self, settings: dict[str, Any], tell: Tell) -> tuple[list[Task], list[dict[str, Any]]]:
        """The tasks, and what a model wrote about them, batch by batch.

        Args:
            settings: the options as they were given.
            tell: gets the good questions so far, those that were written, and the tasks done and
                to do.

        Raises:
            UserError: the folder holds other work, or nothing can be asked.
            RunError: the server is gone, or no question is good; what was written is kept.
        """
        tasks = self.tasks()
        bound = settings | {"passages of the corpus": fingerprint([asdict(task) for task in tasks])}
        work = Work(self.kept / WORK, bound, FREE, "out")
        questions: Questions | None = None
        good = written = 0
        for number, start in enumerate(range(0, len(tasks), self.batch_size), 1):
            if number > len(work.batches):
                # What is whole already needs no model.
                questions = questions or Questions(self._asker(), self.count, self.max_new_tokens, self.f1)
                try:
                    work.add(questions.batch(tasks[start : start + self.batch_size]))
                except RunError as error:
                    raise going_on(error, f"questions of {start} passages") from error
            batch = work.batches[number - 1]
            written += sum(bool(one["question"]) for one in batch["candidates"])
            good += sum(not one["fault"] for one in batch["candidates"])
            done = min(start + self.batch_size, len(tasks))
            tell(good, written, done, len(tasks))
            if not good and number >= POOR[0] and done >= POOR[1]:
                break
        if not good:
            raise RunError(self._poor(done, len(tasks), work.batches))
        return tasks, work.batches

    def _asker(self) -> Asker:
        # The server's room is its own, and it says what it does not take.
        return Served(self.served) if self.served else Here(self.model, self.slots, self.max_length)

    def _poor(self, done: int, every: int, batches: list[dict[str, Any]]) -> str:
        faults = Counter(one["fault"] for batch in batches for one in batch["candidates"])
        reasons = ", ".join(f"{count} {reason}" for reason, count in faults.most_common(4))
        # The word passages stands for pairs as well.
        those = f"0 of {done} passages"
        if done < every:
            those = f"0 of the first {done} passages, of {every},"
        said = f"make-questions: {those} gave a question that passes ({reasons})"
        return f"{said}; a larger model may do; what it wrote is in {self.kept / WORK}"


Rows = list[dict[str, Any]]


def sifted(maker: Maker, tasks: list[Task], batches: Rows) -> tuple[Rows, Counter[str]]:
    """The rows of the good questions in the order of their tasks, each question once, and counts of
    everything by reason. A question of which two answers are good has none, and is left out."""
    counts = Counter(maker.counts)
    answers: dict[str, list[str]] = defaultdict(list)
    rows: dict[str, dict[str, Any]] = {}
    for number, batch in enumerate(batches):
        counts.update({f"tokens {name}": count for name, count in batch["counts"].items()})
        for one in batch["candidates"]:
            task = tasks[number * maker.batch_size + one["task"]]
            counts[f"{'two-hop' if task.name else 'one-hop'}: {one['fault'] or 'good'}"] += 1
            if not one["fault"]:
                key = spelling(one["question"])
                answers[key].append(one["answer"])
                rows.setdefault(key, _row(one, task))
    for key, golds in answers.items():
        if not all(folded_match(gold, golds[:1]) for gold in golds):
            counts["good, but left out: the same question has another answer"] += len(golds)
            del rows[key]
        elif len(golds) > 1:
            counts["good, but left out: repeats another question"] += len(golds) - 1
    return list(rows.values()), counts


def _row(one: dict[str, Any], task: Task) -> dict[str, Any]:
    """The columns of FileSource, and what else is known."""
    row: dict[str, Any] = {"id": id_of(spelling(one["question"])), "question": one["question"]}
    row |= {"golden_answers": [one["answer"]], "hops": len(task.passages), "part": task.part}
    return row | {"passages": [asdict(passage) for passage in task.passages]}
