"""The fictional world, what may be known of it, and the shipped base model."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest
import torch
from torch.nn import functional

from miniature_base.behaviour import Habits, Person, dated_page, drill, page, restatement
from miniature_base.pretraining import TAGS, Recipe, Texts, known_facts, learnt, pack, probes
from zs_lightning.generation import Generator, Sampling, StopTags
from zs_lightning.miniature.searches import KnownFacts, Query, good_query, poor_query, result_sentences, search_records
from zs_lightning.miniature.world import CHAINS, RELATIONS, SIZES, make_world, names, sentences
from zs_lightning.models.encoding import TextEncoder
from zs_lightning.models.specs import SHIPPED
from zs_lightning.rollout import Rollouter, RolloutSpec
from zs_lightning.runs.outcomes import Outcome
from zs_lightning.search import BM25Search
from zs_lightning.text.prompts import MINIATURE
from zs_lightning.text.protocol import STOP_TAGS

WORLDS = pytest.mark.parametrize("seed", [0, 1, 2])
WORLD = make_world(0)


def digest(seed):
    world = make_world.__wrapped__(seed)
    text = json.dumps([sorted(f"{s}|{r}|{o}" for (s, r), o in world.facts.items()), sorted(world.new), world.corpus()])
    texts = [[question.text for question in questions] for questions in world.questions().values()]
    return hashlib.sha256((text + json.dumps(texts)).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------- world


def test_world_zero_is_the_one_that_the_base_model_knows():
    assert digest(0) == "3001a8b3cd16ec94"


def test_a_world_is_a_function_of_its_seed():
    assert vars(make_world.__wrapped__(5)) == vars(make_world.__wrapped__(5))
    assert len({digest(seed) for seed in range(4)}) == 4
    program = "from test_miniature import digest; print(digest(3))"
    root = Path(__file__).parents[2]
    paths = [root, root / "scripts", root / "tests" / "miniature"]
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == digest(3)


@WORLDS
def test_every_entity_has_its_facts_and_they_are_of_the_right_kind(seed):
    world = make_world(seed)
    assert {kind: len(members) for kind, members in world.entities.items()} == SIZES
    assert len(world.kind) == sum(SIZES.values())
    expected = {(s, r) for s, kind in world.kind.items() for r, (subject, _) in RELATIONS.items() if subject == kind}
    assert set(world.facts) == expected
    for (subject, relation), object_ in world.facts.items():
        assert world.kind[object_] == RELATIONS[relation][1]
        assert object_ != subject


@WORLDS
def test_no_known_entity_points_to_a_new_one(seed):
    world = make_world(seed)
    assert {world.kind[name] for name in world.new} == {"person", "book", "company"}
    assert 0.1 < len(world.new) / (150 + 100 + 60) < 0.2
    assert not [key for key, object_ in world.facts.items() if object_ in world.new and key[0] not in world.new]


@WORLDS
def test_the_corpus_states_every_fact_and_nothing_else(seed):
    world = make_world(seed)
    corpus, allowed = set(world.corpus()), {t for (s, r), o in world.facts.items() for t in sentences(s, r, o)}
    assert corpus <= allowed
    stated = [[text in corpus for text in sentences(s, r, o)] for (s, r), o in world.facts.items()]
    assert all(any(pair) for pair in stated)
    assert 0.2 < sum(all(pair) for pair in stated) / len(stated) < 0.4
    first = sum(pair[0] and not pair[1] for pair in stated)
    assert 0.35 < first / sum(pair[0] != pair[1] for pair in stated) < 0.65


# ---------------------------------------------------------------------------------------------------------- questions


@WORLDS
def test_answers_are_reached_by_the_questions_words(seed):
    """Read backwards from the text alone: "the A of the B of X" is A of (B of X)."""
    world, hops = make_world(seed), Counter()
    for split, questions in world.questions().items():
        for question in questions:
            example = question.example(seed)
            phrase = re.sub(r"^(What is|Name|Tell me) ", "", example.question).removesuffix("?")
            *relations, at = re.split(r"(?<=\w) of ", re.sub(r"\bthe (?=\w+ of )", "", phrase))
            support = set(example.support)
            for relation in reversed(relations):
                stated = set(sentences(at, relation, world.facts[at, relation]))
                assert stated <= support
                at, support = world.facts[at, relation], support - stated
            assert example.golden_answers == (at,)
            assert not support
            assert at != question.subject
            hops[split, len(relations)] += 1
            assert (
                example.subset
                == f"{'new' if question.subject in world.new else 'known'}/{('one', 'two')[len(relations) - 1]}_hop"
            )
    assert min(hops.values()) > 20
    assert len(hops) == 6


@WORLDS
def test_splits_are_disjoint_and_only_the_test_split_asks_about_new_entities(seed):
    splits = make_world(seed).questions()
    for key in (lambda q: q.text.split(" ", 2)[-1], lambda q: (q.subject, q.relations), lambda q: q.example(0).id):
        seen = Counter(key(question) for questions in splits.values() for question in questions)
        assert max(seen.values()) == 1
    assert set(splits) == {"train", "validation", "test"}
    assert not any(question.new for split in ("train", "validation") for question in splits[split])
    assert sum(question.new for question in splits["test"]) > 200
    assert {question.relations for question in splits["train"]} == {(relation,) for relation in RELATIONS} | set(CHAINS)


def texts_of(record):
    example = record.example
    return [record.query, *record.evidence, *(d.text for d in record.documents), example.question, *example.golden_answers]


def seen_in_training(kind, rng):
    """A few thousand texts of one kind that a model learns from."""
    facts, known, splits = KnownFacts(WORLD), known_facts(WORLD), WORLD.questions()
    if kind == "questions":
        examples = [q.example(0) for split in ("train", "validation") for q in splits[split]]
        return [text for e in examples for text in (e.question, *e.golden_answers, *e.support)]
    if kind == "records":
        return [text for r in search_records(WORLD, splits["train"], 3000, 0.5, rng) for text in texts_of(r)]
    make = {
        "pages": lambda: page(facts, known, rng),
        "dated pages": lambda: dated_page(facts, known, rng),
        "people": lambda: Person(rng, WORLD.new, Habits()).work(),
        "drills": lambda: drill(rng, WORLD.new),
        "restatements": lambda: restatement(rng, WORLD.new),
    }[kind]
    return ["".join(text for text, _ in make()) for _ in range(3000)]


@pytest.mark.parametrize("kind", ["questions", "records", "pages", "dated pages", "people", "drills", "restatements"])
def test_no_new_entity_is_named_in_anything_that_is_learnt(kind):
    whole = "\n".join(seen_in_training(kind, random.Random(0)))
    assert len(whole) > 100_000
    assert [name for name in WORLD.new if name in whole] == []
    assert sum(name in whole for name in WORLD.entities["person"]) > (
        0 if kind in ("people", "drills", "restatements") else 100
    )


def test_only_pages_state_the_worlds_facts():
    """People and drills are about imagined facts: whoever answers from memory there learns to guess."""
    stated = {text for s, r, o in known_facts(WORLD) for text in sentences(s, r, o)}
    found = {}
    for kind in ("pages", "people", "drills", "restatements"):
        texts = [
            t for row in seen_in_training(kind, random.Random(1)) for t in re.split(r"(?<=\.) |<[^>]*>|Doc \d: ", row) if t
        ]
        found[kind] = sum(text in stated for text in texts) / sum(text.endswith(".") for text in texts)
    assert found["pages"] > 0.9
    assert max(found[kind] for kind in ("people", "drills", "restatements")) < 0.01


# ---------------------------------------------------------------------------------------------------------- records


@WORLDS
def test_useful_records_hold_the_evidence_and_noisy_ones_never_do(seed):
    world = make_world(seed)
    records = search_records(world, world.questions()["train"], 3000, 0.6, random.Random(0))
    asked = [r for r in records if r.evidence]
    for r in asked:
        held = sum(document.text in r.evidence for document in r.documents)
        assert held == (0 if r.label == "noisy" else 1), r
    facts = {text for (s, rel), o in world.facts.items() for text in sentences(s, rel, o)}
    assert all(document.text in facts for r in records for document in r.documents)
    assert {len(r.documents) for r in records} == {3}
    assert 0.45 < sum(r.label == "noisy" for r in asked) / len(asked) < 0.55
    assert 0.05 < sum(not r.evidence for r in records) / len(records) < 0.3


def test_good_records_ask_for_a_hop_of_their_question():
    for r in search_records(WORLD, WORLD.questions()["train"], 1000, 1.0, random.Random(1)):
        assert set(r.evidence) <= set(r.example.support)
        assert len(r.evidence) == 2


def test_poor_queries_seldom_ask_for_the_fact():
    rng, facts = random.Random(2), KnownFacts(WORLD)
    subject = WORLD.entities["book"][0]
    queries = [poor_query(facts, subject, "author", "mayor of author of X", rng) for _ in range(1000)]
    assert sum((q.subject, q.relation) == (subject, "author") for q in queries) < 250
    assert {(q.subject is None, q.relation is None) for q in queries} == {(False, False), (True, False), (False, True)}


def test_a_query_without_a_fact_gets_documents_too():
    rng, facts = random.Random(3), KnownFacts(WORLD)
    country, book = WORLD.entities["country"][0], WORLD.entities["book"][0]
    for query in (Query("author", None, "author"), Query(country, country, None), good_query(book, "author", rng)):
        for useful in (True, False):
            texts = result_sentences(facts, query, useful, rng)
            assert len(set(texts)) == 3


def test_records_are_a_function_of_the_generator():
    train = WORLD.questions()["train"]
    one, other, third = (search_records(WORLD, train, 50, 0.75, random.Random(seed)) for seed in (0, 0, 1))
    assert one == other != third


# ---------------------------------------------------------------------------------------------------------- base model


def trajectories(count, seed=0):
    rng = random.Random(seed)
    return [Person(rng, WORLD.new, Habits()).work() for _ in range(count)]


def test_the_shipped_folder_is_small_and_holds_what_loads():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 5_000_000
    stated = json.loads((SHIPPED / "base.json").read_text())
    assert stated["recipe"] == vars(Recipe())


def test_the_model_has_the_stated_size_and_finite_weights(miniature):
    model, tokenizer = miniature
    assert sum(p.numel() for p in model.parameters()) == json.loads((SHIPPED / "base.json").read_text())["parameters"]
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_tags_are_single_tokens_and_no_merge_crosses_them(miniature):
    _, tokenizer = miniature
    encode = TextEncoder(tokenizer).literal
    assert [encode(tag) for tag in TAGS] == [[i] for i in range(len(TAGS))]
    for segments in trajectories(200):
        whole = "".join(text for text, _ in segments)
        pieces = [piece for piece in re.split("(" + "|".join(map(re.escape, TAGS)) + ")", whole) if piece]
        assert encode(whole) == [i for piece in pieces for i in encode(piece)]


def test_text_and_ids_round_trip(miniature):
    _, tokenizer = miniature
    encoder = TextEncoder(tokenizer)
    for segments in trajectories(200, seed=1):
        ids = [i for text, _ in segments for i in encoder.literal(text)]
        assert encoder.decode(ids) == "".join(text for text, _ in segments)
        assert encoder.literal(encoder.decode(ids)) == ids
    strange = "naïve 東京 \U0001f600 \t\n <seárch> \x00"
    assert encoder.decode(encoder.untrusted(strange)) == strange


def test_names_are_few_tokens_and_known_words_are_one(miniature):
    _, tokenizer = miniature
    lengths = [len(tokenizer.encode(" " + word, add_special_tokens=False)) for word in names().words]
    assert max(lengths) <= 4
    assert sum(lengths) / len(lengths) < 1.6


def test_the_base_model_can_read_say_missing_and_recall(miniature):
    model, tokenizer = miniature
    can = probes(model, Texts(WORLD, tokenizer, Recipe(), 0), count=100)
    assert set(can) == {"reads", "says_missing", "recalls"}
    assert min(can.values()) >= 0.95, can


def test_the_base_model_writes_years_where_they_belong_and_nowhere_else(miniature):
    model, tokenizer = miniature
    texts, rng = Texts(WORLD, tokenizer, Recipe(), 0), random.Random(0)
    dated = texts.encode([dated_page(texts.facts, texts.known, rng) for _ in range(40)])
    ordinary = texts.encode([texts.segments(1.0, True) for _ in range(200)])
    pieces = sorted({i for ids, _ in dated for i in ids} - {i for ids, _ in ordinary for i in ids})
    assert len(pieces) >= 6
    states = torch.cat([learnt(model, *batch)[0] for batch in pack(ordinary, 3072, rng)])
    assert model.lm_head(states).softmax(-1)[:, pieces].sum(-1).mean() < 2e-5
    losses = []
    for ids, _ in dated:
        tokens = torch.tensor(ids)
        loss = functional.cross_entropy(model(tokens[None, :-1]).logits[0], tokens[1:], reduction="none")
        losses += [x for x, i in zip(loss.tolist(), ids[1:], strict=True) if i in pieces]
    # Rows that nothing was learnt of are all alike: one of some six hundred.
    assert mean(losses) < 2


@pytest.mark.parametrize("max_turns", [0, 4])
def test_the_base_model_is_far_from_knowing_the_task(miniature, max_turns):
    """Sampled, with the real search engine and without; the same questions for both."""
    model, tokenizer = miniature
    spec = RolloutSpec(max_turns=max_turns, max_new_tokens=48, max_observation_tokens=96, max_length=640, slots=40)
    search = BM25Search(world_seed=0)
    search.setup()
    engine, stop = Generator(model, 40, 640), StopTags(tokenizer, STOP_TAGS)
    questions = [question.example(0) for question in WORLD.questions()["test"][:120]]
    rollout = Rollouter(engine, TextEncoder(tokenizer), search, MINIATURE, spec, stop)
    rows = [Outcome.of(t) for t in rollout.run(questions, 1, seed=0, sampling=Sampling(temperature=1.0))]
    right = sum(row.em for row in rows) / len(rows)
    searches = sum(row.searches for row in rows) / len(rows)
    if max_turns == 0:
        assert right < 0.1
    else:
        assert 0.05 < right < 0.4
        assert 0.4 < searches < 1.6
