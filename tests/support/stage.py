"""Rollouts of a piano that plays written turns."""

import math
import random
from dataclasses import replace

import pytest

from support.tiny import PlayerPiano, piano_logit
from zs_lightning.generation import Generator, Sampling, StopTags
from zs_lightning.models.encoding import TextEncoder
from zs_lightning.rollout import Rollouter, RolloutSpec
from zs_lightning.search import SearchEngine
from zs_lightning.text.prompts import ZEROSEARCH
from zs_lightning.text.protocol import STOP_TAGS, disarm
from zs_lightning.types import Document, QAExample, SearchResult

PROMPTS = replace(ZEROSEARCH, policy="Question: {question}\n", closed_book="Closed: {question}\n", chat=False)
GREEDY = Sampling(temperature=0.0)


def example(i, question=None):
    return QAExample(id=str(i), question=question or f"Who is number {i}?", golden_answers=(f"gold {i}",), source="test")


class Recorder(SearchEngine):
    """Remembers what it was asked; answers late, in portions and out of order."""

    name = "recorder"

    def __init__(self, answer=None, seed=0):
        self.requests, self.pending, self.rng = [], [], random.Random(seed)
        self.answer = answer or (lambda r: SearchResult(key=r.key, documents=(Document(text=f"{r.query} is found"),)))

    def submit(self, requests):
        self.requests += requests
        self.pending += requests

    def poll(self):
        self.rng.shuffle(self.pending)
        portion = [self.pending.pop() for _ in range(self.rng.choice([1, 5, 500, 500, 500])) if self.pending]
        return [self.answer(request) for request in portion]


class Stage:
    """One tokenizer and a way to run scripts: lists of turns, each a text or token ids, by example."""

    def __init__(self, tokenizer, prompts=PROMPTS):
        self.tokenizer, self.prompts, self.encoder = tokenizer, prompts, TextEncoder(tokenizer)
        self.stop = StopTags(tokenizer, STOP_TAGS)

    def ids(self, turn):
        return self.encoder.literal(turn) if isinstance(turn, str) else turn

    def rollout(self, scripts, search, **limits):
        spec = RolloutSpec(**{"max_turns": 3, "max_new_tokens": 60, "max_length": 700, "slots": 8, **limits})
        template = self.prompts.policy if spec.max_turns else self.prompts.closed_book
        songs = {}
        for e, turns in scripts:
            fields = {"question": disarm(e.question)}
            songs[tuple(self.encoder.prompt(template, fields, self.prompts.chat))] = [self.ids(t) for t in turns]
        engine = Generator(PlayerPiano(len(self.tokenizer), songs), spec.slots, spec.max_length)
        return Rollouter(engine, self.encoder, search, self.prompts, spec, self.stop)

    def run(self, scripts, search=None, **limits):
        return self.rollout(scripts, search or Recorder(), **limits).run([e for e, _ in scripts], 1, 0, GREEDY)

    def play(self, *turns, search=None, **limits):
        return self.run([(example(1), turns)], search, **limits)[0]


def parts_of(trajectory):
    """(sampled?, ids) of each piece, from the turns' spans alone."""
    parts = []
    for turn in trajectory.turns:
        parts.append((True, trajectory.token_ids[slice(*turn.span)]))
        if turn.observation_span:
            parts.append((False, trajectory.token_ids[slice(*turn.observation_span)]))
    return parts


def check_bookkeeping(trajectory, vocabulary):
    """Spans cover the tokens in order; masks and log-probabilities are those of each token."""
    parts = parts_of(trajectory)
    assert [i for _, ids in parts for i in ids] == trajectory.token_ids
    assert [sampled for sampled, ids in parts for _ in ids] == trajectory.loss_mask
    expected = []
    for sampled, ids in parts:
        for offset in range(len(ids)):
            logit = piano_logit(offset)
            expected.append(logit - math.log(math.exp(logit) + vocabulary - 1) if sampled else 0.0)
    assert trajectory.old_logprobs == pytest.approx(expected, abs=1e-4)


OBSERVATION = "\n\n<information>Doc 1: red harbor is found\n</information>\n\n"
