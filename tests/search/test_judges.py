"""Judges of what a search found: words, a language model, and how far two agree."""

import pytest

from support.tiny import make_model, make_tokenizer
from zs_lightning.search.judges import Case, ModelJudge, by_rule, kappa, read_verdict
from zs_lightning.types import Document, QAExample


def case(query, *texts, question="Who wrote The Red Harbor?", golds=("Ada Lowe",), support=(), shown=()):
    example = QAExample(id="1", question=question, golden_answers=golds, source="s", support=support)
    documents, before = (tuple(Document(text=text) for text in found) for found in (texts, shown))
    return Case(example, query, documents, before)


@pytest.mark.parametrize(
    ("searched", "useful"),
    [
        (case("author of The Red Harbor", "The Red Harbor is a novel by Ada Lowe."), True),
        (case("red harbor novel", "The Red Harbor is a novel by ADA LOWE!"), True),
        # The answer, but of something that shares a word with it; or as a part of another word.
        (case("author of The Red Harbor", "The Red Window is a novel by Ada Lowe."), False),
        (case("author of The Red Harbor", "The Red Harbor is a novel by Canada Lowell."), False),
        (case("author of The Red Harbor", "The Red Harbor is a novel."), False),
        # The query holds the answer already, or has nothing to do with the question.
        (case("Ada Lowe The Red Harbor", "The Red Harbor is a novel by Ada Lowe."), False),
        (case("capital of France", "Paris is the capital of France, says Ada Lowe."), False),
        (case("", "The Red Harbor is a novel by Ada Lowe."), False),
        # A second hop names what the first one found.
        (case("where Bo Lee lives", "Bo Lee lives in Rome.", golds=("Rome",), shown=("The Red Harbor by Bo Lee.",)), True),
        (case("where Bo Lee lives", "Bo Lee lives in Rome.", golds=("Rome",)), False),
        # Yes and no stand in any text.
        (case("Ada Lowe painter", "There is no doubt: Ada Lowe wrote.", question="Did Ada Lowe paint?", golds=("No",)), False),
        # An answer that its question offers is none that the query gives away.
        (case("was Ada Lowe born in May", "Ada Lowe: May.", question="Is Ada Lowe or Bo older?"), True),
    ],
)
def test_the_rule_wants_an_answer_about_what_the_query_names(searched, useful):
    verdict = by_rule(searched)
    assert verdict.useful == useful
    assert verdict.evidence == (searched.example.golden_answers if useful else ())


SUPPORT = ("Rim author Bo Lee.", "Rim writer Bo Lee.", "Bo Lee birthplace Oslo.", "Bo Lee hometown Oslo.")


@pytest.mark.parametrize(
    ("query", "text", "useful"),
    [
        ("author of Rim", "Rim writer Bo Lee.", True),  # The other wording of what is asked.
        ("Rim", "Rim writer Bo Lee.", True),
        ("author of Rim", "Rim printer Bo Works.", False),
        ("printer of Rim", "Rim writer Bo Lee.", False),  # Right, but not what was asked.
        ("hometown of Bo Lee", "Bo Lee birthplace Oslo.", True),
        ("hometown of Bo Lee", "Rim author Bo Lee.", False),
        ("birthplace of author of Rim", "Rim author Bo Lee.", True),
        ("birthplace of Rim", "Rim author Bo Lee.", False),
        ("hometown", "Bo Lee hometown Oslo.", False),  # Names nothing.
        ("mayor of Oslo", "Bo Lee birthplace Oslo.", False),  # The answer itself.
    ],
)
def test_with_supports_the_rule_wants_what_the_query_asks_for(query, text, useful):
    searched = case(query, text, "A B.", question="Where is the author of Rim from?", golds=("Oslo",), support=SUPPORT)
    verdict = by_rule(searched)
    assert verdict.useful == useful
    assert not useful or text in verdict.evidence


def test_a_noisy_search_has_evidence_too_where_it_asks_for_a_fact():
    searched = case("author of Rim", "A B.", question="Where is the author of Rim from?", golds=("Oslo",), support=SUPPORT)
    assert by_rule(searched).evidence == SUPPORT[:2]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (" Useful", True),
        ("NOISY.", False),
        ("The results are not useful", False),
        ("useful or noisy", None),
        ("I cannot say", None),
        ("usefulness", None),
        ("", None),
    ],
)
def test_a_verdict_is_one_of_two_words(text, verdict):
    assert read_verdict(text) is verdict


def test_kappa_by_hand():
    # 20 + 15 of 50 agree: 0.7. By chance 25/50 · 30/50 + 25/50 · 20/50 = 0.5. So 0.2 / 0.5.
    pairs = [(True, True)] * 20 + [(True, False)] * 5 + [(False, True)] * 10 + [(False, False)] * 15
    assert kappa(pairs) == pytest.approx(0.4)
    assert kappa([(True, True), (False, False)]) == 1
    assert kappa([(True, False), (False, True)]) == -1
    assert kappa([(True, True)] * 9) is None
    assert kappa([]) is None


def test_a_model_judges_each_case_by_itself_in_whatever_room_there_is():
    """A random model: what it says is nonsense, but of each case the same, whatever stands beside it."""
    judge = ModelJudge(make_model("qwen3", initializer_range=0.1), make_tokenizer("chat"), slots=2, max_length=400)
    cases = [case("harbor", "red " * n, "blue") for n in (1, 5, 3000, 2)]
    said = []
    judge.stop.hit = lambda ids: said.append(tuple(ids)) or False
    together = judge.verdicts(cases)
    alone = [judge.verdicts([one])[0] for one in cases]
    assert together == alone
    assert judge.tokens == 2 * 12 * len(cases)
    longest = [ids for ids in said if len(ids) == 12]
    assert sorted(longest[: len(cases)]) == sorted(longest[len(cases) :])
