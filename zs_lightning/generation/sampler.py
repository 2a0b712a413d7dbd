"""Draws tokens. Shapes: n rows, V vocabulary."""

# A draw is a function of (seed of the row, position of the token) alone: not of the batch, the slot
# or the rank. So the same rollouts come out however rows are scheduled. torch's generators cannot
# do that, since their numbers depend on what was drawn before; here each number is made from its
# place by the mixing function of splitmix64.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zs_lightning.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a row's tokens are drawn.

    Args:
        temperature: 0 is greedy decoding.
        top_p: keep the most likely tokens that make up this probability.
        top_k: keep this many most likely tokens; 0 keeps all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UserError(f"sampling: expected temperature >= 0, 0 < top_p <= 1 and top_k >= 0; got {self}")


def upload(values: list[Any], device: torch.device) -> Tensor:
    """A tensor on the device: [n] of n numbers, or [m, n] of m lists of n."""
    # To a card it goes from pinned memory: a copy from other memory would make the host wait until
    # the card has done all that was launched before.
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@dataclass(frozen=True)
class Settings:
    """How each row of a batch is drawn: tensors [n] on its device, and what is in them."""

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    # Known on the host, where it decides what is computed at all: to ask the tensors would be to
    # wait for the card.
    all_greedy: bool
    some_greedy: bool
    scaled: bool
    """Whether any row has a temperature other than 0 and 1."""
    truncated: bool
    """Whether any row has top-p or top-k."""

    @classmethod
    def of(cls, rows: Sequence[Sampling], device: torch.device) -> Settings:
        # A batch has many rows of very few kinds.
        kinds = set(rows)
        greedy = {kind.temperature == 0 for kind in kinds}
        numbers = upload([[row.temperature, row.top_p, row.top_k] for row in rows], device)
        temperature, top_p, top_k = numbers.float().unbind(1)
        return cls(
            temperature,
            top_p,
            top_k.long(),
            all_greedy=greedy == {True},
            some_greedy=True in greedy,
            scaled=any(kind.temperature not in (0, 1) for kind in kinds),
            truncated=any(kind.top_p < 1 or kind.top_k > 0 for kind in kinds),
        )


# splitmix64's constants as int64, which torch can hold.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """[n] int64 shifted logically: torch's own shift keeps the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def counter_uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Numbers in [0, 1), [n] float64: splitmix64 of seeds and positions, both [n] int64."""
    # int64 overflows silently and alike on all devices: this is arithmetic modulo 2**64.
    state = seeds + positions * _GOLDEN
    state = (state ^ _shift_right(state, 30)) * _FIRST
    state = (state ^ _shift_right(state, 27)) * _SECOND
    state = state ^ _shift_right(state, 31)
    return _shift_right(state, 11).double() * 2.0**-53


def truncate(logits: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Logits [n, V] with all outside top_p [n] and top_k [n] int64 (0 keeps all) at -inf."""
    ordered, order = logits.sort(dim=-1, descending=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, logits.shape[-1])
    probability = ordered.softmax(-1)
    # A token stays while the more likely ones have not reached top_p yet, so that the most likely
    # one always stays.
    outside = (rank >= limit[:, None]) | (probability.cumsum(-1) - probability >= top_p[:, None])
    return logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), float("-inf"))


def sample(logits: Tensor, settings: Settings, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Draws one token a row.

    Args:
        logits: [n, V].
        seeds: [n] int64, and positions [n] int64, where the tokens will stand.

    Returns:
        Tokens [n] int64 and log-probabilities [n] float32 (of greedy rows at temperature 1).
    """
    # Nothing is read on the host. The log-probability is that under softmax(logits / temperature),
    # the distribution that is trained, whatever top-k and top-p cut off. It is finite exactly if
    # the row's logits are, minus infinity among them allowed: `Launched` refuses the others.
    scaled = logits.float()
    if settings.scaled:
        temperature = settings.temperature
        temperature = torch.where(temperature == 0, torch.ones_like(temperature), temperature)
        scaled = scaled / temperature[:, None]
    total = scaled.logsumexp(-1)
    if settings.all_greedy:
        tokens = scaled.argmax(-1)
    else:
        kept = truncate(scaled, settings.top_p, settings.top_k) if settings.truncated else scaled
        # The inverse of the distribution function, in float64: with a vocabulary of 150,000 the
        # sums of float32 would end visibly below or above 1.
        cumulative = kept.softmax(-1).double().cumsum(-1)
        target = counter_uniform(seeds, positions) * cumulative[:, -1]
        tokens = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
        if settings.some_greedy:
            tokens = torch.where(settings.temperature == 0, scaled.argmax(-1), tokens)
    return tokens, scaled.gather(1, tokens[:, None])[:, 0] - total
