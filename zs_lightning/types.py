"""The vocabulary of the house: what is asked, searched, found and written. No behaviour beyond
trivial properties."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class QAExample:
    """One question with every answer that counts as right."""

    id: str
    question: str
    golden_answers: tuple[str, ...]
    source: str
    subset: str = ""
    """A label to report results by, e.g. "new" for entities that training never saw."""
    support: tuple[str, ...] = ()
    """Document texts known to help, where a data set has them. For analysis only: no model and no
    reward sees them."""

    @property
    def key(self) -> str:
        """Unique over mixed sources: ids of two data sets may collide."""
        return f"{self.source}/{self.id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One search result. `text` is untrusted: it is sanitised before any model reads it."""

    text: str
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """One query of one trajectory. It carries its own example: nothing is ever looked up by
    position in a batch."""

    key: str
    query: str
    example: QAExample
    turn: int
    seed: int
    """Every random draw about this request (noise, simulator sampling) is a function of this
    number."""
    noise_prob: float = 0.0
    """Probability that a simulated engine answers with noise; real engines ignore it."""
    shown: tuple[Document, ...] = ()
    """Documents that earlier searches of the trajectory found, but those that asked for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """Documents, or the reason why there are none because the engine failed (an empty list is not a
    failure)."""

    key: str
    documents: tuple[Document, ...] = ()
    label: str | None = None
    """What a simulator was told to write: useful documents, or a kind of noise; None for a real
    engine."""
    noise: float | None = None
    """The share of the documents that were ordered as noise; None for a real engine."""
    withheld: bool = False
    """Whether the simulator was not told the golden answers, see search/guard.py."""
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRecord:
    """One training row of the simulator: a query and the documents it should answer with."""

    example: QAExample
    query: str
    label: str
    """Useful, or a kind of noise."""
    documents: tuple[Document, ...]
    evidence: tuple[str, ...] = ()
    """Texts of which a useful answer holds at least one; empty when the query asks for nothing
    checkable."""
    shown: tuple[Document, ...] = ()
    """Documents that were found before this search."""


class Status(StrEnum):
    """How a trajectory ended."""

    ANSWERED = "answered"
    TURN_LIMIT = "turn_limit"
    """The turn budget was spent without an answer."""
    LENGTH_LIMIT = "length_limit"
    """The context had no room for another turn."""
    FAILED = "failed"
    """A search, or the judge of the answer, failed: the trajectory is counted, but never trained
    on."""

    @property
    def is_truncated(self) -> bool:
        return self in (Status.TURN_LIMIT, Status.LENGTH_LIMIT)


class ActionKind(StrEnum):
    SEARCH = "search"
    ANSWER = "answer"
    INVALID = "invalid"


@dataclass(slots=True, kw_only=True)
class Turn:
    """One generation of the policy and what the environment appended to it. Spans index
    `Trajectory.token_ids`.

    A search that the environment made by itself (RolloutSpec.retrieve_first) is a turn with no text
    and an empty span.
    """

    text: str
    kind: ActionKind
    content: str
    """The query or the answer; for an invalid action the reason."""
    span: tuple[int, int]
    observation_span: tuple[int, int] | None = None
    documents: tuple[Document, ...] = ()
    label: str | None = None
    noise: float | None = None
    withheld: bool = False
    repeated: bool = False
    """Whether the same search was answered before in this trajectory, and so no noise was drawn."""


@dataclass(slots=True, kw_only=True)
class Trajectory:
    """A whole rollout. `token_ids`, `loss_mask` and `old_logprobs` have one entry per token after
    the prompt."""

    # identity
    example: QAExample
    sample: int
    """Number of this rollout within its group (the rollouts of one example)."""
    noise_prob: float = 0.0
    """Probability of noise in each of its searches."""
    refilled: bool = False
    """Whether it was rolled out in place of a group without signal, see rl/pool.py."""

    # tokens
    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    """True where the policy sampled the token; retrieved and inserted tokens are False from
    birth."""
    old_logprobs: list[float] = field(default_factory=list)
    """Log-probability at sampling time; 0 where loss_mask is False."""

    # what happened
    turns: list[Turn] = field(default_factory=list)
    status: Status = Status.TURN_LIMIT
    failure: str | None = None

    # judgement
    verdict: float | None = None
    """The answer's score by a judge elsewhere, where the reward has asked one."""
    reward: float = 0.0
    reward_parts: dict[str, float] = field(default_factory=dict)
    advantage: float = 0.0

    @property
    def group_id(self) -> str:
        return self.example.key

    @property
    def answer(self) -> str | None:
        """The answer the policy sampled, or None. Never read from the prompt, a notice or a
        document."""
        if self.status is not Status.ANSWERED or not self.turns:
            return None
        last = self.turns[-1]
        return last.content if last.kind is ActionKind.ANSWER else None

    @property
    def written(self) -> list[Turn]:
        """Turns of the policy: without the search that the environment made by itself."""
        return [turn for turn in self.turns if turn.span[1] > turn.span[0]]

    @property
    def searches(self) -> list[Turn]:
        """Turns whose query was sent to the engine."""
        searches = [turn for turn in self.turns if turn.kind is ActionKind.SEARCH]
        return [turn for turn in searches if turn.observation_span is not None]


@dataclass(slots=True, kw_only=True)
class MicroBatch:
    """A padded part of a rollout step: B trajectories, T tokens (prompt and response), K trained
    ones.

    It is made once a step and carries all that the updates need. What is [K] is of the trained
    tokens, row by row.
    """

    trajectories: list[Trajectory]
    """B of them; a trajectory is never spread over micro-batches."""
    input_ids: Tensor
    """[B, T] int64, padded on the right."""
    loss_mask: Tensor
    """[B, T] bool, True where input_ids[b, t] was sampled by the policy."""
    rows: Tensor
    """[K] int64, each token's row in the micro-batch."""
    old_logprobs: Tensor
    """[K] float32 of the policy that sampled, as the generator computed them."""
    advantages: Tensor
    """[K] float32: the trajectory's own, or each token's from a critic."""
    first_logprobs: Tensor | None = None
    """[K] of the policy before the first update, as the training forward computes them."""
    ref_logprobs: Tensor | None = None
    """[K] of the reference policy, where KL has a weight."""
    values: Tensor | None = None
    """[K] float32 of the critic before the first update."""
    returns: Tensor | None = None
    """[K] float32 that the critic learns."""
