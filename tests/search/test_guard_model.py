"""The guard's model: whom it is asked about, what it decides, and that both simulators load it once."""

import re

import numpy as np
import pytest
import torch

from support.commandline import CONFIGS, failure
from support.encoders import make_encoder
from support.modelserver import clients, completion, found
from support.oracle import TRUTH, Oracle
from zs_lightning.commands.measure_simulator.trial import Study, Trial
from zs_lightning.configuration.arguments import instantiate, search_options
from zs_lightning.data.sources import MiniatureSource
from zs_lightning.errors import UserError
from zs_lightning.search import SearchEngine, ServedSimulatorSearch, SimulatorSearch
from zs_lightning.search.dense import Encoder
from zs_lightning.search.guard import GuardModel, nameless
from zs_lightning.search.meter import unrelated_queries
from zs_lightning.search.orders import Orders
from zs_lightning.text.prompts import MINIATURE
from zs_lightning.types import QAExample, SearchRequest

QUESTION = "What is the birthplace of the author of The Red Harbor?"
WORDS = "query : What is the birthplace of author The Red Harbor ? gold ship sea king Emma tower blue old".split()
UNRELATED = ["gold ship", "sea", "birthplace of Emma", "old king of the sea", "blue tower", "ship", "tower of gold", "king"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("embedder"), WORDS)


def request(query, key="1"):
    example = QAExample(id="1", question=QUESTION, golden_answers=("Zubol",), source="test")
    return SearchRequest(key=key, query=query, example=example, turn=1, seed=0)


def requests(queries):
    return [request(query, str(number)) for number, query in enumerate(queries)]


def orders(guard):
    return Orders(MINIATURE, 3, None, False, guard, None)


def withheld(guard, queries):
    return [plan.withheld for plan in orders(guard).plans(requests(queries))]


def cosines(folder):
    """Of each unrelated query with the question, and with the question without its names, one by one."""
    encoder = Encoder(folder, "cpu")
    question, rest = encoder.encode("query", [QUESTION, "What is the birthplace of the author of The"])
    vectors = [encoder.encode("query", [query])[0] for query in UNRELATED]
    return [(float(vector @ question), float(vector @ rest)) for vector in vectors]


def test_a_question_without_its_names():
    assert nameless(QUESTION) == "What is the birthplace of the author of The"
    assert nameless("who wrote gold") == "who"
    assert nameless("红色") == ""


def test_a_query_is_related_from_the_threshold_on_if_names_bring_it_nearer(folder):
    near = cosines(folder)
    reached = [full for full, rest in near if full >= rest]
    assert 2 <= len(reached) < len(UNRELATED), "cases of both kinds"
    for threshold in (-1.0, np.median(reached) + 1e-4, max(reached) - 1e-4, max(reached) + 1e-4):
        expected = [full < max(threshold, rest) for full, rest in near]
        assert withheld(GuardModel(folder, float(threshold)), UNRELATED) == expected
    assert all(withheld("rule", UNRELATED))
    assert not any(withheld("paper", UNRELATED))


def test_what_the_rule_tells_and_what_holds_the_answer_is_not_asked_about(folder):
    queries = ["red harbor", "Zubol", "is Zubol the birthplace", "the of", ""]
    for threshold in (-1.0, 1.0):
        assert withheld(GuardModel(folder, threshold), queries) == withheld("rule", queries) == [False, True, True, True, True]
    unasked = orders(GuardModel("./nowhere"))
    assert [plan.withheld for plan in unasked.plans(requests(["red harbor", "Zubol"]))] == [False, True]
    assert unasked.encoder is None
    # Nobody is near to the question's words without its names.
    assert withheld(GuardModel(folder, -1.0), ["What is the birthplace of the author of"]) == [True]


def test_queries_are_judged_alike_alone_and_together_also_of_a_trainer_of_low_precision(folder):
    judge = orders(GuardModel(folder, -1.0))
    queries = [*UNRELATED, "red harbor", "\ud800 sea", "gold " * 40] * 20
    together = judge.plans(requests(queries))
    assert [judge.plan(request) for request in requests(queries)] == together
    expected = judge.encoder.encode("query", UNRELATED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(judge.encoder.encode("query", UNRELATED), expected)


class Counting:
    """An encoder that keeps how many texts it was given each time."""

    def __init__(self, encoder):
        self.encoder, self.given = encoder, []

    def encode(self, kind, texts):
        self.given.append(len(texts))
        return self.encoder.encode(kind, texts)


def test_a_simulator_loads_it_once_and_asks_it_once_for_all_searches(folder, miniature):
    guard = GuardModel(folder, -1.0)
    engine = SimulatorSearch(prompts="miniature", count=3, max_new_tokens=30, max_length=160, slots=8, guard=guard)
    assert engine.orders.encoder is None
    engine.attach(*miniature)
    loaded = engine.orders.encoder
    engine.attach(*miniature)
    assert engine.orders.encoder is loaded
    assert loaded.model.device == miniature[0].device
    engine.orders.encoder = Counting(loaded)
    results = found(engine, requests([*UNRELATED, "sea", "red harbor"]))
    expected = [full < rest for full, rest in cosines(folder)]
    assert [results[str(number)].withheld for number in range(len(UNRELATED))] == expected
    # Each text once, and two more: the question and what is left of it.
    assert engine.orders.encoder.given == [len(UNRELATED) + 2]
    assert engine.counted()["withheld"] == sum(expected) + expected[UNRELATED.index("sea")]


def test_a_served_simulator_asks_it_once_for_all_searches(folder, monkeypatch, serve):
    told = {}

    def answer(call):
        query = re.search("<search> (.*)</search>", call.body["prompt"])[1]
        told[query] = "Zubol" in call.body["prompt"]
        return completion(" Doc 1: a. Doc 2: b. Doc 3: c.")

    with clients(monkeypatch) as make:
        engine = make(serve(answer), prompts="miniature", count=3, guard=GuardModel(folder, -1.0))
        assert engine.orders.encoder is None
        engine.setup()
        engine.orders.encoder = Counting(engine.orders.encoder)
        expected = [full < rest for full, rest in cosines(folder)]
        for first in ("a", "b"):
            asked = [request(query, first + query) for query in UNRELATED]
            results = found(engine, asked)
            assert [results[one.key].withheld for one in asked] == expected
            assert engine.plans == {}, "what was answered is forgotten"
        assert engine.orders.encoder.given == [len(UNRELATED) + 2] * 2
    assert [told[query] for query in UNRELATED] == [not blind for blind in expected]


def test_options_of_the_command_line(folder):
    words = [f"--search.guard.model={folder}", "--search.guard.threshold=0.3"]
    for name in ("SimulatorSearch", "ServedSimulatorSearch"):
        for given in (words, [f"--search.guard={{model: {folder}, threshold: 0.3}}"]):
            engine = instantiate(SearchEngine, "search", search_options([f"--search={name}", *given], []))
            assert engine.orders.guard == GuardModel(folder, 0.3)


@pytest.mark.parametrize(
    ("guard", "says"),
    [
        (GuardModel("./nowhere"), r"^search\.guard\.model: there is no folder \./nowhere"),
        (GuardModel("miniature"), r"^search\.guard\.model: miniature is a language model that writes; expected an encoder"),
        (GuardModel("x", 1.01), r"^search\.guard\.threshold: expected -1 to 1, a cosine; got 1\.01"),
        (GuardModel("x", float("nan")), r"threshold: expected -1 to 1, a cosine; got nan"),
    ],
)
def test_what_is_no_guard_is_named(guard, says, miniature):
    for engine in (SimulatorSearch, ServedSimulatorSearch):
        with pytest.raises(UserError, match=says):
            engine(guard=guard).orders.load()


def test_a_wrong_option_is_a_sentence(capsys):
    words = ["measure-simulator", f"base={CONFIGS / 'simulator.yaml'}", "--search=SimulatorSearch"]
    said_of = {"{model: x, threshold: 2}": "threshold: expected -1 to 1", "ruel": "expected rule or paper; got ruel"}
    for given, says in said_of.items():
        code, said = failure(capsys, *words, f"--search.guard={given}")
        assert (code, said.count("\n")) == (2, 0)
        assert f"search.guard{'.' * given.startswith('{')}" in said
        assert says in said


def test_a_measurement_asks_it_too(tmp_path):
    """Of an engine that tells the answer where it may, as many unrelated queries bring it as the model lets pass."""
    records = MiniatureSource().search_records("test", 12)
    unrelated = unrelated_queries(records, 0)
    folder = make_encoder(tmp_path, sorted({word for query in unrelated for word in query.split()}))
    means = {}
    for guard in ("rule", GuardModel(folder, -1.0), GuardModel(folder, 1.0)):
        engine = Oracle(guard)
        engine.texts = lambda request, label, withheld: ["x" if withheld else request.example.golden_answers[0]]
        trial = Trial(engine, Study(records, unrelated, 0, {}, TRUTH, TRUTH.holds, None), lambda what: None)
        trial.run([])
        means[guard] = {key: interval.mean for key, interval in trial.measures.items()}
    rule, lenient, strict = means.values()
    assert rule["leak/unrelated"] == strict["leak/unrelated"] == 0.0 < lenient["leak/unrelated"] <= 1.0
    assert rule["leak/empty"] == lenient["leak/empty"] == 0.0
    assert lenient["unguarded/unrelated"] == 1.0
