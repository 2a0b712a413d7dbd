"""The data module of both stages: batches are plain lists of rows, tokenizers are the modules' business."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import lightning as L
from torch.utils.data import DataLoader, Sampler

from zs_lightning.data.sources import MiniatureSource, QASource
from zs_lightning.errors import UserError
from zs_lightning.streams import drawn, global_seed, stream
from zs_lightning.types import QAExample, SearchRecord

_log = logging.getLogger(__name__)

MANY_TIMES = 10
"""Passes over the rows of which nothing is said."""


def fingerprint(rows: Sequence[Any]) -> str:
    """The same for the same rows in the same order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode(errors="backslashreplace"))
    return digest.hexdigest()[:16]


class StepSampler(Sampler[list[int]]):
    """`steps` batches of row numbers: seeded permutations of the rows, one after another.

    A permutation's last rows that do not fill a batch are left out of it; with fewer rows than a batch, every batch holds
    them all. The order is a function of the seed; the loader saves the position, so a resumed run sees the same batches.
    """

    def __init__(self, rows: int, batch_size: int, steps: int, seed: int) -> None:
        self.rows, self.batch_size, self.steps, self.seed = rows, batch_size, steps, seed
        self.done, self.planned, self.fingerprint = 0, steps, ""
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        first, self.done = self.done, 0
        for step in range(first, self.steps):
            # No batch crosses the end of a permutation, so that no row is twice in a batch.
            epoch, at = divmod(step, max(1, self.rows // self.batch_size))
            yield self._permutation(epoch)[at * self.batch_size : (at + 1) * self.batch_size]

    def _permutation(self, epoch: int) -> list[int]:
        if self._shuffled[0] != epoch:
            order = list(range(self.rows))
            stream(self.seed, "batches", epoch).shuffle(order)
            self._shuffled = (epoch, order)
        return self._shuffled[1]


class StepLoader(DataLoader[Any]):
    """A loader whose position Lightning saves with every checkpoint and restores on resume."""

    handed_out = 0

    def __iter__(self) -> Any:
        sampler = self.batch_sampler
        assert isinstance(sampler, StepSampler)
        self.handed_out = sampler.done
        for batch in super().__iter__():
            self.handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        assert isinstance(self.batch_sampler, StepSampler)
        sampler = self.batch_sampler
        sizes = {"batch_size": sampler.batch_size, "steps": sampler.steps, "planned": sampler.planned, "rows": sampler.rows}
        return {"batches": self.handed_out, **sizes, "fingerprint": sampler.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError if the rows are not those of the state; one of an earlier version does not know its rows."""
        sampler = self.batch_sampler
        assert isinstance(sampler, StepSampler)
        if state.get("fingerprint", sampler.fingerprint) != sampler.fingerprint:
            raise UserError(
                f"data.source: the checkpoint was trained on {state['rows']} rows, got {sampler.rows}, and not the same; set "
                "data.source or its file back, or begin anew without --ckpt_path"
            )
        sampler.done = state["batches"]


class QADataModule(L.LightningDataModule):
    """Questions for the policy or search records for the simulator.

    Args:
        source: where the rows come from.
        task: `questions` for PolicyRL, `records` for SimulatorSFT.
        batch_size: rows of one training step; for the policy, questions (each is rolled out group_size times).
        steps: training steps in all; rows are shuffled anew each time all have been seen.
        validation_rows: most rows of one validation; of more questions, a sample that no seed changes.
        test_rows: rows of a test, chosen in the same way; null takes all questions, or 400 records.
        eval_batch_size: rows of a validation or test batch; the last batch may be smaller, no row is dropped.
        seed: of the order of the rows; None takes seed_everything.
    """

    def __init__(
        self,
        source: QASource = MiniatureSource(),
        task: Literal["questions", "records"] = "questions",
        batch_size: int = 16,
        steps: int = 50,
        validation_rows: int = 64,
        test_rows: int | None = None,
        eval_batch_size: int = 256,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "batch_size": batch_size,
            "steps": steps,
            "validation_rows": validation_rows,
            "test_rows": test_rows,
            "eval_batch_size": eval_batch_size,
        }
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise UserError(f"data: expected {name} >= 1; got {size}")
        self.source, self.task, self.batch_size, self.steps = source, task, batch_size, steps
        self.validation_rows, self.test_rows, self.eval_batch_size = validation_rows, test_rows, eval_batch_size
        self.seed = seed
        self.planned = steps
        """Steps over which noise and learning rate are planned, and records drawn: those with which the run began."""

    def _rows(self, split: str, limit: int | None) -> Sequence[QAExample | SearchRecord]:
        rows: Sequence[QAExample | SearchRecord]
        if self.task == "questions":
            rows = self.source.questions(split)
            if limit is not None:
                # By the questions alone: runs of the same source ask the same ones, whatever their seeds.
                rows = [rows[i] for i in drawn([row.key for row in rows], limit, split)]
        else:
            rows = self.source.search_records(split, limit or 400)
        if not rows:
            raise UserError(f"data: the {split} split of {type(self.source).__name__} has no rows; change data.source")
        return rows

    def go_on_from(self, state: Mapping[str, Any]) -> None:
        """Takes the plan of a run from the state of its StepLoader; more steps than it had come after its own.

        Raises:
            UserError: this configuration would not have made the run.
        """
        if state.get("batch_size", self.batch_size) != self.batch_size:
            was = state["batch_size"]
            raise UserError(f"data.batch_size: the checkpoint was trained with {was}, got {self.batch_size}; set it back")
        if (was := state.get("steps", self.steps)) > self.steps:
            raise UserError(f"data.steps: the run has {was}, got {self.steps}; they can be raised, not lowered")
        self.planned = state.get("planned", was)

    def train_dataloader(self) -> StepLoader:
        rows = self._rows("train", self.batch_size * self.planned if self.task == "records" else None)
        sampler = StepSampler(len(rows), self.batch_size, self.steps, global_seed(self.seed))
        sampler.planned, sampler.fingerprint = self.planned, fingerprint(rows)
        self._say_repeats(len(rows))
        return StepLoader(rows, batch_sampler=sampler, collate_fn=list)  # type: ignore[arg-type]

    def _say_repeats(self, rows: int) -> None:
        times = self.steps // max(1, rows // self.batch_size)
        if times > MANY_TIMES:
            few = f"; a step has all of them, fewer than data.batch_size: {self.batch_size}" if rows < self.batch_size else ""
            _log.warning(
                "data: %d steps train on each of the %d %s %d times%s; lower data.steps or add rows, else they may be learnt "
                "by heart",
                *(self.steps, rows, self.task, times, few),
            )

    def val_dataloader(self) -> DataLoader[Any]:
        return self._evaluation("validation", self.validation_rows)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._evaluation("test", self.test_rows)

    def _evaluation(self, split: str, limit: int | None) -> DataLoader[Any]:
        rows = self._rows(split, limit)
        return DataLoader(rows, batch_size=self.eval_batch_size, shuffle=False, collate_fn=list)  # type: ignore[arg-type]
