"""Where rows come from."""

from __future__ import annotations

from abc import ABC, abstractmethod

from zs_lightning.errors import UserError
from zs_lightning.streams import stream
from zs_lightning.types import QAExample, SearchRecord

SPLITS = ("train", "validation", "test")


class MissingSplit(UserError):
    """A source does not have the split that is asked for."""


class QASource(ABC):
    """A data set of questions, and of simulator records if it has any. Splits: train, validation, test."""

    @abstractmethod
    def questions(self, split: str) -> list[QAExample]:
        """All rows of the split. Raises MissingSplit if there is none."""

    def search_records(self, split: str, count: int) -> list[SearchRecord]:
        """Up to `count` rows to train a simulator on."""
        raise UserError(f"data: {type(self).__name__} has no search records; set task: questions or choose another source")


class MiniatureSource(QASource):
    """Questions about a fictional world.

    Args:
        world_seed: which world. The shipped base model knows the documents of world 0 only.
    """

    def __init__(self, world_seed: int = 0) -> None:
        self.world_seed = world_seed

    def questions(self, split: str) -> list[QAExample]:
        from zs_lightning.miniature.world import make_world

        return [question.example(self.world_seed) for question in make_world(self.world_seed).questions()[split]]

    def search_records(self, split: str, count: int) -> list[SearchRecord]:
        """Rule-made results about the known part of the world. Training rows are for training questions, a quarter of
        them with poor queries; the other splits ask well, so that recall can be measured, and never about new entities."""
        from zs_lightning.miniature.results import GOOD_QUERY_SHARE, search_records
        from zs_lightning.miniature.world import make_world

        world = make_world(self.world_seed)
        questions = [question for question in world.questions()[split] if not question.new]
        good = GOOD_QUERY_SHARE if split == "train" else 1.0
        return search_records(world, questions, count, good, stream("miniature", self.world_seed, "records", split))
