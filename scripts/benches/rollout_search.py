"""Policy and simulator as two adapters of one base: our shared pool, our generator in phases, `generate` in phases."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benches import hf
from benches.harness import Row, compare, same_tokens
from benches.work import Planned, longest, make_model, make_tokenizer, plan, request
from zs_lightning.generation import Generator, MixedAdapters, StopTags

REQUIRED = {64: 2.3}
"""Rollouts at the same time, and how often faster than `generate` in phases the shared pool must be."""
RANK = 16


def with_adapters(model: Any) -> Any:
    """The model with the adapters `policy` and `simulator` on all linear layers, neither of them zero."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(model, config, adapter_name="policy")
        model.add_adapter("simulator", config)
    return model.eval()


class Turns:
    """Where each rollout is: rows of policy and simulator take turns, named by `p` or `s` and the rollout's number."""

    def __init__(self, generator: Generator, work: list[Planned], stop: StopTags, shared: bool) -> None:
        self.generator, self.work, self.stop, self.shared = generator, work, stop, shared
        self.written: list[list[list[int]]] = [[] for _ in work]

    def ask_policy(self, i: int, ids: list[int]) -> None:
        new = self.work[i].sampled[len(self.written[i])]
        adapter = {"adapter": "policy"} if self.shared else {}
        self.generator.submit(request(f"p{i}", ids, new, self.stop, keep=True, **adapter))

    def ask_simulator(self, i: int) -> None:
        turn = len(self.written[i]) - 1
        adapter = {"adapter": "simulator"} if self.shared else {}
        ids, new = self.work[i].queries[turn], len(self.work[i].documents[turn])
        self.generator.submit(request(f"s{i}", ids, new, self.stop, **adapter))

    def step(self) -> list[tuple[str, int, list[int]]]:
        """Turns that ended: who wrote, for which rollout, which ids. Finished rollouts are taken out."""
        ended = []
        for generated in self.generator.step():
            who, i = generated.key[0], int(generated.key[1:])
            if who == "p":
                self.written[i].append(generated.token_ids)
                if len(self.written[i]) == len(self.work[i].sampled):
                    self.generator.release(generated.key)
                    continue
            ended.append((who, i, generated.token_ids))
        return ended

    def result(self) -> list[list[int]]:
        return [ids for row in self.written for ids in row]


def shared_pool(model: Any, stop: StopTags, work: list[Planned]) -> list[list[int]]:
    """Rows of both adapters in the same forward passes; nobody waits for anybody else's turn."""
    with MixedAdapters(model, ["policy", "simulator"]) as adapters:
        turns = Turns(Generator(model, 2 * len(work), longest(work), adapters), work, stop, shared=True)
        for i, row in enumerate(work):
            turns.ask_policy(i, row.prompt)
        while turns.generator.busy:
            for who, i, ids in turns.step():
                turns.ask_simulator(i) if who == "p" else turns.ask_policy(i, ids)
    return turns.result()


def phases(model: Any, stop: StopTags, work: list[Planned]) -> list[list[int]]:
    """All policy turns to their end, then all searches, with the one active adapter."""
    turns = Turns(Generator(model, 2 * len(work), longest(work)), work, stop, shared=False)
    waiting: list[tuple[str, int, list[int]]] = [("s", i, row.prompt) for i, row in enumerate(work)]
    while waiting:
        searching = waiting[0][0] == "p"
        model.set_adapter("simulator" if searching else "policy")
        for _, i, ids in waiting:
            turns.ask_simulator(i) if searching else turns.ask_policy(i, ids)
        waiting = []
        while turns.generator.busy:
            waiting += turns.step()
    return turns.result()


def generate_phases(model: Any, work: list[Planned]) -> list[list[int]]:
    """transformers: whole contexts, every turn and every search until its longest row has ended."""
    contexts, turns = [list(row.prompt) for row in work], [[] for _ in work]

    def write(adapter: str, prompts: list[list[int]], new: list[int]) -> list[list[int]]:
        model.set_adapter(adapter)
        ids, mask = hf.left_pad(prompts)
        return hf.cut(hf.generate(model.get_base_model(), ids, mask, new), ids.shape[1], new)

    for turn in range(len(work[0].sampled)):
        for done, context, ids in zip(turns, contexts, write("policy", contexts, [w.sampled[turn] for w in work]), strict=True):
            done.append(ids)
            context += ids
        if turn < len(work[0].documents):
            lengths = [len(row.documents[turn]) for row in work]
            for context, ids in zip(contexts, write("simulator", [w.queries[turn] for w in work], lengths), strict=True):
                context += ids
    return [ids for row in turns for ids in row]


def run() -> Iterator[Row]:
    stop = StopTags(make_tokenizer(), ())
    our_model, peer_model = (with_adapters(make_model("tiny", ours)) for ours in (True, False))
    for rows, required in REQUIRED.items():
        work, small = plan(rows), plan(2, turns=2, prompt=8, sampled=3, document=4)

        def sides(planned: list[Planned]) -> dict[str, Any]:
            return {
                "ours": partial(shared_pool, our_model, stop, planned),
                "our generator in phases": partial(phases, our_model, stop, planned),
                "transformers generate in phases": partial(generate_phases, peer_model, planned),
            }

        compare(sides(small), same_tokens, repeats=1)
        seconds, equal = compare(sides(work), same_tokens)
        for peer, bar in (("transformers generate in phases", required), ("our generator in phases", None)):
            yield Row(
                case=f"{rows} rollouts, one base",
                peer=peer,
                ours=seconds["ours"],
                theirs=seconds[peer],
                required=bar,
                equal=equal[peer],
            )
