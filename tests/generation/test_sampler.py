"""Draws against plain-Python references; stop tags under every spelling."""

import math
import random

import pytest
import torch

from support.tiny import make_tokenizer
from zs_lightning.errors import RunError
from zs_lightning.generation.rows import Launched
from zs_lightning.generation.sampler import Sampling, Settings, counter_uniform, sample, truncate
from zs_lightning.generation.stop import StopTags
from zs_lightning.text.protocol import STOP_TAGS

MASK = (1 << 64) - 1


def splitmix64(seed, position):
    """As published, with integers that do not overflow."""
    z = (seed + position * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def draw(logits, sampling, seeds, positions):
    n = len(seeds)
    return sample(logits, Settings.of([sampling] * n, logits.device), torch.tensor(seeds), torch.tensor(positions))


def test_published_outputs_of_splitmix64():
    # The generator seeded with 1234567 gives 6457827717110365317, 3203168211198807973, 9817491932198370423, ...
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [splitmix64(1234567, i) for i in range(1, 6)] == published
    drawn = counter_uniform(torch.full((5,), 1234567), torch.arange(1, 6))
    assert drawn.tolist() == [(value >> 11) / 2**53 for value in published]


def test_uniform_equals_big_integers():
    rng = random.Random(0)
    seeds = [0, 1, (1 << 63) - 1, *(rng.getrandbits(63) for _ in range(3000))]
    positions = [0, 1, 131071, *(rng.randrange(1 << 17) for _ in range(3000))]
    drawn = counter_uniform(torch.tensor(seeds), torch.tensor(positions)).tolist()
    assert drawn == [(splitmix64(s, p) >> 11) / 2**53 for s, p in zip(seeds, positions, strict=True)]


@pytest.mark.parametrize("axis", ["seeds", "positions"])
def test_draws_are_uniform_and_uncorrelated(axis):
    n = 200_000
    line, fixed = torch.arange(n), torch.full((n,), 17)
    drawn = counter_uniform(line, fixed) if axis == "seeds" else counter_uniform(fixed, line)
    counts = torch.histc(drawn.float(), bins=100, min=0, max=1).double()
    # Chi-square with 99 degrees of freedom: mean 99, standard deviation 14.
    assert 50 < float(((counts - n / 100) ** 2 / (n / 100)).sum()) < 170
    centred = drawn - drawn.mean()
    correlation = float((centred[1:] * centred[:-1]).mean() / centred.var())
    assert abs(correlation) < 4 / math.sqrt(n)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_frequencies_are_those_of_the_softmax(temperature):
    n = 60_000
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -3.0])
    tokens, logprobs = draw(logits.expand(n, -1), Sampling(temperature=temperature), list(range(n)), [3] * n)
    weights = [math.exp(x / temperature) for x in logits.tolist()]
    for token, weight in enumerate(weights):
        p = weight / sum(weights)
        share = float((tokens == token).double().mean())
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / n)
        if (tokens == token).any():
            assert logprobs[tokens == token].unique().tolist() == pytest.approx([math.log(p)], abs=1e-5)


def brute_force_kept(logits, top_p, top_k):
    """The tokens that may be drawn, found one by one, most likely first."""
    weights = [math.exp(x) for x in logits]
    kept, mass = set(), 0.0
    for token in sorted(range(len(logits)), key=lambda i: -logits[i]):
        if (top_k and len(kept) >= top_k) or mass >= top_p:
            break
        kept.add(token)
        mass += weights[token] / sum(weights)
    return kept


def test_truncation_equals_brute_force():
    rng = random.Random(1)
    for _ in range(400):
        logits = [rng.gauss(0, 2) for _ in range(rng.randint(1, 30))]
        top_p, top_k = rng.choice([1.0, rng.uniform(0.01, 0.99)]), rng.choice([0, 1, 5, 100])
        kept = truncate(torch.tensor([logits]), torch.tensor([top_p]), torch.tensor([top_k]))[0]
        assert set(torch.isfinite(kept).nonzero()[:, 0].tolist()) == brute_force_kept(logits, top_p, top_k)


def test_truncated_draws_stay_inside_and_keep_the_full_logprob():
    """The distribution that is trained is softmax(logits / temperature), whatever top-k and top-p cut off."""
    n = 20_000
    logits = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0])
    sampling = Sampling(temperature=2.0, top_k=3)
    tokens, logprobs = draw(logits.expand(n, -1), sampling, list(range(n)), [0] * n)
    full = [math.exp(x / 2) for x in logits.tolist()]
    kept = sum(full[i] for i in (0, 1, 2))
    assert set(tokens.tolist()) == {0, 1, 2}
    for token in (0, 1, 2):
        assert float((tokens == token).double().mean()) == pytest.approx(full[token] / kept, abs=0.015)
        assert float(logprobs[tokens == token][0]) == pytest.approx(math.log(full[token] / sum(full)), abs=1e-5)


def test_rows_of_different_kinds_do_not_disturb_each_other():
    torch.manual_seed(2)
    rng = random.Random(2)
    kinds = [Sampling(temperature=0.0), Sampling(), Sampling(top_k=2), Sampling(temperature=0.5, top_p=0.5)]
    for _ in range(30):
        n = rng.randint(1, 12)
        rows, logits = [rng.choice(kinds) for _ in range(n)], torch.randn(n, 40) * 3
        seeds, positions = [rng.getrandbits(63) for _ in rows], [rng.randrange(900) for _ in rows]
        settings = Settings.of(rows, logits.device)
        tokens, logprobs = sample(logits, settings, torch.tensor(seeds), torch.tensor(positions))
        for i, sampling in enumerate(rows):
            token, logprob = draw(logits[i : i + 1], sampling, [seeds[i]], [positions[i]])
            assert int(tokens[i]) == int(token)
            assert float(logprobs[i]) == pytest.approx(float(logprob), abs=1e-6)
            if sampling.temperature == 0:
                assert int(token) == int(logits[i].argmax())
                assert float(logprob) == pytest.approx(float(logits[i].log_softmax(-1).max()), abs=1e-5)


@pytest.mark.parametrize("wrong", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="sampling: expected"):
        Sampling(**wrong)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(bad):
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    for sampling in (Sampling(), Sampling(temperature=0.0), Sampling(temperature=0.7, top_p=0.9)):
        launched = Launched([None] * 3, *draw(logits, sampling, [1, 2, 3], [0, 0, 0]))
        with pytest.raises(RunError):
            launched.read()


def test_minus_infinity_marks_impossible_tokens_and_is_allowed():
    logits = torch.zeros(2000, 5)
    logits[:, 2] = float("-inf")
    tokens, _ = draw(logits, Sampling(), list(range(2000)), [0] * 2000)
    assert set(tokens.tolist()) == {0, 1, 3, 4}


# ---------------------------------------------------------------------------------------------- stop tags


def pieces_of(tokenizer):
    """Text of every ordinary token, by id; bytes that are no text by themselves are left out."""
    texts = {i: tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in range(len(tokenizer))}
    return {i: text for i, text in texts.items() if text and "�" not in text and i not in tokenizer.all_special_ids}


def random_spelling(rng, pieces, text, overshoot):
    """Token ids whose texts join to `text`, drawn at random; the last one may run over the end if `overshoot`."""
    ids = []
    while text:
        fitting = [i for i, piece in pieces.items() if text.startswith(piece) or (overshoot and piece.startswith(text))]
        ids.append(rng.choice(fitting))
        text = text[len(pieces[ids[-1]]) :]
    return ids


@pytest.mark.parametrize("kind", ["raw", "chat", "bos"])
def test_a_tag_is_found_however_it_is_spelt(kind, tokenizers):
    tokenizer, rng = tokenizers[kind], random.Random(3)
    pieces, stop = pieces_of(tokenizer), StopTags(tokenizer, STOP_TAGS)
    assert {"</", "search", ">\n"} <= set(pieces.values()), "the tokenizer of this test has no such pieces any more"
    spellings = set()
    for _ in range(300):
        tag, before = rng.choice(STOP_TAGS), rng.choice(["", "a <", "é > 1 </", " the author of <search"])
        ids = tokenizer.encode(before, add_special_tokens=False) + random_spelling(rng, pieces, tag, overshoot=True)
        hits = [n for n in range(1, len(ids) + 1) if stop.hit(ids[:n])]
        assert hits == [len(ids)], (tag, [pieces.get(i) for i in ids])
        spellings.add(tuple(ids))
    assert len(spellings) > 200


def test_single_token_tags_of_the_miniature(miniature):
    _, tokenizer = miniature
    stop = StopTags(tokenizer, STOP_TAGS)
    ids = tokenizer.encode("<search> author of The Red Harbor</search>")
    assert [n for n in range(1, len(ids) + 1) if stop.hit(ids[:n])] == [len(ids)]
    assert stop.hit([*ids[:3], tokenizer.eos_token_id])


@pytest.mark.parametrize("kind", ["raw", "chat", "bos"])
def test_text_without_a_tag_never_stops(kind, tokenizers):
    tokenizer, rng = tokenizers[kind], random.Random(4)
    stop, pieces = StopTags(tokenizer, STOP_TAGS), pieces_of(tokenizer)
    for text in ("</searc>", "< /search>", "</Search>", "<search>", "<think>", "information>", "</search", "a > b"):
        for _ in range(20):
            ids = random_spelling(rng, pieces, text, overshoot=False)
            assert not any(stop.hit(ids[:n]) for n in range(1, len(ids) + 1)), text


@pytest.mark.parametrize("text", ["答案。", "fin é", "🙂"])
def test_a_stop_text_whose_characters_are_several_tokens_is_found(text, tokenizers):
    tokenizer = tokenizers["raw"]
    stop, ids = StopTags(tokenizer, (text,)), tokenizer.encode(f"一 é {text}", add_special_tokens=False)
    assert tokenizer.decode(ids[-1:]) == "\ufffd"
    assert [n for n in range(1, len(ids) + 1) if stop.hit(ids[:n])] == [len(ids)]


def test_few_tokens_of_a_vocabulary_can_complete_a_tag():
    """Each of them costs the decoding of a tail whenever it is sampled."""
    tokenizer = make_tokenizer("chat")
    tokenizer.add_tokens(["=>", "a>", "r>a", "h>", "</answer>.", "</search", "x</search> y"])
    candidates = {tokenizer.decode([i]) for i in StopTags(tokenizer, STOP_TAGS).candidates}
    assert candidates == {">", ">\n", ">\n\n", "r>a", "h>", "</answer>.", "x</search> y"}


def test_only_the_end_token_stops_without_tags(tokenizers):
    stop = StopTags(tokenizers["chat"], ())
    assert stop.hit([5, tokenizers["chat"].eos_token_id])
    assert not any(stop.hit([i]) for i in range(len(tokenizers["chat"])) if i != tokenizers["chat"].eos_token_id)


def test_long_text_before_a_tag_is_not_decoded(tokenizers):
    """A tag that starts before the decoded tail still fits into it: one token is at least one byte."""
    tokenizer = tokenizers["raw"]
    stop = StopTags(tokenizer, STOP_TAGS)
    letters = {tokenizer.decode([i]): i for i in range(len(tokenizer))}
    spelt = [letters[c] for c in "<information>"]
    assert stop.hit([letters["a"]] * 500 + spelt)
    assert not stop.hit([letters["a"]] * 500 + spelt[1:])


def test_a_tag_that_the_tokenizer_cannot_spell_is_an_error():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "search": 1, "answer": 2, "<eos>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    with pytest.raises(ValueError, match="cannot spell '</search>'"):
        StopTags(tokenizer, STOP_TAGS)
