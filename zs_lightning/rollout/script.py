"""Written turns played as rollouts, so that they are the tokens that a policy would have sampled.

There is one way from texts to a trajectory: a Rollouter asks a Script where else it asks the
policy's generator. Prompt, tokens, loss_mask, documents, limits and how a trajectory ends are then
those of RL by construction.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from zs_lightning.generation import Generated, Request, StopTags
from zs_lightning.models.encoding import TextEncoder
from zs_lightning.rollout.rollouter import Rollouter, RolloutSpec
from zs_lightning.search.base import SearchEngine
from zs_lightning.text.prompts import Prompts
from zs_lightning.text.protocol import SEARCH_END, THOUGHT, THOUGHT_END
from zs_lightning.types import Document, QAExample, SearchRequest, SearchResult, Trajectory

TAGS = (THOUGHT, THOUGHT_END, "<search>", SEARCH_END, "<answer>", "</answer>")


@dataclass(frozen=True)
class Demonstration:
    """A trajectory as text, without anybody's tokens."""

    example: QAExample
    turns: tuple[str, ...]
    """What the policy is to write, turn by turn, each up to its closing tag."""
    found: tuple[tuple[Document, ...], ...]
    """What the search of each turn found; with retrieve_first, of a turn before the first as
    well."""
    evidence: str = ""
    """A text that must be left of what was found when that is cut; empty for none."""


class Script:
    """Stands in for a Generator: the turns of its rows are written already, as token ids by the
    key of the row; empty ones follow."""

    stalled = False
    sampled_tokens = 0

    def __init__(self, turns: Mapping[str, Sequence[list[int]]]) -> None:
        self.turns = {key: list(written) for key, written in turns.items()}
        self.queue: list[Request] = []

    @property
    def busy(self) -> bool:
        return bool(self.queue)

    def submit(self, request: Request) -> None:
        self.queue.append(request)

    def step(self) -> list[Generated]:
        """The next turn of every row that asked for one, ended where a policy's would be."""
        queue, self.queue = self.queue, []
        ended = []
        for request in queue:
            left = self.turns[request.key]
            # Whoever wrote fewer turns than the limits allow has no more to say: the row ends.
            ids = left.pop(0) if left else []
            # Cut as a policy would be, which makes it an invalid turn: it is left out later.
            ids = ids[: request.max_new_tokens]
            # What follows a closing tag no policy is asked for.
            ends = (number for number in range(1, len(ids) + 1) if request.stop.hit(ids[:number]))
            end = next(ends, None)
            # Log-probabilities of 0: nobody sampled them.
            ended.append(Generated(request.key, ids[:end], [0.0] * len(ids[:end]), end is not None))
        return ended

    def clear(self) -> None:
        self.queue = []

    def release(self, key: str) -> None:
        """Nothing is held for a row."""


class Replay(SearchEngine):
    """Answers the search of each turn of each row with what is written down."""

    name = "replay"

    def __init__(self, found: Mapping[str, Sequence[tuple[Document, ...]]]) -> None:
        self.found = found
        self.pending: list[SearchRequest] = []

    def submit(self, requests: Sequence[SearchRequest]) -> None:
        self.pending += requests

    def poll(self) -> list[SearchResult]:
        pending, self.pending = self.pending, []
        results = []
        for request in pending:
            # Turns are counted from 1, and there is none for what was never searched.
            here = self.found[request.key][request.turn - 1 : request.turn]
            failure = None if here else "no result was written down"
            results.append(SearchResult(key=request.key, documents=sum(here, ()), failure=failure))
        return results


def play(
    demonstrations: Iterable[Demonstration],
    encoder: TextEncoder,
    prompts: Prompts,
    spec: RolloutSpec,
    stop: StopTags,
) -> list[Trajectory]:
    """The trajectory of each demonstration, in their order.

    Its old_logprobs are 0: no policy sampled it.
    """
    opened = encoder.opens_thought(spec.template(prompts), prompts.chat, thinking=prompts.thinking)
    # A result that was written down stays the one of its search, whichever search was like it.
    spec = replace(spec, noise_draw="call")
    seen: Counter[str] = Counter()
    rounds: dict[int, dict[str, tuple[int, Demonstration]]] = {}
    for place, demonstration in enumerate(demonstrations):
        key = f"{demonstration.example.key}#0"
        # A question may be demonstrated more than once, but is asked once in a rollout.
        rounds.setdefault(seen[key], {})[key] = (place, demonstration)
        seen[key] += 1
    played: dict[int, Trajectory] = {}
    for rows in rounds.values():
        turns, found = {}, {}
        for key, (_, demonstration) in rows.items():
            texts = _begun(demonstration.turns, opened)
            turns[key] = [encoder.written(text, TAGS) for text in texts]
            found[key] = demonstration.found
        # All that a rollouter asks of a generator, a Script has.
        generator = cast(Any, Script(turns))
        rollouter = Rollouter(generator, encoder, Replay(found), prompts, spec, stop)
        made = rollouter.run([demonstration.example for _, demonstration in rows.values()], 1, 0)
        for (place, _), trajectory in zip(rows.values(), made, strict=True):
            played[place] = trajectory
    return [played[place] for place in sorted(played)]


def _begun(turns: Sequence[str], opened: bool) -> list[str]:
    """The turns as the policy writes them: where its prompt has `opened` the first thought, without
    the tag that opens it, whether or not the prompt of whoever wrote them did so."""
    # Only the first turn of a rollout follows the prompt.
    first, *others = turns or ("",)
    if THOUGHT not in first.partition(THOUGHT_END)[0] and THOUGHT_END in first:
        first = THOUGHT + first
    return [first.lstrip().removeprefix(THOUGHT) if opened else first, *others]
