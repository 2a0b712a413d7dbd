"""Order of the rows, resuming, and that no row is lost."""

import itertools
from collections import Counter

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zs_lightning.data import FileSource, QADataModule
from zs_lightning.data.datamodule import StepLoader, StepSampler
from zs_lightning.data.sources import MiniatureSource, QASource
from zs_lightning.types import QAExample, SearchRecord


class Numbered(QASource):
    """Questions that are numbers."""

    def __init__(self, **rows):
        self.rows = rows

    def questions(self, split):
        return [
            QAExample(id=str(i), question=split, golden_answers=("x",), source="numbers")
            for i in range(self.rows.get(split, 0))
        ]


# ---------------------------------------------------------------------------------------------------------- sampler


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 30), st.integers(0, 5))
def test_every_epoch_is_a_permutation_cut_into_whole_batches(rows, batch_size, steps, seed):
    batches = list(StepSampler(rows, batch_size, steps, seed))
    assert len(batches) == steps == len(StepSampler(rows, batch_size, steps, seed))
    assert all(len(set(batch)) == len(batch) == min(rows, batch_size) for batch in batches)
    assert all(0 <= row < rows for batch in batches for row in batch)
    per_epoch = max(1, rows // batch_size)
    for start in range(0, steps, per_epoch):
        epoch = batches[start : start + per_epoch]
        seen = [row for batch in epoch for row in batch]
        assert len(set(seen)) == len(seen)
        if len(epoch) == per_epoch:
            assert len(seen) > rows - batch_size


def test_epochs_and_seeds_differ_and_equal_seeds_do_not():
    first, again, other = (list(StepSampler(20, 5, 8, seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert first[:4] != first[4:]
    for epoch in (first[:4], first[4:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(20))


def test_rows_left_out_of_an_epoch_are_not_always_the_same():
    seen = Counter(row for batch in StepSampler(7, 3, 200, 0) for row in batch)
    assert set(seen) == set(range(7))
    assert max(seen.values()) < 1.4 * min(seen.values())


def test_the_order_does_not_depend_on_global_generators():
    torch.manual_seed(1)
    first = list(StepSampler(9, 2, 6, 0))
    torch.manual_seed(2)
    assert list(StepSampler(9, 2, 6, 0)) == first


def numbers(batches):
    return [[int(row.id) for row in batch] for batch in batches]


def module(**arguments):
    return QADataModule(
        **{"source": Numbered(train=10, validation=7, test=7), "batch_size": 3, "steps": 11, "seed": 0, **arguments}
    )


@pytest.mark.parametrize("stop", range(12))
def test_a_resumed_loader_goes_on_where_the_first_one_stopped(stop):
    whole = numbers(module().train_dataloader())
    first, second = module().train_dataloader(), module().train_dataloader()
    begun = numbers(itertools.islice(first, stop))
    state = first.state_dict()
    assert len(state.pop("fingerprint")) == 16
    assert state == {"batches": stop, "batch_size": 3, "steps": 11, "planned": 11, "rows": 10}
    second.load_state_dict(first.state_dict())
    assert begun + numbers(second) == whole
    assert second.state_dict()["batches"] == 11
    assert numbers(second) == whole  # A new pass begins at the beginning.


class Notebook(L.LightningModule):
    """Writes down the rows it was given."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.1)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def training_step(self, batch, batch_idx):
        self.seen.append([int(row.id) for row in batch])
        optimizer = self.optimizers()
        self.manual_backward(self.weight.sum())
        optimizer.step()


def test_lightning_resumes_with_the_batches_that_were_not_seen(tmp_path):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    first, second, whole = Notebook(), Notebook(), numbers(module().train_dataloader())
    trainer = L.Trainer(max_epochs=1, limit_train_batches=11, accelerator="cpu", **quiet)

    class SaveAfterFive(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:
                trainer.save_checkpoint(tmp_path / "five.ckpt")

    trainer.callbacks.append(SaveAfterFive())
    trainer.fit(first, datamodule=module())
    assert first.seen == whole
    resumed = L.Trainer(max_epochs=1, accelerator="cpu", **quiet)
    resumed.fit(second, datamodule=module(), ckpt_path=tmp_path / "five.ckpt")
    assert second.seen == whole[5:]


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("eval_batch_size", [1, 64, 3125, 10_000])
def test_evaluation_sees_every_row_once_and_in_order(eval_batch_size):
    """The reference drops the last batch of 64: 53 of 3,125 questions, all of one data set."""
    rows = module(source=Numbered(test=3125), eval_batch_size=eval_batch_size).test_dataloader()
    seen = [row for batch in numbers(rows) for row in batch]
    assert seen == list(range(3125))
    assert len(rows) == -(-3125 // eval_batch_size)


def test_limits_of_rows_are_kept():
    limited = module(validation_rows=5, test_rows=6, eval_batch_size=4)
    assert [len(batch) for batch in limited.val_dataloader()] == [4, 1]
    assert [len(batch) for batch in limited.test_dataloader()] == [4, 2]
    assert sum(map(len, module(validation_rows=100).val_dataloader())) == 7


def test_fewer_rows_are_a_sample_that_no_seed_changes():
    def tested(count, seed=0):
        made = module(source=Numbered(test=1000), test_rows=count, eval_batch_size=1000, seed=seed)
        (rows,) = numbers(made.test_dataloader())
        return rows

    some = tested(300)
    assert some == sorted(some) == tested(300, seed=1)
    assert len(set(some)) == 300
    assert 110 < sum(row < 500 for row in some) < 190  # The first 300 would all be there: 300.
    assert set(tested(100)) < set(some)  # Runs with other limits share what they can.
    assert tested(1000) == tested(None) == list(range(1000))


def test_the_sizes_of_splits_are_said(tmp_path, capsys):
    (tmp_path / "q.csv").write_text("question,golden_answers\n" + "".join(f"Who is {i}?,Foo\n" for i in range(40)))
    shares = {"train": 0.5, "validation": 0.2, "test": 0.3}
    source = FileSource(str(tmp_path / "q.csv"), splits=dict(shares))
    sizes = {split: len(source.questions(split)) for split in shares}
    assert sum(sizes.values()) == 40
    said = [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines() if " split: " in line]
    assert said == [f"{sizes[split]} of 40 questions" for split in shares]


def test_some_questions_of_the_miniature_are_of_every_subset():
    (rows,) = module(source=MiniatureSource(), test_rows=300, eval_batch_size=1000).test_dataloader()
    asked = Counter(row.subset for row in rows)
    every = Counter(row.subset for row in MiniatureSource().questions("test"))
    for name, count in every.items():
        assert asked[name] == pytest.approx(300 * count / every.total(), abs=25)


def test_batches_are_plain_lists_of_rows():
    assert isinstance(module().train_dataloader(), StepLoader)
    (batch, *_) = module().train_dataloader()
    assert isinstance(batch, list)
    assert isinstance(batch[0], QAExample)


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["batch_size", "steps", "validation_rows", "test_rows", "eval_batch_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_below_one_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"data: expected {name} >= 1; got {value}"):
        module(**{name: value})


@pytest.mark.parametrize(("split", "loader"), [("train", "train"), ("validation", "val"), ("test", "test")])
def test_an_empty_split_is_named(split, loader):
    with pytest.raises(ValueError, match=rf"the {split} split of Numbered has no rows; change data\.source"):
        getattr(module(source=Numbered()), f"{loader}_dataloader")()


def test_a_source_without_records_says_so():
    with pytest.raises(ValueError, match="Numbered has no search records; choose another source"):
        module(task="records").train_dataloader()


# ---------------------------------------------------------------------------------------------------------- miniature


def test_the_seed_is_that_of_seed_everything_unless_given(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    default, three, other = (numbers(module(seed=seed).train_dataloader()) for seed in (None, 3, 0))
    assert default == three != other


def test_miniature_records_fill_the_training_steps_and_stay_the_same():
    def rows(loader):
        return [row for batch in loader for row in batch]

    first, again = (rows(module(source=MiniatureSource(), task="records").train_dataloader()) for _ in range(2))
    assert first == again
    assert len(first) == 33
    assert all(isinstance(row, SearchRecord) for row in first)
    assert len({row.query for row in first}) > 25


def test_held_out_records_ask_well_and_about_other_questions():
    source = MiniatureSource()
    train, held = source.search_records("train", 300), source.search_records("validation", 300)
    assert all(record.evidence for record in held)
    assert 20 < sum(not record.evidence for record in train) < 100
    assert not {record.example.id for record in train} & {record.example.id for record in held}
    known = {example.id for example in source.questions("train")}
    assert {record.example.id for record in train} <= known


def test_sources_are_named_by_their_world():
    first, other = MiniatureSource(0).questions("test"), MiniatureSource(1).questions("test")
    assert {example.source for example in first} == {"miniature-0"}
    assert not {example.key for example in first} & {example.key for example in other}
    assert len({example.key for example in first}) == len(first)
