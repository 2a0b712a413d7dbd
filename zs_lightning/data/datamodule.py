"""The data module of both stages. Batches are plain lists of rows; the modules tokenize them."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
from torch.utils.data import DataLoader, Sampler

from zs_lightning.data.columns import spelling
from zs_lightning.data.sources import MiniatureSource, QASource, held_out, say
from zs_lightning.errors import UserError
from zs_lightning.streams import drawn, global_seed, stream
from zs_lightning.types import QAExample, SearchRecord

_log = logging.getLogger(__name__)

# Passes over the rows of which nothing is said.
MANY_TIMES = 10


def fingerprint(rows: Sequence[Any]) -> str:
    """The same for the same rows in the same order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode(errors="backslashreplace"))
    return digest.hexdigest()[:16]


@dataclass(eq=False)
class StepSampler(Sampler[list[int]]):
    """`steps` batches of row numbers: seeded permutations of the rows, one after another.

    A permutation's last rows that do not fill a batch are left out of it; with fewer rows than a
    batch, every batch holds them all. The order is a function of the seed; the loader saves the
    position, so a resumed run sees the same batches.
    """

    rows: int
    batch_size: int
    steps: int
    seed: int
    planned: int = 0
    """Steps that the run began with."""
    fingerprint: str = ""
    """By which a resumed run knows its rows."""
    done: int = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        first = self.done
        self.done = 0
        # No batch crosses the end of a permutation, so that no row is twice in a batch.
        per_epoch = max(1, self.rows // self.batch_size)
        shuffled = -1
        for step in range(first, self.steps):
            epoch, at = divmod(step, per_epoch)
            if epoch != shuffled:
                order = list(range(self.rows))
                stream(self.seed, "batches", epoch).shuffle(order)
                shuffled = epoch
            yield order[at * self.batch_size : (at + 1) * self.batch_size]


class StepLoader(DataLoader[Any]):
    """A loader whose position Lightning saves with every checkpoint and restores on resume."""

    batch_sampler: StepSampler
    handed_out = 0

    def __iter__(self) -> Any:
        # Counted here: the sampler may be ahead of what was trained on.
        self.handed_out = self.batch_sampler.done
        for batch in super().__iter__():
            self.handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        names = ("batch_size", "steps", "planned", "rows", "fingerprint")
        state = {name: getattr(self.batch_sampler, name) for name in names}
        return {"batches": self.handed_out, **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the state's batches. Raises UserError if its rows were others."""
        sampler = self.batch_sampler
        # A state of an earlier version does not know its rows.
        if state.get("fingerprint", sampler.fingerprint) != sampler.fingerprint:
            raise UserError(
                f"data.source: the checkpoint was trained on {state['rows']} rows, got {sampler.rows}, and "
                "not the same; set data.source or its file back, or begin anew with another --run.folder"
            )
        sampler.done = state["batches"]


@dataclass(eq=False, repr=False)
class QADataModule(L.LightningDataModule):
    """Questions for the policy or search records for the simulator.

    Args:
        source: where the rows come from.
        task: `questions` for PolicySFT and PolicyRL, `records` for SimulatorSFT; null takes that of
            the model.
        batch_size: rows of one training step; the policy rolls each out group_size times.
        steps: training steps in all; rows are shuffled anew each time all have been seen.
        validation_rows: most rows of a validation; of more questions, a sample that no seed
            changes.
        test_rows: rows of a test, chosen in the same way; null takes all questions, or 400 records.
        eval_batch_size: rows of a validation or test batch; the last one may be smaller.
        seed: of the order of the rows; None takes seed_everything.
    """

    source: QASource = MiniatureSource()
    task: Literal["questions", "records"] | None = None
    batch_size: int = 16
    steps: int = 50
    validation_rows: int = 64
    test_rows: int | None = None
    eval_batch_size: int = 256
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__init__()
        # Without a command line there is no model to look at.
        self.task = self.task or "questions"
        for name in ("batch_size", "steps", "validation_rows", "test_rows", "eval_batch_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise UserError(f"data: expected {name} >= 1; got {size}")
        self.planned = self.steps
        """Steps that the run began with: noise and learning rate are planned over them."""

    def _rows(self, split: str, limit: int | None) -> Sequence[QAExample | SearchRecord]:
        rows: Sequence[QAExample | SearchRecord]
        if self.task == "records":
            rows = self.source.search_records(split, limit or 400)
        else:
            rows = questions = self.source.questions(split)
            # By the questions alone: runs of one source ask the same ones, whatever their seeds,
            # and whatever its files are called.
            if limit is not None:
                texts = [f"{spelling(row.question)} {row.id}" for row in questions]
                rows = [questions[i] for i in drawn(texts, limit, split)]
        if not rows:
            name = type(self.source).__name__
            raise UserError(f"data: the {split} split of {name} has no rows; change data.source")
        return rows

    def go_on_from(self, state: Mapping[str, Any]) -> None:
        """Takes the plan of a run from its StepLoader's state. Raises UserError if it differs."""
        size = state.get("batch_size", self.batch_size)
        if size != self.batch_size:
            said = f"the checkpoint was trained with {size}, got {self.batch_size}; set it back"
            raise UserError(f"data.batch_size: {said}")
        steps = state.get("steps", self.steps)
        # More steps than it had come after its own: noise and learning rate then stay at their end.
        if steps > self.steps:
            said = f"the run has {steps}, got {self.steps}; they can be raised, not lowered"
            raise UserError(f"data.steps: {said}")
        self.planned = state.get("planned", steps)

    def train_dataloader(self) -> StepLoader:
        # Records are drawn for the whole run; questions are all there are, repeated.
        count = self.batch_size * self.planned if self.task == "records" else None
        rows = self._rows("train", count)
        plan = (len(rows), self.batch_size, self.steps, global_seed(self.seed))
        sampler = StepSampler(*plan, self.planned, fingerprint(rows))
        unlike = len(set(map(id, rows)))
        times = self.steps // max(1, unlike // self.batch_size)
        if times > MANY_TIMES:
            said = f"{self.steps} steps train on each of the {unlike} {self.task} {times} times"
            _log.warning(f"data: {said}; lower data.steps or add rows, else they may be learnt by heart")
        if self.task == "questions":
            self._say_overlap(list(rows))
        return StepLoader(rows, batch_sampler=sampler, collate_fn=list)  # type: ignore[arg-type]

    def _say_overlap(self, train: list[Any]) -> None:
        """Counts held-out questions that training has as well, up to case, punctuation and
        articles. They stay in it: published sets are compared as they are."""
        known = {spelling(row.question) for row in train}
        for split, held in held_out(self.source, "data", "train"):
            if shared := sum(spelling(row.question) in known for row in held):
                say(f"data: {shared} of {len(held)} {split} questions are also in train")

    def val_dataloader(self) -> DataLoader[Any]:
        return self._evaluation("validation", self.validation_rows)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._evaluation("test", self.test_rows)

    def _evaluation(self, split: str, limit: int | None) -> DataLoader[Any]:
        rows: Any = self._rows(split, limit)
        return DataLoader(rows, batch_size=self.eval_batch_size, shuffle=False, collate_fn=list)
