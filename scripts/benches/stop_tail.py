"""A turn that ends at its tag, against one that runs to the limit and is cut afterwards, as the reference does."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from benches.harness import Row, compare, same_tokens
from benches.work import generate, make_model, make_tokenizer, plan
from zs_lightning.generation import StopTags

ROWS = 64
LIMIT = 80
REQUIRED = 1.9
REPEATS = 15
"""Timed rounds: one takes a second or two, so more of them than elsewhere."""


def unique_end(tokenizer: Any, ids: list[int]) -> str:
    """The shortest text of whole tokens at the end of `ids` that is nowhere before: it plays the tag of this row."""
    for count in range(2, len(ids) + 1):
        text = tokenizer.decode(ids[-count:])
        if text not in tokenizer.decode(ids[:-1]):
            return str(text)
    raise AssertionError("all of a text is longer than a part of it")


def cut_afterwards(model: Any, prompts: list[list[int]], never: StopTags, lengths: list[int]) -> list[list[int]]:
    whole = generate(model, prompts, [LIMIT] * len(prompts), [never] * len(prompts), len(prompts))
    return [ids[:length] for ids, length in zip(whole, lengths, strict=True)]


def run() -> Iterator[Row]:
    tokenizer, model = make_tokenizer(), make_model("tiny", ours=True)
    work = plan(ROWS, turns=1, prompt=64, sampled=24)
    prompts, lengths, never = [row.prompt for row in work], [row.sampled[0] for row in work], StopTags(tokenizer, ())
    # Which text a random model has written after so many tokens is known only by letting it write.
    written = cut_afterwards(model, prompts, never, lengths)
    stops = [StopTags(tokenizer, (unique_end(tokenizer, ids),)) for ids in written]
    sides = {
        "ours": partial(generate, model, prompts, [LIMIT] * ROWS, stops, ROWS),
        "cut": partial(cut_afterwards, model, prompts, never, lengths),
    }
    seconds, equal = compare(sides, same_tokens, REPEATS)
    yield Row(
        case=f"{ROWS} turns of {min(lengths)} to {max(lengths)} tokens, limit {LIMIT}",
        peer="our generator without stop, cut afterwards",
        ours=seconds["ours"],
        theirs=seconds["cut"],
        required=REQUIRED,
        equal=equal["cut"],
    )
