"""Row 14: random rows of a batch search at the same time; each call of an engine carries its own row's question and answer."""

import random
import re
from collections import Counter

import pytest

from support.modelserver import clients, completion, well_at_first
from support.stage import GREEDY, Recorder, Stage
from support.tiny import PlayerPiano
from zs_lightning.search import RetrieveSearch, SimulatorSearch, ZeroSearchWikiSearch, remote
from zs_lightning.search.http import HttpSpec
from zs_lightning.types import Document, QAExample, SearchResult

ROWS = 40
LIMITS = {"max_turns": 4, "max_new_tokens": 40, "max_observation_tokens": 40, "max_length": 800, "slots": 16}


def rows(seed):
    """Questions with an answer of their own, and turns that search or not; each query names its row and its turn."""
    rng = random.Random(seed)
    for i in rng.sample(range(1000, 10_000), ROWS):
        example = QAExample(id=str(i), question=f"Who is n{i}?", golden_answers=(f"g{i}",), source="test")
        kinds = rng.choices(["search", "nothing"], [0.8, 0.2], k=5)
        turns = [
            f"<search>n{i} t{turn}</search>" if kind == "search" else "<search> </search>" for turn, kind in enumerate(kinds)
        ]
        yield example, turns


def numbers(text, letter):
    return set(re.findall(rf"\b{letter}(\d+)\b", text))


def wrong_observations(trajectories):
    """Searches whose documents are another row's or turn's. Each document says what it was told."""
    wrong = 0
    for trajectory in trajectories:
        for turn in trajectory.searches:
            said = " ".join(document.text for document in turn.documents)
            (t,) = numbers(turn.content, "t")
            right = numbers(said, "n") == {trajectory.example.id} and numbers(said, "t") <= {t}
            wrong += not right or not numbers(said, "g") <= {trajectory.example.id}
    return wrong


class Told(Recorder):
    """An engine that writes what it was told, late and in any order."""

    def __init__(self, seed):
        super().__init__(self.write, seed)

    def write(self, request):
        example = request.example
        text = f"{request.query} {example.question} {example.golden_answers[0]}"
        return SearchResult(key=request.key, documents=(Document(text=text),))


class Writer(SimulatorSearch):
    """A simulator whose model writes what its prompt says of question, answer and query."""

    def __init__(self, tokenizer):
        limits = {"count": 1, "max_new_tokens": 60, "max_length": 400, "slots": 16}
        super().__init__(prompts="miniature", sampling=GREEDY, guard="paper", **limits)
        piano = PlayerPiano(len(tokenizer), {})
        piano.device = "cpu"
        self.attach(piano, tokenizer)

    def prompt_ids(self, request, label, count=None, blind=False):
        ids = super().prompt_ids(request, label, count, blind)
        said = " ".join(re.findall(r"\b[ngt]\d+\b", self.encoder.decode(ids)))
        ending = [self.tokenizer.eos_token_id]
        self.model.scripts[tuple(ids)] = [self.encoder.literal(f" Doc 1: {said}") + ending]
        return ids


def played(stage, engine, wanted):
    """How many searches were made and how many had another's documents, over batches until there are enough."""
    count = wrong = seed = 0
    while count < wanted:
        trajectories = stage.run(list(rows(seed)), engine, **LIMITS)
        searches = sum(len(trajectory.searches) for trajectory in trajectories)
        count, wrong, seed = count + searches, wrong + wrong_observations(trajectories), seed + 1
        assert not any(trajectory.failure for trajectory in trajectories)
    return Counter(searches=count, wrong=wrong)


@pytest.fixture(scope="module")
def stage(miniature):
    return Stage(miniature[1])


def echo(asked):
    """A model that writes what it was asked about: the last question, answer and query of the prompt."""
    return completion("Doc 1: " + " ".join(re.findall(r"\b[ngt]\d+\b", asked.body["prompt"])))


def retrieved(asked):
    return {"result": [[{"document": {"contents": f"T\n{asked.body['queries'][0]}"}, "score": 1.0}]]}


def test_every_call_of_an_engine_carries_its_own_question_and_answer(stage, serve, times, figure, monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF", 0.01)
    planned, found = times(10_000), {}
    http = HttpSpec(concurrency=7)
    adapters = [
        RetrieveSearch(serve(retrieved).url(), http=http),
        ZeroSearchWikiSearch(serve(lambda asked: [{"text": asked.body["query"]}]).url(), http=http),
    ]
    with clients(monkeypatch) as served:
        simulator = served(serve(well_at_first(echo)), guard="paper", count=1)
        for engine in (Told(0), Writer(stage.tokenizer), simulator, *adapters):
            # Most of them by the engine that takes the least time; the others have a tenth each.
            found[engine.name] = played(stage, engine, planned * (6 if isinstance(engine, Told) else 1) // 10)
            engine.close()
    total = sum(found.values(), Counter())
    held = f"{total['searches']} searches by {', '.join(found)}: {total['wrong']} with another's question, answer or documents"
    figure(14, "random sets of rows that search at the same time", held)
    assert (total["searches"] >= planned, total["wrong"]) == (True, 0), found
