"""A generator with the same calls that computes every turn of every row by itself and from scratch; rows to compare."""

import random

import pytest
import torch

from support.tiny import make_model
from zs_lightning.generation import Generator, Request, Sampling
from zs_lightning.generation.sampler import Settings, sample

GREEDY = Sampling(temperature=0.0)
MAX_LENGTH = 96
MODELS = [
    make_model(kind, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1)
    for kind in ("qwen2", "qwen3", "llama")
]


class StopAt:
    """Ends a turn at one of these ids: what StopTags does, without a tokenizer."""

    def __init__(self, *ids):
        self.ids = set(ids)

    def hit(self, sampled):
        return sampled[-1] in self.ids


NEVER = StopAt()


def random_ids(rng, low, high, vocabulary=384):
    return [rng.randrange(vocabulary) for _ in range(rng.randint(low, high))]


def request(key, ids, new=12, seed=0, sampling=GREEDY, stop=NEVER, keep=False, adapter=""):
    return Request(key=key, ids=ids, max_new_tokens=new, seed=seed, sampling=sampling, stop=stop, keep=keep, adapter=adapter)


@torch.no_grad()
def slow_turn(model, context, turn):
    """One turn without any memory: the whole context through the whole model for every token."""
    ids, tokens, logprobs = list(context), [], []
    while len(tokens) < turn.max_new_tokens:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1]
        settings = Settings.of([turn.sampling], logits.device)
        token, logprob = sample(logits, settings, torch.tensor([turn.seed]), torch.tensor([len(ids)]))
        ids.append(int(token))
        tokens.append(int(token))
        logprobs.append(float(logprob))
        if turn.stop.hit(tokens):
            break
    return tokens, logprobs


class SlowGenerator:
    """Keeps the contexts of rows; a turn is computed again from the context alone."""

    def __init__(self, model):
        self.model, self.contexts = model, {}

    def turn(self, turn):
        """Tokens, log-probabilities and whether the turn was stopped, one whole forward for each token."""
        context = self.contexts.get(turn.key, []) + turn.ids
        tokens, logprobs = slow_turn(self.model, context, turn)
        self._end(turn, context + tokens)
        return tokens, logprobs, turn.stop.hit(tokens)

    @torch.no_grad()
    def check(self, turn, generated):
        """Raises AssertionError unless each token is what follows from the context and the tokens before it.

        By induction the turn is then what `turn` gives, but one forward is enough for all its tokens.
        """
        context, tokens = self.contexts.get(turn.key, []) + turn.ids, generated.token_ids
        length = len(tokens)
        logits = self.model(input_ids=torch.tensor([context + tokens]), use_cache=False).logits[0, len(context) - 1 : -1]
        settings, seeds = Settings.of([turn.sampling] * length, logits.device), torch.full((length,), turn.seed)
        expected, logprobs = sample(logits, settings, seeds, torch.arange(len(context), len(context) + length))
        assert tokens == expected.tolist()
        torch.testing.assert_close(torch.tensor(generated.logprobs), logprobs, atol=1e-4, rtol=0)
        ends = [turn.stop.hit(tokens[:n]) for n in range(1, length + 1)]
        assert not any(ends[:-1])
        assert generated.stopped == ends[-1]
        assert ends[-1] or length == turn.max_new_tokens
        self._end(turn, context + tokens)

    def _end(self, turn, context):
        self.contexts[turn.key] = context
        if not turn.keep:
            del self.contexts[turn.key]


def write(model, slots=5, adapters=None, names=("",)):
    """What 16 rows of all kinds write, four of them in two turns, and the generator.

    By key and turn: tokens, log-probabilities, and whether it was stopped.
    """
    rng, written = random.Random(7), {}
    kinds = [GREEDY, Sampling(), Sampling(temperature=0.6, top_k=20), Sampling(top_p=0.8)]
    generator = Generator(model, slots, MAX_LENGTH, adapters)
    for turn in range(2):
        for i in range(16 if turn == 0 else 4):
            ids, new, stop = random_ids(rng, 1, 30), rng.randint(1, 18), StopAt(*range(0, 384, 9))
            keep, adapter = i < 4 and turn == 0, names[i % len(names)]
            generator.submit(request(str(i), ids, new, 100 + i, kinds[i % 4], stop, keep, adapter))
        for generated in generator.run():
            written[generated.key, turn] = (generated.token_ids, generated.logprobs, generated.stopped)
    assert generator.slots == [None] * len(generator.slots)
    assert not generator.busy
    assert not generator.rows
    assert len(written) == 20
    return written, generator


def same(one, other):
    """Raises AssertionError unless both are the same but for the rounding of log-probabilities."""
    assert set(one) == set(other)
    for key, (tokens, logprobs, stopped) in one.items():
        assert (tokens, stopped) == (other[key][0], other[key][2])
        assert logprobs == pytest.approx(other[key][1], abs=1e-4)
