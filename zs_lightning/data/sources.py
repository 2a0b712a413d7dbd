"""Where rows come from."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from zs_lightning.errors import UserError
from zs_lightning.streams import stream
from zs_lightning.text.shown import visible
from zs_lightning.types import QAExample, SearchRecord

SPLITS = ("train", "validation", "test")


class MissingSplit(UserError):
    """A source does not have the split that is asked for."""


class QASource(ABC):
    """A data set of questions, and of simulator records if it has any.

    Splits are train, validation and test.
    """

    @abstractmethod
    def questions(self, split: str) -> list[QAExample]:
        """All rows of the split. Raises MissingSplit if there is none."""

    def search_records(self, split: str, count: int) -> list[SearchRecord]:
        """Up to `count` rows to train a simulator on."""
        said = "has no search records; choose another source, or train a policy (PolicyRL) on its questions"
        raise UserError(f"data: {type(self).__name__} {said}")


class MiniatureSource(QASource):
    """Questions about a fictional world.

    Args:
        world_seed: which world. The shipped base model knows the documents of world 0 only.
    """

    def __init__(self, world_seed: int = 0) -> None:
        self.world_seed = world_seed

    def questions(self, split: str) -> list[QAExample]:
        from zs_lightning.miniature.world import make_world

        questions = make_world(self.world_seed).questions()[split]
        return [question.example(self.world_seed) for question in questions]

    def search_records(self, split: str, count: int) -> list[SearchRecord]:
        """Rule-made results about the known part of the world."""
        from zs_lightning.miniature.searches import GOOD_QUERY_SHARE, search_records
        from zs_lightning.miniature.world import make_world

        world = make_world(self.world_seed)
        # The simulator must not learn new entities: they are what the test with BM25 is about.
        questions = [question for question in world.questions()[split] if not question.new]
        # A quarter of the training rows have poor queries. Held-out rows ask well, or the share
        # of useful results that hold the fact could not be measured on them.
        good = GOOD_QUERY_SHARE if split == "train" else 1.0
        rng = stream("miniature", self.world_seed, "records", split)
        return search_records(world, questions, count, good, rng)


def example_in(row: QAExample | SearchRecord) -> QAExample:
    """The question of a row of either task."""
    return row.example if isinstance(row, SearchRecord) else row


@rank_zero_only
def say(text: str) -> None:
    """Prints to the terminal, from one process only; names of files and columns steer nothing."""
    print(visible(text), flush=True)


def held_out(source: QASource, who: str, where: str) -> Iterator[tuple[str, list[QAExample]]]:
    """The splits that are not trained on, with their questions, as far as they can be read. Says
    why one cannot, whose questions `who` then does not look for in `where`."""
    for split in SPLITS[1:]:
        try:
            yield split, source.questions(split)
        except MissingSplit:
            continue
        except UserError as error:
            # Published test sets may be without answers, which nothing here needs.
            say(f"{who}: {split} questions were not looked for in {where}: {error}")
