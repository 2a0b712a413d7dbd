"""What the generator is asked to generate, what it gives back, and what it keeps in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from zs_lightning.generation.sampler import Sampling
from zs_lightning.generation.stop import StopTags


@dataclass(frozen=True, kw_only=True)
class Request:
    """A new row, or the next turn of a parked one (same key).

    `seed` names the row's random stream; `keep` parks the row's K/V at the end of the turn for a later one; `adapter` is
    one of the generator's adapters, "" the bare model; `deliver` is called with what was generated, instead of `step`
    returning it.
    """

    key: str
    ids: list[int]
    max_new_tokens: int
    seed: int
    sampling: Sampling
    stop: StopTags
    keep: bool = False
    adapter: str = ""
    deliver: Callable[[Generated], None] | None = None


@dataclass(frozen=True)
class Generated:
    """What a row sampled in one turn. `stopped` is False if it ran into max_new_tokens."""

    key: str
    token_ids: list[int]
    logprobs: list[float]
    stopped: bool


@dataclass(eq=False)
class Row:
    request: Request
    slot: int = -1
    """-1 while the row has none: it waits for its first, or needs none any more."""
    length: int = 0
    """Positions filled in the K/V memory; the last sampled token is not among them yet."""
    drawn: int = 0
    """Tokens drawn in this turn; the last of them may not have been read yet."""
    last: int | None = None
    stopped: bool = False
    ended: bool = False
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
