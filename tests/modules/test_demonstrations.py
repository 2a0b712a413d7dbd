"""Demonstrations by rule and from files, as text."""

import json
from collections import Counter

import pytest

from support.stage import example
from zs_lightning.errors import UserError
from zs_lightning.modules.demonstrations import FileDemonstrations, RuleDemonstrations, queries_of
from zs_lightning.rollout import RolloutSpec
from zs_lightning.search import BM25Search, SearchEngine, SimulatorSearch
from zs_lightning.text.protocol import parse_action
from zs_lightning.types import ActionKind, Document, QAExample, SearchResult

SPEC = RolloutSpec(max_turns=3)


def asked(question, *golds):
    return QAExample(id=question, question=question, golden_answers=golds, source="test")


class Shelf(SearchEngine):
    """Finds by the whole query."""

    name = "shelf"

    def __init__(self, found):
        self.found, self.queries, self.pending = found, [], []

    def submit(self, requests):
        self.queries += [request.query for request in requests]
        self.pending += requests

    def poll(self):
        pending, self.pending = self.pending, []
        return [
            SearchResult(key=r.key, documents=tuple(Document(text=t) for t in self.found.get(r.query, [])))
            if r.query != "broken"
            else SearchResult(key=r.key, failure="down")
            for r in pending
        ]


@pytest.mark.parametrize(
    ("question", "words", "names"),
    [
        ("Who wrote The Red Harbor?", "wrote Red Harbor", "Red Harbor"),
        ('In which year was "apE" developed', "year apE developed", "apE"),
        ("Who made C++?", "made C++", "C++"),
        ("what is a compiler?", "compiler", "compiler"),
        ("Who <b> is?", "‹b›", "‹b›"),
        ("Who is it?", "Who is it?", "Who is it?"),
    ],
)
def test_queries_are_the_words_of_content_and_the_names(question, words, names):
    assert queries_of(question) == (question, words, names)


def test_a_rule_searches_and_answers_with_what_it_found():
    engine = Shelf({"wrote Red Harbor": ["Nothing.", "The Red Harbor, by Foo Bar."]})
    made, reasons = RuleDemonstrations(engine).of([asked("Who wrote The Red Harbor?", "Baz", "Foo Bar")], SPEC)
    assert reasons == {}
    (only,) = made
    actions = [parse_action(turn) for turn in only.turns]
    assert [(a.kind, a.content) for a in actions] == [
        (ActionKind.SEARCH, "wrote Red Harbor"),
        (ActionKind.ANSWER, "Foo Bar"),
    ]
    assert all(turn.startswith("<think> ") and "{" not in turn for turn in only.turns)
    assert [document.text for document in only.found[0]] == ["Nothing.", "The Red Harbor, by Foo Bar."]
    assert only.evidence == "Foo Bar"


def test_a_first_search_in_vain_is_followed_by_the_names_alone():
    engine = Shelf({"Red Harbor": ["By Foo Bar."]})
    (made,), _ = RuleDemonstrations(engine).of([asked("Who wrote The Red Harbor?", "Foo Bar")], SPEC)
    contents = [parse_action(turn).content for turn in made.turns]
    assert contents == ["wrote Red Harbor", "Red Harbor", "Foo Bar"]
    assert [len(found) for found in made.found] == [0, 1]
    assert RuleDemonstrations(engine).of([made.example], RolloutSpec(max_turns=1))[0] == []


def test_the_environments_own_search_comes_first():
    engine = Shelf({"Who wrote The Red Harbor?": ["By Foo Bar."], "wrote Blue Harbor": ["By Baz."]})
    questions = [asked("Who wrote The Red Harbor?", "Foo Bar"), asked("Who wrote Blue Harbor?", "Baz")]
    made, _ = RuleDemonstrations(engine).of(questions, RolloutSpec(max_turns=1, retrieve_first=True))
    assert [[parse_action(turn).content for turn in each.turns] for each in made] == [["Foo Bar"], ["wrote Blue Harbor", "Baz"]]
    assert [[len(found) for found in each.found] for each in made] == [[1], [0, 1]]


def test_what_a_rule_cannot_show_is_counted_by_reason():
    engine = Shelf({"Foo": ["Foo is blue. yes"], "older Foo Bar": ["Foo is older."]})
    questions = [asked("Is Foo blue?", "yes"), asked("Who is older, Foo or Bar?", "Foo"), asked("Who is Foo?", "Baz")]
    made, reasons = RuleDemonstrations(engine).of([*questions, asked("broken", "x")], SPEC)
    assert made == []
    assert reasons == {
        "of the questions are answered by yes or no": 1,
        "of the questions hold their answer": 1,
        "of the questions have no golden answer in what is found": 2,
    }
    # Where names and words of content are the same, nothing is searched twice.
    assert Counter(engine.queries) == {"Foo": 1, "broken": 1}


def test_a_simulator_is_no_engine_to_learn_the_form_from():
    with pytest.raises(UserError, match=r"^model\.demonstrations\.search: expected a real engine.*got the simulator"):
        RuleDemonstrations(SimulatorSearch())
    assert RuleDemonstrations(BM25Search())


ROLLED = {
    "question": "who is number 1",
    "turns": [
        {"text": "<search> a </search>", "documents": [{"text": "t", "title": "u"}, "v"]},
        {"text": "<answer> gold 1 </answer>", "documents": []},
    ],
}


def lines(tmp_path, *rows):
    path = tmp_path / "rolled.jsonl"
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return FileDemonstrations(str(path))


def test_a_file_gives_the_turns_of_the_questions_that_are_asked(tmp_path):
    """Once, whatever else a line says."""
    first = {"question": "Who is number 2?", "turns": [{"text": "", "documents": ["x"]}, {"text": "<answer> b </answer>"}]}
    source = lines(tmp_path, ROLLED, {**ROLLED, "id": 7}, first, {**ROLLED, "question": "Another?"})
    source.setup()
    made, reasons = source.of([example(i) for i in range(1, 4)], SPEC)
    (only,) = made
    assert only.example == example(1), "the questions, with their golden answers, are the run's"
    assert only.turns == ("<search> a </search>", "<answer> gold 1 </answer>")
    assert only.found == ((Document(text="t", title="u"), Document(text="v")), ())
    assert reasons == {"were made with another rollout.retrieve_first": 1, "of the questions are not in the file": 1}
    ((second,), _) = source.of([example(2)], RolloutSpec(retrieve_first=True))
    assert (second.turns, second.found) == (("<answer> b </answer>",), ((Document(text="x"),), ()))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "JSONDecodeError"),
        ("[]\n", "TypeError"),
        ({"question": "x"}, "KeyError: 'turns'"),
        ({"question": "x", "turns": [{"text": 3}]}, "TypeError: 3 is no text"),
        ({"question": 1, "turns": []}, "TypeError: 1 is no text"),
        ({"question": "x", "turns": [{"text": "", "documents": [{"title": "y"}]}]}, "KeyError: 'text'"),
    ],
)
def test_a_line_that_is_no_trajectory_is_named(line, said, tmp_path):
    with pytest.raises(UserError, match=rf"^model\.demonstrations\.path: line 2 of \S+ is no trajectory \({said}") as error:
        lines(tmp_path, ROLLED, line).of([example(1)], SPEC)
    assert 'expected {"question"' in str(error.value)


def test_a_file_that_is_missing_is_said_before_weights_are_loaded(tmp_path):
    with pytest.raises(UserError, match=r"^model\.demonstrations\.path: there is no file nowhere\.jsonl; a `fit` or `test`"):
        FileDemonstrations("nowhere.jsonl").setup()
