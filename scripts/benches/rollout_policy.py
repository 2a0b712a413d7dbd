"""Multi-turn generation of one model: our generator, per-turn `generate` as the reference does, `generate` with kept K/V."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from benches import hf
from benches.harness import Row, compare, same_tokens
from benches.work import Planned, longest, make_model, make_tokenizer, plan, request
from zs_lightning.generation import Generator, StopTags
from zs_lightning.models.encoding import TextEncoder
from zs_lightning.text.protocol import STOP_TAGS

REQUIRED = {16: 1.8, 64: 2.5, 256: 3.3}
"""Rollouts at the same time, and how often faster than the reference's way we must be."""


def ours(model: Any, encoder: TextEncoder, stop: StopTags, work: list[Planned], texts: list[list[str]]) -> list[list[int]]:
    """K/V stay; a row goes on as soon as it has its document. Only the turn is decoded, only the document encoded."""
    generator = Generator(model, len(work), longest(work))
    turns: list[list[list[int]]] = [[] for _ in work]
    for i, row in enumerate(work):
        generator.submit(request(str(i), row.prompt, row.sampled[0], stop, keep=True))
    while generator.busy:
        for generated in generator.step():
            i = int(generated.key)
            turns[i].append(generated.token_ids)
            turn = len(turns[i])
            encoder.decode(generated.token_ids)
            if turn < len(work[i].sampled):
                encoder.untrusted(texts[i][turn - 1])
                document, new = work[i].documents[turn - 1], work[i].sampled[turn]
                generator.submit(request(generated.key, document, new, stop, keep=True))
            else:
                generator.release(generated.key)
    return [ids for row in turns for ids in row]


def per_turn(model: Any, tokenizer: Any, work: list[Planned]) -> list[list[int]]:
    """The whole context goes through the tokenizer (for its cost only) and through the model again in every turn."""
    contexts, turns = [list(row.prompt) for row in work], [[] for _ in work]
    for turn in range(len(work[0].sampled)):
        tokenizer(tokenizer.batch_decode(contexts))
        ids, mask = hf.left_pad(contexts)
        new = [row.sampled[turn] for row in work]
        generated = hf.cut(hf.generate(model, ids, mask, new), ids.shape[1], new)
        for row, context, written, done in zip(work, contexts, generated, turns, strict=True):
            done.append(written)
            context += written + (row.documents[turn] if turn < len(row.documents) else [])
    return [ids for row in turns for ids in row]


def kept(model: Any, work: list[Planned]) -> list[list[int]]:
    """One cache for all turns; what padding and finished rows left in it is masked."""
    ids, mask = hf.left_pad([row.prompt for row in work])
    memory, turns = DynamicCache(config=model.config), [[] for _ in work]
    for turn in range(len(work[0].sampled)):
        new, start = [row.sampled[turn] for row in work], ids.shape[1]
        output = hf.generate(model, ids, mask, new, past_key_values=memory)
        for done, written in zip(turns, hf.cut(output, start, new), strict=True):
            done.append(written)
        if turn < len(work[0].documents):
            written_mask = (torch.arange(output.shape[1] - start) < torch.tensor(new)[:, None]).long()
            more, more_mask = hf.left_pad([row.documents[turn] for row in work])
            ids, mask = torch.cat([output, more], 1), torch.cat([mask, written_mask, more_mask], 1)
    return [ids for row in turns for ids in row]


def run() -> Iterator[Row]:
    tokenizer = make_tokenizer()
    encoder, stop = TextEncoder(tokenizer), StopTags(tokenizer, STOP_TAGS)
    our_model, peer_model = make_model("tiny", ours=True), make_model("tiny", ours=False)
    for rows, required in REQUIRED.items():
        work = plan(rows)
        texts = [tokenizer.batch_decode(row.documents) for row in work]
        small = plan(2, turns=2, prompt=8, sampled=3, document=4)
        ours(our_model, encoder, stop, small, [["ka"], ["lo"]])
        per_turn(peer_model, tokenizer, small)
        kept(peer_model, small)
        sides = {
            "ours": partial(ours, our_model, encoder, stop, work, texts),
            "per turn": partial(per_turn, peer_model, tokenizer, work),
            "kept K/V": partial(kept, peer_model, work),
        }
        seconds, equal = compare(sides, same_tokens)
        for peer, bar in (("per turn", required), ("kept K/V", 1.0)):
            yield Row(
                case=f"{rows} rollouts",
                peer=f"transformers generate, {peer}",
                ours=seconds["ours"],
                theirs=seconds[peer],
                required=bar,
                equal=equal[peer],
            )
