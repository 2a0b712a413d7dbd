"""What the generator is asked for, what it gives back, and what it keeps in between."""

# A Request is one turn of one row; one with the key of a parked row is that row's next turn. A
# Generated ends it, and a Row is what stands between the two. Launched are the tokens of one
# forward pass, which may still be on their way from a card.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zs_lightning.errors import NotFiniteError
from zs_lightning.generation.sampler import Sampling
from zs_lightning.generation.stop import StopTags


@dataclass(frozen=True, kw_only=True)
class Request:
    """A new row, or the next turn of a parked one, which reads `ids` and then writes.

    `seed` names the row's random stream; `keep` parks its K/V for a later turn; `adapter` is one of
    the generator's, or "" for the bare model; `deliver` gets what `step` then does not return.
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
    """A row that waits for a slot, is alive, or is parked."""

    request: Request
    slot: int = -1
    """-1 while the row has none: it waits for its first, or needs none any more."""
    # What the device has been told, whether or not it is done: these run ahead of token_ids.
    length: int = 0
    """Positions filled in the K/V memory; the last sampled token is not among them yet."""
    drawn: int = 0
    """Tokens drawn in this turn."""
    context: list[int] = field(default_factory=list)
    """All tokens that it was given or that were drawn for it, whether or not they are read."""
    stopped: bool = False
    ended: bool = False
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Launched:
    """Tokens [n] int64 and log-probabilities [n] float32 of n rows, on their way to the host.

    In `rows`, None replaces a row whose token turns out to have been drawn in vain.
    """

    def __init__(self, rows: Sequence[Row], tokens: Tensor, logprobs: Tensor) -> None:
        self.rows: list[Row | None] = list(rows)
        self.tokens = tokens
        # Both in float64, which holds token ids exactly, so that one copy takes them. From a card
        # it goes to pinned memory and the host does not wait for it: only `read` does.
        both = torch.stack((tokens.double(), logprobs.double()))
        self.values = both.to("cpu", non_blocking=True)
        stream = torch.cuda.current_stream(tokens.device) if tokens.is_cuda else None
        self.arrival = stream.record_event() if stream else None

    def read(self) -> tuple[list[int], list[float]]:
        """The tokens and log-probabilities. Raises NotFiniteError if a row's logits were not
        finite."""
        if self.arrival is not None:
            self.arrival.synchronize()
        tokens, logprobs = self.values.tolist()
        # A log-probability is finite exactly if the logits are: see `sample`.
        if not all(map(math.isfinite, logprobs)):
            what = "the model produced NaN or infinite logits"
            raise NotFiniteError(f"{what}; lower the learning rate or use precision 32-true")
        return list(map(int, tokens)), logprobs
