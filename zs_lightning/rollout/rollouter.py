"""The loop of a rollout: the policy writes until a tag, the search engine answers, its documents
are appended, and again.

Token ids are the truth from sampling to loss: sampled text is decoded to find the action, and never
encoded again. A trajectory's tokens, loss_mask and old_logprobs grow together, so that what a
document says can never be trained on: its tokens are born with loss_mask False.
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

from zs_lightning.errors import RunError, UserError, check_shares
from zs_lightning.generation import Generated, Generator, Request, Sampling, StopTags
from zs_lightning.models.encoding import TextEncoder
from zs_lightning.search.base import SearchEngine
from zs_lightning.streams import derive_seed
from zs_lightning.text.prompts import Prompts, ask
from zs_lightning.text.protocol import STOP_TAGS, THOUGHT_END, disarm, parse_action, query_key
from zs_lightning.types import (
    ActionKind,
    Document,
    QAExample,
    SearchRequest,
    SearchResult,
    Status,
    Trajectory,
    Turn,
)

Watch = Callable[[Trajectory, list[int]], None]
"""Called for each trajectory after every step, with what its unfinished turn has sampled so far."""
Tell = Callable[[str, int, int, int], None]
"""Called in every step: generate or search, rollouts that ended, all rollouts, tokens so far."""


@dataclass(frozen=True)
class RolloutSpec:
    """Limits of a rollout and how its tokens are drawn.

    Args:
        max_turns: turns with a search (or an invalid action); one more turn may only answer. 0 is
            closed-book.
        retrieve_first: the question itself is searched once and the documents follow the prompt,
            before the policy writes anything. With max_turns 0 this is one-shot retrieval.
        max_new_tokens: most sampled tokens of a turn.
        max_observation_tokens: most tokens of one result; its last documents are cut, its closing
            tag never is.
        max_length: most tokens of the context, prompt included.
        temperature: of the policy in training.
        top_p: of the policy in training.
        noise_draw: what a search's noise and documents are a function of. `call` draws anew for
            every search (the paper); `query` once for each query of a trajectory, so that asking
            the same words again, in whatever order, gets the same answer, as from a real engine.
        clean_share: share of each group's rollouts, in whole ones, that search without noise (arXiv
            2605.27209); the paper has none.
        slots: most rollouts generated at the same time, fewer if memory does not allow them; more
            run in waves.
    """

    max_turns: int = 5
    retrieve_first: bool = False
    max_new_tokens: int = 500
    max_observation_tokens: int = 500
    max_length: int = 4096
    temperature: float = 1.0
    top_p: float = 1.0
    noise_draw: Literal["call", "query"] = "call"
    clean_share: float = 0.0
    slots: int = 64

    def __post_init__(self) -> None:
        limits = (self.max_new_tokens, self.max_observation_tokens, self.max_length, self.slots)
        if self.max_turns < 0 or min(limits) < 1:
            raise UserError(f"rollout: expected max_turns >= 0 and all other limits >= 1; got {self}")
        check_shares("rollout", clean_share=self.clean_share)
        if not (self.temperature > 0 and 0 < self.top_p <= 1):
            raise UserError(
                "rollout: expected temperature > 0, since greedy rollouts have nothing to learn from, "
                f"and 0 < top_p <= 1; got temperature {self.temperature:g} and top_p {self.top_p:g}"
            )

    def template(self, prompts: Prompts) -> str:
        """The policy's prompt, which tells it whether it can search."""
        if self.max_turns:
            return prompts.policy
        return prompts.retrieved if self.retrieve_first else prompts.closed_book


def prompt_ids(
    encoder: TextEncoder,
    prompts: Prompts,
    spec: RolloutSpec,
    example: QAExample,
) -> list[int]:
    """What opens a context. Raises UserError if the context has no room for more; it is never
    cut."""
    fields = {"question": disarm(ask(example.question))}
    template = spec.template(prompts)
    ids = encoder.prompt(template, fields, prompts.chat, thinking=prompts.thinking)
    if len(ids) >= spec.max_length:
        raise UserError(
            f"the prompt of question {example.key} has {len(ids)} tokens; raise rollout.max_length ({spec.max_length})"
        )
    return ids


@dataclass
class _Row:
    """A trajectory on its way."""

    key: str
    seed: int
    trajectory: Trajectory
    answered: dict[str, SearchResult] = field(default_factory=dict)
    """Results by the words of their queries, for noise_draw `query`."""

    @property
    def length(self) -> int:
        return len(self.trajectory.prompt_ids) + len(self.trajectory.token_ids)


@dataclass(eq=False, repr=False)
class Rollouter:
    """Makes trajectories of one policy with one search engine.

    Args:
        generator: of the policy.
        encoder: of the policy's tokenizer.
        search: answers the queries.
        stop: made by `StopTags(tokenizer, STOP_TAGS)`, once, since it reads the whole vocabulary.
        adapter: the policy's, where the generator has several.
        noise_prob: handed to the search engine with every request.
        watch: sees the trajectories grow.
        tell: is told how far they are.
    """

    generator: Generator
    encoder: TextEncoder
    search: SearchEngine
    prompts: Prompts
    spec: RolloutSpec
    stop: StopTags
    _: KW_ONLY
    adapter: str = ""
    noise_prob: float = 0.0
    watch: Watch | None = None
    tell: Tell = lambda *_: None

    def __post_init__(self) -> None:
        if self.stop.texts != STOP_TAGS:
            raise ValueError(f"a rollout stops at {STOP_TAGS}; got a StopTags for {self.stop.texts}")
        self.template = self.spec.template(self.prompts)

    def run(
        self,
        examples: Sequence[QAExample],
        group_size: int,
        seed: int,
        sampling: Sampling | None = None,
    ) -> list[Trajectory]:
        """`group_size` trajectories for each example, in this order. They are a function of the
        arguments and the weights alone: not of slots, of the order of answers or of other rows.
        Tokens are drawn as in training, or as `sampling` says.

        Raises:
            UserError: a question does not fit into the context (it is never cut), or occurs twice.
            RunError: the search engine loses or invents a request.
        """
        spec = self.spec
        self.sampling = sampling or Sampling(temperature=spec.temperature, top_p=spec.top_p)
        rows = self._rows(examples, group_size, seed)
        # What an error in the middle of an earlier run left behind.
        self.generator.clear()
        waiting: set[str] = set()
        if self.spec.retrieve_first:
            opening = [self._retrieve(row) for row in rows.values()]
            self.search.submit(opening)
            waiting = {request.key for request in opening}
        else:
            # All at once: rows of a group have one prompt, which the generator reads once for them.
            for row in rows.values():
                self._generate(row, row.trajectory.prompt_ids)
        while self.generator.busy or waiting:
            # With more rows than slots, parked rows may hold every slot until their searches are
            # answered; then there is nothing to generate, and only waiting for documents helps.
            writes = self.generator.busy and not (waiting and self.generator.stalled)
            phase = "generate" if writes else "search"
            self.tell(phase, self.ended, len(rows), self.generator.sampled_tokens)
            if writes:
                requests = []
                for generated in self.generator.step():
                    requests += self._end_turn(rows[generated.key], generated)
                # All turns that ended in this step search together, so that a simulator answers
                # them in one batch.
                self.search.submit(requests)
                waiting |= {request.key for request in requests}
                # What has been answered meanwhile; the policy's other rows go on without waiting.
                results = self.search.ready()
            else:
                results = self.search.poll()
                if not results:
                    raise RunError(f"the search engine {self.search.name} lost {len(waiting)} requests")
            for result in results:
                # An answer under a wrong key would put one question's documents into another's
                # context.
                if result.key not in waiting:
                    name = self.search.name
                    raise RunError(f"the search engine {name} answered {result.key}, which asked nothing")
                waiting.remove(result.key)
                self._observe(rows[result.key], result)
            self._show(rows)
        # In the order of the examples, whichever ended first.
        return [row.trajectory for row in rows.values()]

    def _rows(self, examples: Sequence[QAExample], group_size: int, seed: int) -> dict[str, _Row]:
        """The trajectories to make, by key, with nothing but their prompts."""
        rows: dict[str, _Row] = {}
        self.ended = 0
        for example in examples:
            opening = prompt_ids(self.encoder, self.prompts, self.spec, example)
            for sample in range(group_size):
                key = f"{example.key}#{sample}"
                if key in rows:
                    raise UserError(f"question {example.key} occurs twice in one batch; ids must be unique within a source")
                trajectory = Trajectory(example=example, sample=sample, prompt_ids=opening)
                # The first ones of a group: whole numbers of rollouts, on every rank the same.
                is_clean = sample < round(self.spec.clean_share * group_size)
                trajectory.noise_prob = 0.0 if is_clean else self.noise_prob
                # By the question and not by its place, so that ranks and resumed runs draw alike,
                # whatever else is in the batch.
                rows[key] = _Row(key, derive_seed(seed, key), trajectory)
        return rows

    def _show(self, rows: dict[str, _Row]) -> None:
        if self.watch is None:
            return
        for key, row in rows.items():
            # A row that waits for documents has ended its turn, one that is answered is gone.
            state = self.generator.rows.get(key)
            unfinished = [] if state is None or state.ended else state.token_ids
            self.watch(row.trajectory, unfinished)

    def _retrieve(self, row: _Row) -> SearchRequest:
        """The search of retrieve_first, in a turn in which the policy says nothing."""
        question = row.trajectory.example.question
        turn = Turn(text="", kind=ActionKind.SEARCH, content=question, span=(0, 0))
        row.trajectory.turns.append(turn)
        return self._request(row, question)

    def _generate(self, row: _Row, ids: list[int]) -> None:
        """Queues the row's next turn after `ids`: what the generator has not read yet of the
        row."""
        self.generator.submit(
            Request(
                key=row.key,
                ids=ids,
                # A turn that meets the end of the context is cut there, and is then no action.
                max_new_tokens=min(self.spec.max_new_tokens, self.spec.max_length - row.length),
                seed=row.seed,
                sampling=self.sampling,
                stop=self.stop.after(THOUGHT_END) if self._thinks(row) else self.stop,
                # Its K/V stays while it waits for documents: they are all that has to be read.
                keep=True,
                adapter=self.adapter,
            )
        )

    def _thinks(self, row: _Row) -> bool:
        """Whether the row's next turn begins inside of a thought, which the template opened for
        it."""
        # Tags that it writes in there are no actions: the turn must not stop at them.
        return not row.trajectory.written and self.encoder.opens_thought(
            self.template, self.prompts.chat, thinking=self.prompts.thinking
        )

    def _end_turn(self, row: _Row, generated: Generated) -> list[SearchRequest]:
        """Reads the turn's action and acts on it; returns the search to send, if any."""
        trajectory = row.trajectory
        start = len(trajectory.token_ids)
        # Before the turn is appended: afterwards it would be the second one, outside of any
        # thought.
        text = self.encoder.decode(generated.token_ids)
        action = parse_action(text, self._thinks(row))
        # The ids as they were sampled, not those of the decoded text: these may differ.
        trajectory.token_ids += generated.token_ids
        trajectory.loss_mask += [True] * len(generated.token_ids)
        trajectory.old_logprobs += generated.logprobs
        content = action.content
        # Without a closing tag for another reason than a wrong action: the turn had no room.
        if action.kind is ActionKind.INVALID and not generated.stopped:
            content = "turn_too_long"
        span = (start, len(trajectory.token_ids))
        turn = Turn(text=text, kind=action.kind, content=content, span=span)
        trajectory.turns.append(turn)
        if action.kind is ActionKind.ANSWER:
            # Judged later, by what was sampled; nothing is appended to an answer.
            self._end(row, Status.ANSWERED)
        elif len(trajectory.turns) - self.spec.retrieve_first > self.spec.max_turns:
            # The last turn may only answer: its search is not sent.
            self._end(row, Status.TURN_LIMIT)
        elif action.kind is ActionKind.INVALID:
            # It is told what an action looks like, and has a turn less.
            self._append(row, turn, self.encoder.literal(self.prompts.notice))
        elif self.spec.noise_draw == "query" and query_key(action.content) in row.answered:
            # Asked before in this trajectory: the same documents, as a real engine would answer.
            turn.repeated = True
            self._observe(row, row.answered[query_key(action.content)])
        else:
            return [self._request(row, action.content)]
        return []

    def _request(self, row: _Row, query: str) -> SearchRequest:
        turn = len(row.trajectory.turns)
        # As in the paper: a search that is repeated may find something else.
        draw: tuple[str, object] = ("call", turn)
        if self.spec.noise_draw == "query":
            draw = ("query", query_key(query))
        shown: list[Document] = []
        for earlier in row.trajectory.turns:
            # What a query found that asked for nothing is no reason to tell the answer to the next.
            shown += [] if earlier.withheld else earlier.documents
        return SearchRequest(
            key=row.key,
            query=query,
            example=row.trajectory.example,
            turn=turn,
            seed=derive_seed(row.seed, *draw),
            noise_prob=row.trajectory.noise_prob,
            shown=tuple(shown),
        )

    def _observe(self, row: _Row, result: SearchResult) -> None:
        """Appends the documents of a result, or ends the trajectory if the search failed."""
        if result.failure is not None:
            # Never a placeholder in the context: the policy would learn from the engine's trouble.
            row.trajectory.failure = result.failure
            self._end(row, Status.FAILED)
            return
        # The documents are kept as they came, for the report; what the policy reads may be cut.
        turn = row.trajectory.turns[-1]
        row.answered[query_key(turn.content)] = result
        turn.documents = result.documents
        turn.label = result.label
        turn.noise = result.noise
        turn.withheld = result.withheld
        self._append(row, turn, self._observation_ids(result.documents))

    def _observation_ids(self, documents: Sequence[Document]) -> list[int]:
        """Ids of the documents between their tags, cut to max_observation_tokens."""
        lines = self.prompts.listed(documents)
        # The tags and the documents are encoded apart, since only the tags are ours.
        opening, _, closing = self.prompts.observation.partition("{documents}")
        before = self.encoder.literal(opening)
        after = self.encoder.literal(closing)
        # The closing tag is never cut: the policy would go on inside of the documents.
        room = max(0, self.spec.max_observation_tokens - len(before) - len(after))
        # Documents are untrusted: a control token that they spell out stays text. The tags are
        # ours.
        return before + self.encoder.untrusted(lines)[:room] + after

    def _append(self, row: _Row, turn: Turn, ids: list[int]) -> None:
        """Appends tokens that the policy did not sample, and lets it go on if there is room."""
        trajectory = row.trajectory
        # There must be room for one more token than these: a context without an answer is
        # truncated.
        if row.length + len(ids) >= self.spec.max_length:
            self._end(row, Status.LENGTH_LIMIT)
            return
        # After retrieve_first nothing has been read yet, not even the prompt.
        unread = ids if trajectory.token_ids else trajectory.prompt_ids + ids
        start = len(trajectory.token_ids)
        turn.observation_span = (start, start + len(ids))
        trajectory.token_ids += ids
        # Never trained on: the policy did not choose these tokens.
        trajectory.loss_mask += [False] * len(ids)
        trajectory.old_logprobs += [0.0] * len(ids)
        self._generate(row, unread)

    def _end(self, row: _Row, status: Status) -> None:
        row.trajectory.status = status
        self.ended += 1
        # Another row can have its slot.
        self.generator.release(row.key)
