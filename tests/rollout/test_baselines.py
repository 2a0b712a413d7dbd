"""Baselines that differ from a test by configuration alone: no search, one-shot retrieval, the untrained policy."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from support.tiny import PlayerPiano, piano_logit
from zs_lightning.cli import main
from zs_lightning.generation import Generator, Sampling, StopTags
from zs_lightning.models.encoding import TextEncoder
from zs_lightning.models.logprobs import token_logprobs
from zs_lightning.rollout import Rollouter, RolloutSpec, collate
from zs_lightning.runs.outcomes import Outcome
from zs_lightning.search import BM25Search, SearchEngine
from zs_lightning.text.prompts import MINIATURE, ZEROSEARCH
from zs_lightning.text.protocol import STOP_TAGS
from zs_lightning.types import ActionKind, Document, QAExample, SearchResult, Status

TEST = f"--config={Path(__file__).parents[2] / 'configs' / 'miniature' / 'test.yaml'}"
QUESTION = "Who wrote The Red Harbor"
EXAMPLE = QAExample(id="1", question=QUESTION, golden_answers=("Foo Bar",), source="toy")
DOCUMENTS = "Doc 1: The Red Harbor: Foo ‹b› Bar\nDoc 2: more\n"
PROMPTS = replace(
    ZEROSEARCH, policy="Q: {question}\n", closed_book="Closed: {question}\n", retrieved="Read: {question}\n", chat=False
)


class Library(SearchEngine):
    """Answers every query with two documents, or not at all."""

    name = "library"

    def __init__(self, failure=None):
        self.failure, self.seen, self.pending = failure, [], []

    def submit(self, requests):
        self.seen += requests
        self.pending += requests

    def poll(self):
        taken, self.pending = self.pending, []
        documents = (Document(text="Foo <b> Bar", title="The Red Harbor"), Document(text="more"))
        return [SearchResult(key=r.key, documents=documents, failure=self.failure) for r in taken]


class Stage:
    """A policy that plays written turns after a given beginning."""

    def __init__(self, tokenizer):
        self.tokenizer, self.encoder, self.stop = tokenizer, TextEncoder(tokenizer), StopTags(tokenizer, STOP_TAGS)
        self.documents = self.encoder.literal("\n\n<information>") + self.encoder.untrusted(DOCUMENTS)
        self.documents += self.encoder.literal("</information>\n\n")

    def play(self, search, prompt, *turns, group_size=1, **limits):
        spec = RolloutSpec(**{"max_new_tokens": 40, "max_length": 600, "slots": 4, "retrieve_first": True, **limits})
        read = tuple(self.encoder.literal(prompt) + (self.documents if spec.retrieve_first else []))
        piano = PlayerPiano(len(self.tokenizer), {read: [self.encoder.literal(turn) for turn in turns]})
        engine = Generator(piano, spec.slots, spec.max_length)
        rollout = Rollouter(engine, self.encoder, search, PROMPTS, spec, self.stop)
        return rollout.run([EXAMPLE], group_size, 0, Sampling(temperature=0.0))


@pytest.fixture(scope="module")
def stage(tokenizers):
    return Stage(tokenizers["raw"])


def test_one_shot_retrieval_token_by_token(stage):
    search, turn = Library(), "<think> I see. </think><answer> Foo Bar </answer>"
    (trajectory,) = stage.play(search, f"Read: {QUESTION}?\n", turn, max_turns=0)
    answer = stage.encoder.literal(turn)
    assert [(r.query, r.example, r.turn) for r in search.seen] == [(QUESTION, EXAMPLE, 1)]
    assert trajectory.prompt_ids == stage.encoder.literal(f"Read: {QUESTION}?\n")
    assert trajectory.token_ids == stage.documents + answer
    assert trajectory.loss_mask == [False] * len(stage.documents) + [True] * len(answer)
    wanted = [piano_logit(i) - math.log(math.exp(piano_logit(i)) + len(stage.tokenizer) - 1) for i in range(len(answer))]
    assert trajectory.old_logprobs == pytest.approx([0.0] * len(stage.documents) + wanted, abs=1e-4)
    first, last = trajectory.turns
    assert (first.text, first.kind, first.content, first.span) == ("", ActionKind.SEARCH, QUESTION, (0, 0))
    assert first.observation_span == (0, len(stage.documents))
    assert [document.text for document in first.documents] == ["Foo <b> Bar", "more"]
    assert (last.text, last.span) == (turn, (len(stage.documents), len(trajectory.token_ids)))
    row = Outcome.of(trajectory)
    assert (row.em, row.searches, row.turns, row.sampled_tokens) == (1.0, 1, 1, len(answer))


def test_after_one_shot_retrieval_only_an_answer_counts(stage):
    search = Library()
    (trajectory,) = stage.play(search, f"Read: {QUESTION}?\n", "<search> more </search>", max_turns=0)
    assert (trajectory.status, len(search.seen)) == (Status.TURN_LIMIT, 1)


def test_retrieval_comes_before_the_turns_and_is_none_of_them(stage):
    search = Library()
    turns = ["<search> more </search>", "<search> again </search>", "<answer> Foo Bar </answer>"]
    (trajectory,) = stage.play(search, f"Q: {QUESTION}?\n", *turns, max_turns=2)
    assert trajectory.answer == "Foo Bar"
    assert [request.query for request in search.seen] == [QUESTION, "more", "again"]
    assert len({request.seed for request in search.seen}) == 3
    assert (Outcome.of(trajectory).searches, Outcome.of(trajectory).turns) == (3, 3)


def test_asking_the_question_again_gets_the_same_result_without_another_call(stage):
    search = Library()
    turns = [f"<search> {QUESTION} </search>", "<answer> Foo Bar </answer>"]
    (trajectory,) = stage.play(search, f"Q: {QUESTION}?\n", *turns, max_turns=2, noise_draw="query")
    assert len(search.seen) == 1
    assert [turn.documents for turn in trajectory.turns[:2]] == [trajectory.turns[0].documents] * 2


def test_a_failed_retrieval_fails_the_trajectory(stage):
    (trajectory,) = stage.play(Library("no network"), "Read", max_turns=0)
    assert (trajectory.status, trajectory.failure, trajectory.token_ids) == (Status.FAILED, "no network", [])


def test_documents_that_leave_no_room_end_the_trajectory(stage):
    room = len(stage.encoder.literal(f"Read: {QUESTION}?\n")) + len(stage.documents)
    (full,) = stage.play(Library(), f"Read: {QUESTION}?\n", "x", max_turns=0, max_length=room)
    assert (full.status, full.token_ids) == (Status.LENGTH_LIMIT, [])
    (one,) = stage.play(Library(), f"Read: {QUESTION}?\n", "x y", max_turns=0, max_length=room + 1)
    assert sum(one.loss_mask) == 1


def test_more_rows_than_slots_are_all_retrieved_for(stage):
    search = Library()
    found = stage.play(search, f"Read: {QUESTION}?\n", "<answer> Foo Bar </answer>", group_size=9, max_turns=0, slots=2)
    assert [(t.sample, t.answer, Outcome.of(t).searches) for t in found] == [(i, "Foo Bar", 1) for i in range(9)]


def test_logprobs_after_retrieval_are_those_of_a_plain_forward(miniature):
    model, tokenizer = miniature
    search, encoder = BM25Search(), TextEncoder(tokenizer)
    spec = RolloutSpec(max_turns=0, retrieve_first=True, max_new_tokens=16, max_observation_tokens=64, max_length=256, slots=4)
    rollout = Rollouter(Generator(model, 4, 256), encoder, search, MINIATURE, spec, StopTags(tokenizer, STOP_TAGS))
    found = rollout.run([EXAMPLE, replace(EXAMPLE, id="2", question="Who wrote Hamlet?")], 2, 3)
    batch = collate(found, tokenizer.eos_token_id)
    with torch.no_grad():
        slow, _ = token_logprobs(model, batch.input_ids, batch.loss_mask, temperature=1.0)
    assert batch.old_logprobs.tolist() == pytest.approx(slow.tolist(), abs=1e-3)
    assert all(t.loss_mask[0] is False and sum(t.loss_mask) > 0 for t in found)


@pytest.mark.parametrize(
    ("options", "searches", "turns"),
    [
        ([], None, None),  # The untrained policy: no checkpoint.
        (["--model.rollout.max_turns=0"], 0.0, 1.0),
        (["--model.rollout.max_turns=0", "--model.rollout.retrieve_first=true"], 1.0, 1.0),
    ],
)
def test_baselines_by_configuration_alone(options, searches, turns, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["test", TEST, "--run.folder=run", "--data.test_rows=4", "--model.decodings=[greedy]", *options])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    greedy = results["decodings"]["greedy"]
    assert greedy["questions"] == greedy["sources"]["miniature-0"]["questions"] == 4
    assert {"em", "cover_em", "f1", "sampled_tokens", "truncated", "invalid", "forged"} <= set(greedy)
    assert results["seconds"] > 0
    if searches is not None:
        assert (greedy["searches_per_question"], greedy["turns"]) == (searches, turns)


def test_one_search_by_the_question_is_a_baseline_worth_its_name(tmp_path, monkeypatch):
    """The tiny base model reads what the question itself finds: enough for one hop, never for two."""
    monkeypatch.chdir(tmp_path)
    rag = ["--model.rollout.max_turns=0", "--model.rollout.retrieve_first=true"]
    main(["test", TEST, "--run.folder=run", "--data.test_rows=80", "--model.decodings=[greedy]", *rag])
    subsets = json.loads((tmp_path / "run" / "results.json").read_text())["decodings"]["greedy"]["subsets"]
    assert subsets["one_hop"]["mean"] > 0.6
    assert subsets["two_hop"]["mean"] < 0.1


def test_data_sets_of_a_mixed_source_are_reported_each_by_its_name(tmp_path, monkeypatch):
    """As configs/evaluation/seven_sets.yaml mixes them, from files here: 3 of one set, 2 of the other."""
    monkeypatch.chdir(tmp_path)
    for name, size in (("nq", 5), ("bamboogle", 2)):
        rows = [{"id": f"{name}_{i}", "question": f"Who is {name} {i}?", "golden_answers": ["Foo"]} for i in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = {
        name: {"class_path": "FileSource", "init_args": {"path": f"{name}.jsonl", "limit": limit}}
        for name, limit in (("nq", 3), ("bamboogle", None))
    }
    source = json.dumps({"class_path": "MixedSource", "init_args": {"sources": arguments}})
    main(
        [
            "test",
            TEST,
            "--run.folder=run",
            "--model.decodings=[greedy]",
            "--model.rollout.max_turns=0",
            f"--data.source={source}",
        ]
    )
    greedy = json.loads((tmp_path / "run" / "results.json").read_text())["decodings"]["greedy"]
    assert {name: part["questions"] for name, part in greedy["sources"].items()} == {"nq": 3, "bamboogle": 2}
    assert set(greedy["mean_of_sources"]) == {"em", "em_folded", "cover_em", "f1"}
