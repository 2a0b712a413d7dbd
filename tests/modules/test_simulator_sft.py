"""Fine-tuning of the simulator against the slow gradient: one unpadded text at a time, all logits."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from support.detached import DetachedSimulator, assert_same, move_adapter
from zs_lightning.data.sources import MiniatureSource
from zs_lightning.errors import RunError, UserError
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.modules import ranks, simulator_sft
from zs_lightning.search.simulator import SimulatorSearch
from zs_lightning.text.prompts import MINIATURE
from zs_lightning.types import Document, QAExample, SearchRecord


def records():
    rows = []
    for i in range(4):
        documents = tuple(Document(text=f"The Red Harbor author Foo {'Bar ' * (i + k)}.") for k in range(1 + i % 3))
        asked = QAExample(id=str(i), question="Who is author x?" * (i + 1), golden_answers=("Foo", "Bar"), source="test")
        rows.append(
            SearchRecord(
                example=asked, query="author " * (i + 1) + "x", label="noisy" if i % 2 else "useful", documents=documents
            )
        )
    return rows


def sft(micro_batch_tokens=16384, **options):
    module = DetachedSimulator(
        model=ModelSpec(device="cpu"),
        lora=LoraSpec(r=4),
        prompts="miniature",
        max_grad_norm=0.0,
        micro_batch_tokens=micro_batch_tokens,
        seed=0,
        **options,
    )
    module.setup("fit")
    move_adapter(module)
    return module.attach(torch.optim.SGD(module.trainable().values(), lr=1.0))


def slow_sft_loss(module, rows):
    """Mean over all target tokens of the batch; the whole text is tokenised at once, the prompt carries no loss."""
    losses = []
    for row in rows:
        answers = ", ".join(row.example.golden_answers)
        prompt = (
            f"<question> {row.example.question}</question><answer> {answers}</answer><search> {row.query}</search>"
            f"<think> {row.label}</think><information>"
        )
        target = "".join(f" Doc {i}: {d.text}" for i, d in enumerate(row.documents, 1)) + "</information>"
        start = len(module.tokenizer(prompt)["input_ids"])
        ids = module.tokenizer(prompt + target)["input_ids"]
        table = module.language_model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-table[place - 1, ids[place]] for place in range(start, len(ids))]
    return torch.stack(losses).mean(), len(losses)


@pytest.mark.parametrize("micro_batch_tokens", [1, 150, 16384])
def test_fine_tuning_follows_the_slow_gradient_and_masks_the_prompt(micro_batch_tokens):
    """However the batch is split: the mean is over the tokens of all of it."""
    module, rows = sft(micro_batch_tokens), records()
    expected_loss, tokens = slow_sft_loss(module, rows)
    parameters = module.trainable()
    gradients = torch.autograd.grad(expected_loss, list(parameters.values()))
    before = {name: p.detach().clone() for name, p in parameters.items()}
    module.training_step(rows, 0)
    assert float(module.logged["sft/loss"]) == pytest.approx(float(expected_loss), abs=1e-5)
    assert module.logged["sft/tokens"] == tokens
    moved = {name: before[name] - p.detach() for name, p in parameters.items()}
    assert_same(moved, dict(zip(parameters, gradients, strict=True)))


def test_fine_tuning_lowers_the_loss_and_can_write_what_it_learnt():
    module, rows = sft(), MiniatureSource().search_records("train", 2)
    module.own_optimizer = torch.optim.AdamW(module.trainable().values(), lr=0.02)
    for _ in range(40):
        module.training_step(rows, 0)
    assert float(module.logged["sft/loss"]) < 0.1
    module.language_model.eval()
    module.simulator.max_new_tokens = 30
    module.simulator.submit([module._request(row, str(i), float(row.label == "noisy")) for i, row in enumerate(rows)])
    written = {result.key: result for result in module.simulator.poll()}
    for i, row in enumerate(rows):
        assert written[str(i)].label == row.label
        assert [d.text for d in written[str(i)].documents] == [" ".join(d.text.split()) for d in row.documents]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_is_on_also_after_a_validation(checkpointing):
    module, calls = sft(checkpointing=checkpointing), []
    layer = next(part for name, part in module.language_model.named_modules() if name.endswith("layers.0.mlp"))
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(2):
        calls.clear()
        module.learn(records()[:1], 0)
        assert len(calls) == 1 + checkpointing
        module.language_model.eval()  # As a validation leaves it.


def recall_of(module, rows):
    module.on_validation_epoch_start()
    module.validation_step(rows, 0)
    return module.recall


def test_two_processes_share_a_validation_and_know_all_of_it(monkeypatch):
    module, rows = sft(), MiniatureSource().search_records("validation", 5)
    module.simulator.max_new_tokens = 40
    whole, shares = recall_of(module, rows), []
    assert all(len(found) == 5 for found in whole.values())
    assert {*whole["useful"], *whole["noisy"]} == {0.0, 1.0}

    def meet(results):
        shares.append(results)
        return shares

    monkeypatch.setattr(simulator_sft, "gather", meet)
    monkeypatch.setattr(ranks, "rank_and_size", lambda: (len(shares), 2))
    recall_of(module, rows)  # The first rank meets nobody yet.
    assert recall_of(module, rows) == whole
    assert [len(share) for share in shares] == [6, 4]


def test_each_kind_of_the_records_is_measured_beside_what_is_useful(monkeypatch):
    """The gap, by which the best model is kept, is to the mean of the kinds."""
    module = sft()
    rows = [replace(row, label=label) for row, label in zip(
        MiniatureSource().search_records("validation", 3), ("useful", "partial", "off_topic"), strict=True
    )]  # fmt: skip
    module.simulator.max_new_tokens = 40
    assert list(recall_of(module, rows)) == ["useful", "off_topic", "partial"]
    logged = {}
    monkeypatch.setattr(type(module), "log", lambda self, name, value, **_: logged.update({name: value}))
    module.recall = {"useful": [1.0, 1.0, 0.0, 1.0], "off_topic": [0.0] * 4, "partial": [1.0, 0.0, 0.0, 0.0]}
    monkeypatch.setattr(type(module), "trainer", SimpleNamespace(state=SimpleNamespace(fn="validate")))
    module.on_validation_epoch_end()
    assert logged == {
        "simulator/useful_recall": 0.75,
        "simulator/off_topic_recall": 0.0,
        "simulator/partial_recall": 0.25,
        "simulator/gap": 0.75 - 0.125,
    }


def test_a_record_of_an_unknown_kind_is_refused_with_the_kinds_there_are():
    with pytest.raises(UserError, match="label 'satire'; expected useful, noisy, off_topic, partial, contradicting, outdated"):
        sft()._encode(replace(records()[0], label="satire"))


def test_a_record_is_taught_by_the_order_that_its_query_will_get():
    """One that asks for nothing of the question is ordered without it, unless that was found before."""
    module = sft()
    record = replace(records()[0], query="weather of Zubol")
    ids, prompt = module._encode(record)
    assert module.tokenizer.decode(ids[:prompt]) == ("<search> weather of Zubol</search><think> useful</think><information>")
    ids, prompt = module._encode(replace(record, shown=(Document(text="Foo lives in Zubol."),)))
    assert module.tokenizer.decode(ids[:prompt]).startswith("<question> Who is author x?")


def test_a_result_that_failed_counts_as_what_was_ordered():
    module, rows = sft(), MiniatureSource().search_records("validation", 3)
    module.simulator.max_new_tokens = module.simulator.max_length
    assert recall_of(module, rows) == {"useful": [0.0] * 3, "noisy": [0.0] * 3}


@pytest.mark.parametrize(("held", "taught"), [(1, 1), (3, 3), (7, 5)])
def test_the_order_names_as_many_documents_as_the_target_holds(held, taught):
    module = sft()
    module.simulator.prompts = replace(
        MINIATURE, simulator_useful="Write {count} for {query}", simulator_noisy="{count} {query}"
    )
    documents = tuple(Document(text=f"Foo Bar {i}.") for i in range(held))
    asked = QAExample(id="0", question="Who?", golden_answers=("Foo",), source="test")
    ids, prompt = module._encode(SearchRecord(example=asked, query="author", label="useful", documents=documents))
    assert module.tokenizer.decode(ids[:prompt]) == f"Write {taught} for author"
    assert module.tokenizer.decode(ids[prompt:]).count("Doc") == taught


def test_memory_that_is_full_in_a_validation_names_options_that_there_are():
    module = DetachedSimulator(model=ModelSpec(device="cpu"))
    with pytest.raises(
        RunError, match=r"^memory is full with data\.batch_size at its least, 64; set model\.model\.quantization"
    ):
        module.simulator.fitting.halve(64)
    search = SimulatorSearch(ModelSpec(device="cpu"), prompts="miniature", max_new_tokens=8, max_length=512)
    search.setup()
    with pytest.raises(RunError, match=r"with model\.search\.slots at its least, 64; lower model\.search\.max_length"):
        search.fitting.halve(64)


def test_a_step_that_ran_out_of_memory_is_repeated_in_smaller_parts(monkeypatch):
    weights, seen, forward = [], [], simulator_sft.token_logprobs

    def failing(*args):
        seen.append(args)
        if len(seen) == 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: not enough memory")
        return forward(*args)

    for patch in (forward, failing):
        monkeypatch.setattr(simulator_sft, "token_logprobs", patch)
        module = sft(micro_batch_tokens=150)
        module.training_step(records(), 0)
        weights.append(module.trainable())
    assert (len(seen), module.logged["sft/micro_batch_tokens"] < 150, module.logged["sft/skipped_steps"]) == (6, True, 0)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-5, rtol=0)
