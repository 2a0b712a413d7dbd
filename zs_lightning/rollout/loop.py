"""The loop of a rollout: the policy writes until a tag, the engine answers, its documents are appended, and again.

Token ids are the truth from sampling to loss: sampled text is decoded to find the action, and never encoded again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from zs_lightning.errors import RunError, UserError
from zs_lightning.generation import Generated, Generator, Request, Sampling, StopTags
from zs_lightning.models.encoding import TextEncoder
from zs_lightning.search.base import SearchEngine
from zs_lightning.streams import derive_seed
from zs_lightning.text.prompts import Prompts, ask, fill
from zs_lightning.text.protocol import STOP_TAGS, THOUGHT_END, document_lines, parse_action, query_key
from zs_lightning.types import ActionKind, Document, QAExample, SearchRequest, SearchResult, Status, Trajectory, Turn


@dataclass(frozen=True)
class RolloutSpec:
    """Limits of a rollout and how its tokens are drawn.

    Args:
        max_turns: turns with a search (or an invalid action); one more turn may only answer. 0 is closed-book.
        retrieve_first: the question itself is searched once and the documents follow the prompt, before the policy writes
            anything. With max_turns 0 this is one-shot retrieval.
        max_new_tokens: most sampled tokens of a turn.
        max_observation_tokens: most tokens of one result; its last documents are cut, its closing tag never is.
        max_length: most tokens of the context, prompt included.
        temperature: of the policy in training.
        top_p: of the policy in training.
        noise_draw: what a search's noise and documents are a function of. `call` draws anew for every search (the paper);
            `query` once for each query of a trajectory, so that asking the same words again gets the same answer, as from
            a real engine.
        slots: most rollouts generated at the same time, fewer if memory does not allow them; more run in waves.
    """

    max_turns: int = 5
    retrieve_first: bool = False
    max_new_tokens: int = 500
    max_observation_tokens: int = 500
    max_length: int = 4096
    temperature: float = 1.0
    top_p: float = 1.0
    noise_draw: Literal["call", "query"] = "call"
    slots: int = 64

    def __post_init__(self) -> None:
        if self.max_turns < 0 or min(self.max_new_tokens, self.max_observation_tokens, self.max_length, self.slots) < 1:
            raise UserError(f"rollout: expected max_turns >= 0 and all other limits >= 1; got {self}")
        if not (self.temperature > 0 and 0 < self.top_p <= 1):
            raise UserError(
                "rollout: expected temperature > 0, since greedy rollouts have nothing to learn from, and 0 < top_p <= 1; got "
                f"temperature {self.temperature:g} and top_p {self.top_p:g}"
            )

    def template(self, prompts: Prompts) -> str:
        """Of the policy's prompt."""
        without_search = prompts.retrieved if self.retrieve_first else prompts.closed_book
        return prompts.policy if self.max_turns else without_search


@dataclass
class _Running:
    """A trajectory on its way."""

    key: str
    seed: int
    trajectory: Trajectory
    answered: dict[str, SearchResult]
    """Results by query, for noise_draw `query`."""

    @property
    def length(self) -> int:
        return len(self.trajectory.prompt_ids) + len(self.trajectory.token_ids)


class Rollout:
    """Runs trajectories of one policy against one search engine.

    Args:
        generator: of the policy.
        encoder: of the policy's tokenizer.
        search: answers the queries.
        stop: found by `StopTags(tokenizer, STOP_TAGS)`; made once, since it reads the whole vocabulary.
        noise_prob: handed to the search engine with every request.
    """

    def __init__(
        self,
        generator: Generator,
        encoder: TextEncoder,
        search: SearchEngine,
        prompts: Prompts,
        spec: RolloutSpec,
        stop: StopTags,
        noise_prob: float = 0.0,
    ) -> None:
        if stop.texts != STOP_TAGS:
            raise UserError(f"a rollout stops at {STOP_TAGS}; got a StopTags for {stop.texts}")
        self.generator, self.encoder, self.search, self.prompts = generator, encoder, search, prompts
        self.spec, self.stop, self.noise_prob = spec, stop, noise_prob
        self.template = spec.template(prompts)
        self.adapter = ""
        """The policy's adapter, if the generator was given several."""
        self.watch: Callable[[Trajectory, list[int]], None] | None = None
        """Called for each trajectory after every step, with what its unfinished turn has sampled so far."""

    def run(
        self, examples: Sequence[QAExample], group_size: int, seed: int, sampling: Sampling | None = None
    ) -> list[Trajectory]:
        """`group_size` trajectories for each example, in this order. A function of the arguments and the weights alone.

        Raises:
            UserError: a question does not fit into the context (it is never cut).
        """
        sampling = sampling or Sampling(temperature=self.spec.temperature, top_p=self.spec.top_p)
        running: dict[str, _Running] = {}
        opening: list[SearchRequest] = []
        self.generator.clear()
        for example in examples:
            prompt_ids = self.prompt_ids(example)
            for sample in range(group_size):
                key = f"{example.key}#{sample}"
                if key in running:
                    raise UserError(f"question {example.key} occurs twice in one batch; ids must be unique within a source")
                trajectory = Trajectory(example=example, sample=sample, prompt_ids=prompt_ids)
                running[key] = _Running(key, derive_seed(seed, key), trajectory, {})
                if self.spec.retrieve_first:
                    opening.append(self._retrieve(running[key]))
                else:
                    self._generate(running[key], prompt_ids, sampling)
        if opening:
            self.search.submit(opening)
        waiting = {request.key for request in opening}
        while self.generator.busy or waiting:
            # With more rows than slots, parked rows may hold every slot until their searches are answered.
            if self.generator.busy and not (waiting and self.generator.stalled):
                requests = [r for g in self.generator.step() for r in self._end_turn(running[g.key], g, sampling)]
                self.search.submit(requests)
                waiting |= {request.key for request in requests}
                results = self.search.ready()
            else:
                results = self.search.poll()
                if not results:
                    raise RunError(f"the search engine {self.search.name} lost {len(waiting)} requests")
            for result in results:
                if result.key not in waiting:
                    raise RunError(f"the search engine {self.search.name} answered {result.key}, which asked nothing")
                waiting.remove(result.key)
                self._observe(running[result.key], result, sampling)
            if self.watch is not None:
                for key, started in running.items():
                    state = self.generator.rows.get(key)
                    self.watch(started.trajectory, [] if state is None or state.ended else state.token_ids)
        return [row.trajectory for row in running.values()]

    def prompt_ids(self, example: QAExample) -> list[int]:
        """What opens the context. Raises UserError if the context has no room for more."""
        fields = {"question": ask(example.question)}
        ids = self.encoder.prompt(self.template, fields, self.prompts.chat, thinking=self.prompts.thinking)
        if len(ids) >= self.spec.max_length:
            raise UserError(
                f"the prompt of question {example.key} has {len(ids)} tokens; raise rollout.max_length ({self.spec.max_length})"
            )
        return ids

    def _retrieve(self, row: _Running) -> SearchRequest:
        """The search of retrieve_first, in a turn in which the policy says nothing."""
        question = row.trajectory.example.question
        row.trajectory.turns.append(Turn(text="", kind=ActionKind.SEARCH, content=question, span=(0, 0)))
        return self._request(row, question)

    def _generate(self, row: _Running, ids: list[int], sampling: Sampling) -> None:
        """Queues the row's next turn after `ids`: what the generator has not read yet of the trajectory."""
        self.generator.submit(
            Request(
                key=row.key,
                ids=ids,
                max_new_tokens=min(self.spec.max_new_tokens, self.spec.max_length - row.length),
                seed=row.seed,
                sampling=sampling,
                stop=self.stop.after(THOUGHT_END) if self._thinks(row) else self.stop,
                keep=True,
                adapter=self.adapter,
            )
        )

    def _thinks(self, row: _Running) -> bool:
        """Whether the row's next turn begins inside of a thought, which the chat template opened in the prompt."""
        return not row.trajectory.written and self.encoder.opens_thought(
            self.template, self.prompts.chat, thinking=self.prompts.thinking
        )

    def _end_turn(self, row: _Running, generated: Generated, sampling: Sampling) -> list[SearchRequest]:
        """Reads the turn's action and acts on it; returns the search to send, if any."""
        trajectory = row.trajectory
        start = len(trajectory.token_ids)
        trajectory.token_ids += generated.token_ids
        trajectory.loss_mask += [True] * len(generated.token_ids)
        trajectory.old_logprobs += generated.logprobs
        text = self.encoder.decode(generated.token_ids)
        action = parse_action(text, self._thinks(row))
        reason = action.content if generated.stopped or action.kind is not ActionKind.INVALID else "turn_too_long"
        turn = Turn(text=text, kind=action.kind, content=reason, span=(start, len(trajectory.token_ids)))
        trajectory.turns.append(turn)
        if action.kind is ActionKind.ANSWER:
            self._end(row, Status.ANSWERED)
        elif len(trajectory.turns) - self.spec.retrieve_first > self.spec.max_turns:
            self._end(row, Status.TURN_LIMIT)
        elif action.kind is ActionKind.INVALID:
            self._append(row, turn, self.encoder.literal(self.prompts.notice), sampling)
        else:
            if self.spec.noise_draw == "call" or action.content not in row.answered:
                return [self._request(row, action.content)]
            self._observe(row, row.answered[action.content], sampling)
        return []

    def _request(self, row: _Running, query: str) -> SearchRequest:
        turn = len(row.trajectory.turns)
        draw = ("query", query_key(query)) if self.spec.noise_draw == "query" else ("call", turn)
        return SearchRequest(
            key=row.key,
            query=query,
            example=row.trajectory.example,
            turn=turn,
            seed=derive_seed(row.seed, *draw),
            noise_prob=self.noise_prob,
        )

    def _observe(self, row: _Running, result: SearchResult, sampling: Sampling) -> None:
        """Appends the documents of a result, or ends the trajectory if the search failed."""
        turn = row.trajectory.turns[-1]
        if result.failure is not None:
            row.trajectory.failure = result.failure
            self._end(row, Status.FAILED)
            return
        row.answered[turn.content] = result
        turn.documents, turn.noisy = result.documents, result.noisy
        self._append(row, turn, self._observation_ids(result.documents), sampling)

    def _observation_ids(self, documents: Sequence[Document]) -> list[int]:
        lines = [fill(self.prompts.document, number=i, text=line) for i, line in enumerate(document_lines(documents), 1)]
        opening, _, closing = self.prompts.observation.partition("{documents}")
        before, after = self.encoder.literal(opening), self.encoder.literal(closing)
        room = max(0, self.spec.max_observation_tokens - len(before) - len(after))
        return before + self.encoder.untrusted("".join(lines))[:room] + after

    def _append(self, row: _Running, turn: Turn, ids: list[int], sampling: Sampling) -> None:
        """Appends tokens the policy did not sample and goes on, if the context has room for another token."""
        trajectory = row.trajectory
        if row.length + len(ids) >= self.spec.max_length:
            self._end(row, Status.LENGTH_LIMIT)
            return
        unread = ids if trajectory.token_ids else trajectory.prompt_ids + ids
        turn.observation_span = (len(trajectory.token_ids), len(trajectory.token_ids) + len(ids))
        trajectory.token_ids += ids
        trajectory.loss_mask += [False] * len(ids)
        trajectory.old_logprobs += [0.0] * len(ids)
        self._generate(row, unread, sampling)

    def _end(self, row: _Running, status: Status) -> None:
        row.trajectory.status = status
        self.generator.release(row.key)
