"""Searches that wait at the same time: all in one batch, at most ten (the reference's threads), one after another (TRL)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benches.harness import Row, compare, same_tokens
from benches.work import generate, make_model, make_tokenizer, plan
from zs_lightning.generation import StopTags

SEARCHES = 64
REQUIRED = {10: 1.8, 1: 7.0}
"""Searches at a time of the peer, and how often faster all at once must be. Every side is our generator: a slower one would
make the peers look worse."""


def run() -> Iterator[Row]:
    model, stop = make_model("tiny", ours=True), StopTags(make_tokenizer(), ())
    work = plan(SEARCHES, turns=1, prompt=24, sampled=48)
    prompts, new, stops = [row.prompt for row in work], [row.sampled[0] for row in work], [stop] * SEARCHES
    generate(model, prompts[:4], [4] * 4, stops[:4], 4)
    sides = {f"{slots} at a time": partial(generate, model, prompts, new, stops, slots) for slots in (SEARCHES, *REQUIRED)}
    seconds, equal = compare(sides, same_tokens)
    for slots, required in REQUIRED.items():
        peer = f"{slots} at a time"
        yield Row(
            case=f"{SEARCHES} searches",
            peer=f"our generator, {peer}",
            ours=seconds[f"{SEARCHES} at a time"],
            theirs=seconds[peer],
            required=required,
            equal=equal[peer],
        )
