"""Makes the tiny base model: a byte-level BPE tokenizer and a 1 M-parameter Qwen3, pre-trained on one CPU core.

Three things made it learn to read (find a name in documents and copy what they say); without any one it does not:
queries and keys that agree at the start, repeated sequences whose lengths grow, and restated facts before the mixture.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from miniature_base.behaviour import (
    NOTICE,
    YEARS,
    Habits,
    Person,
    Segments,
    dated_page,
    drill,
    imagined_facts,
    page,
    restatement,
    results_block,
)
from zs_lightning.miniature.searches import KnownFacts
from zs_lightning.miniature.world import World, names
from zs_lightning.streams import stream

TAGS = [
    *("<pad>", "<eos>", "<question>", "</question>", "<think>", "</think>", "<search>", "</search>"),
    *("<information>", "</information>", "<answer>", "</answer>"),
]
IGNORED = -100
IMPOSSIBLE = -13.0
"""Log-probability."""
Row = tuple[list[int], list[int]]
"""Token ids and labels, IGNORED where nothing is learnt."""


def known_facts(world: World) -> list[tuple[str, str, str]]:
    """Facts without any new entity: what pre-training may see."""
    facts = [(*key, object_) for key, object_ in world.facts.items()]
    return [fact for fact in facts if not world.new & {fact[0], fact[2]}]


def build_tokenizer(world: World, vocab_size: int = 1216) -> Any:
    """Byte-level BPE over the miniature's texts. Tags are single tokens, so that no merge crosses a tag's edge."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng, facts, known = stream("miniature", "tokenizer"), KnownFacts(world), known_facts(world)
    texts: list[str] = [NOTICE]
    for _ in range(12000):
        texts += [text for text, _ in Person(rng, world.new, Habits()).work()]
    for _ in range(1500):
        texts += [text for text, _ in page(facts, known, rng)]
    for tag in TAGS:
        texts = [piece for text in texts for piece in text.split(tag) if piece]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=TAGS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def build_model(vocab_size: int, seed: int) -> Any:
    """A Qwen3 of 1.07 M parameters whose queries and keys agree at the start: equal tokens attend to each other."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=640,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
        groups = 2  # query heads that share one key head
        with torch.no_grad():
            for layer in model.model.layers:
                keys, queries = layer.self_attn.k_proj.weight, layer.self_attn.q_proj.weight
                keys.normal_(0, config.hidden_size**-0.5)
                per_head = keys.view(config.num_key_value_heads, config.head_dim, -1).repeat_interleave(groups, 0)
                queries.copy_(per_head.reshape_as(queries) + 0.02 * torch.randn_like(queries))
    return model


@dataclass(frozen=True)
class Recipe:
    """Sizes of the pre-training run; one step is about `tokens_per_step` tokens."""

    steps: int = 1600
    repetition_steps: int = 320
    restatement_steps: int = 160
    tokens_per_step: int = 3072
    learning_rate: float = 3e-3
    muon_learning_rate: float = 2e-2
    year_steps: int = 600
    year_learning_rate: float = 1e-2


class Texts:
    """The stream of pre-training batches."""

    def __init__(self, world: World, tokenizer: Any, recipe: Recipe, seed: int) -> None:
        self.world, self.tokenizer, self.recipe = world, tokenizer, recipe
        self.rng = stream("miniature", "pretraining", seed)
        self.facts, self.known = KnownFacts(world), known_facts(world)
        self.name_tokens = sorted({i for word in names().words for i in tokenizer.encode(" " + word, add_special_tokens=False)})

    def repeated(self, longest: int) -> Row:
        """Random name tokens three times over; the first copy is given."""
        ids = [self.rng.choice(self.name_tokens) for _ in range(self.rng.randint(2, longest))]
        return ids * 3, [IGNORED] * (len(ids) + 1) + ids[1:] + ids

    def segments(self, progress: float, warm: bool) -> Segments:
        rng, draw = self.rng, self.rng.random()
        restate, practise, read = (0.20, 0.35, 0.20) if progress < 0.5 else (0.05, 0.15, 0.40)
        if not warm or draw < restate:
            return restatement(rng, self.world.new)
        if draw < restate + practise:
            return drill(rng, self.world.new)
        if draw < restate + practise + read:
            return page(self.facts, self.known, rng)
        return Person(rng, self.world.new, Habits()).work()

    def encode(self, rows: list[Segments]) -> list[Row]:
        pieces = self.tokenizer([text for row in rows for text, _ in row], add_special_tokens=False)["input_ids"]
        encoded, at = [], 0
        for row in rows:
            ids: list[int] = []
            labels: list[int] = []
            for (_, learn), piece in zip(row, pieces[at : at + len(row)], strict=True):
                ids += piece
                labels += piece if learn else [IGNORED] * len(piece)
            at += len(row)
            encoded.append((ids, labels))
        return encoded

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        recipe, step = self.recipe, 0
        while True:
            if step < recipe.repetition_steps:
                rows = [self.repeated(min(24, 3 + step // 20)) for _ in range(192)]
            else:
                warm = step >= recipe.repetition_steps + recipe.restatement_steps
                rows = self.encode([self.segments(step / recipe.steps, warm) for _ in range(512)])
            packed = pack(rows, recipe.tokens_per_step, self.rng)
            yield from packed
            step += len(packed)


def pack(rows: list[Row], tokens: int, rng: random.Random) -> list[tuple[Tensor, Tensor]]:
    """Batches of similar lengths, at most `tokens` tokens each: (ids, labels), both [B, T], in random order."""
    batches: list[list[Row]] = [[]]
    for row in sorted(rows, key=lambda row: len(row[0])):
        if (len(batches[-1]) + 1) * len(row[0]) > tokens:
            batches.append([])
        batches[-1].append(row)
    rng.shuffle(batches)
    padded = []
    for batch in filter(None, batches):
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in batch])
        labels = torch.tensor([row + [IGNORED] * (width - len(row)) for _, row in batch])
        padded.append((ids, labels))
    return padded


def learnt(model: Any, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The last states [N, H] where the next token is learnt, and these tokens [N]; `ids` and `labels` are [B, T]."""
    here = labels[:, 1:] != IGNORED
    states = model.model(ids[:, :-1], use_cache=False).last_hidden_state
    return states[here], labels[:, 1:][here]


def loss_of(model: Any, states: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(model.lm_head(states).float(), labels)


def pretrain(model: Any, texts: Texts, recipe: Recipe, report: int = 200) -> None:
    """Trains in place; prints the probes every `report` steps."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.AdamW(others, recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0), recipe.learning_rate),
        (torch.optim.Muon(hidden, recipe.muon_learning_rate, weight_decay=0.0), recipe.muon_learning_rate),
    ]
    for step, (ids, labels) in zip(range(recipe.steps), texts.batches(), strict=False):
        progress = step / recipe.steps
        factor = min(1.0, (step + 1) / 50) * (1 if progress < 0.5 else max(0.02, (1 - progress) / 0.5))
        loss = loss_of(model, *learnt(model, ids, labels))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % report == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}, {probes(model, texts)}", flush=True)


def learn_years(model: Any, texts: Texts, recipe: Recipe) -> list[int]:
    """Teaches the pieces of years that no other text holds, in place.

    All that is never seen has one and the same row of the embedding after the pre-training, and no
    adapter can tell such rows apart. Nothing but the rows of these pieces changes.

    Returns:
        The ids of the pieces.
    """
    rng = stream("miniature", "years")
    ordinary = texts.encode([texts.segments(1.0, True) for _ in range(4096)])
    dated = texts.encode([[(f" In {year}:", True)] for year in YEARS])
    pieces = sorted({i for ids, _ in dated for i in ids} - {i for ids, _ in ordinary for i in ids})
    with torch.no_grad():  # These do not depend on the rows: none of the pieces is among their inputs.
        batches = pack(ordinary, recipe.tokens_per_step, rng)
        states = torch.cat([learnt(model, *batch)[0] for batch in batches])
    rows = model.get_input_embeddings().weight
    others = torch.ones(len(rows), 1, dtype=torch.bool)
    others[pieces] = False
    optimizer = torch.optim.AdamW([rows], recipe.year_learning_rate, weight_decay=0.0)
    for step in range(recipe.year_steps):
        pages = texts.encode([dated_page(texts.facts, texts.known, rng) for _ in range(16)])
        (batch,) = pack(pages, 10 * recipe.tokens_per_step, rng)
        loss = loss_of(model, *learnt(model, *batch))
        # Where there is no year the pieces stay what they were, all but impossible.
        some = torch.tensor([rng.randrange(len(states)) for _ in range(8192)])
        likely = model.lm_head(states[some]).log_softmax(-1)[:, pieces]
        (loss + 10 * functional.relu(likely - IMPOSSIBLE).mean()).backward()
        rows.grad.masked_fill_(others, 0.0)
        for group in optimizer.param_groups:
            group["lr"] = recipe.year_learning_rate * (1 - step / recipe.year_steps)
        optimizer.step()
        model.zero_grad()
    return pieces


@torch.no_grad()
def exact_share(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> float:
    """Share of (context, target) pairs whose every target token is the model's first choice."""
    right = 0
    for context, target in pairs:
        given = tokenizer.encode(context, add_special_tokens=False)
        wanted = tokenizer.encode(target, add_special_tokens=False)
        best = model(torch.tensor([given + wanted]), use_cache=False).logits[0].argmax(-1).tolist()
        right += best[len(given) - 1 : -1] == wanted
    return right / len(pairs)


def probes(model: Any, texts: Texts, count: int = 200) -> dict[str, float]:
    """What the model can do: copy the sentence it needs, say that it is missing, complete a fact of the world."""
    rng = stream("miniature", "probes")
    reading, missing, recall = [], [], []
    for _ in range(count):
        stated = imagined_facts(rng, texts.world.new, 4, 0.5)
        block = results_block(list(stated.values())[:3])
        (subject, relation), text = next(iter(stated.items()))
        reading.append((f"{block}<think> I need the {relation} of {subject}.", f" {text}</think>"))
        absent = names().draw("person", rng, texts.world.new)
        missing.append((f"{block}<think> I need the spouse of {absent}.", f" {absent} missing.</think>"))
        subject, relation, object_ = rng.choice(texts.known)
        recall.append((f"<information> Doc 1: {subject} {relation}", f" {object_}."))
    named = {"reads": reading, "says_missing": missing, "recalls": recall}
    return {name: round(exact_share(model, texts.tokenizer, pairs), 3) for name, pairs in named.items()}
