"""Draws tokens. The draw is a function of (seed of the row, position): not of the batch, the slot or the rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zs_lightning.errors import UserError
from zs_lightning.generation.transfer import upload


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


@dataclass(frozen=True)
class Settings:
    """How each row of a batch is drawn: tensors [n] on its device, and what they hold.

    The latter is known on the host: to read it from a card's tensors would wait for the card.
    """

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    all_greedy: bool
    some_greedy: bool
    scaled: bool
    """Whether any row has a temperature other than 0 and 1."""
    truncated: bool
    """Whether any row has top-p or top-k."""

    @classmethod
    def of(cls, rows: Sequence[Sampling], device: torch.device) -> Settings:
        kinds = {id(row): row for row in rows}.values()
        temperature, top_p = upload([[row.temperature for row in rows], [row.top_p for row in rows]], device).float()
        return cls(
            temperature,
            top_p,
            upload([row.top_k for row in rows], device),
            all_greedy=all(kind.temperature == 0 for kind in kinds),
            some_greedy=any(kind.temperature == 0 for kind in kinds),
            scaled=any(kind.temperature not in (0, 1) for kind in kinds),
            truncated=any(kind.top_p < 1 or kind.top_k > 0 for kind in kinds),
        )


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch can hold."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN, _FIRST, _SECOND = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own keeps the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def counter_uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """splitmix64 of (seed, position) as a float64 in [0, 1). Both arguments [n] int64."""
    state = seeds + positions * _GOLDEN
    state = (state ^ _shift_right(state, 30)) * _FIRST
    state = (state ^ _shift_right(state, 27)) * _SECOND
    state = state ^ _shift_right(state, 31)
    return _shift_right(state, 11).double() * 2.0**-53


def truncate(logits: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Logits [n, V] with everything outside top-k and top-p at -inf. top_p [n] float, top_k [n] int64 (0: all)."""
    ordered, order = logits.sort(dim=-1, descending=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, logits.shape[-1])
    probability = ordered.softmax(-1)
    # A token stays while the more likely ones have not reached top_p yet, so the most likely one always stays.
    outside = (rank >= limit[:, None]) | (probability.cumsum(-1) - probability >= top_p[:, None])
    return logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), float("-inf"))


def sample(logits: Tensor, settings: Settings, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability under softmax(logits / temperature), the distribution that is trained.

    Nothing is read on the host. The log-probability of a row is finite exactly if its logits are (minus infinity among
    them is allowed): `Drawn` refuses the others.

    Args:
        logits: [n, V]; seeds, positions [n] int64.

    Returns:
        Tokens [n] int64 and log-probabilities [n] float32 (of greedy rows at temperature 1).
    """
    scaled = logits.float()
    if settings.scaled:
        greedy = settings.temperature == 0
        scaled = scaled / torch.where(greedy, torch.ones_like(settings.temperature), settings.temperature)[:, None]
    total = scaled.logsumexp(-1)
    if settings.all_greedy:
        tokens = scaled.argmax(-1)
    else:
        kept = truncate(scaled, settings.top_p, settings.top_k) if settings.truncated else scaled
        cumulative = kept.softmax(-1).double().cumsum(-1)
        target = counter_uniform(seeds, positions) * cumulative[:, -1]
        tokens = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
        if settings.some_greedy:
            tokens = torch.where(settings.temperature == 0, scaled.argmax(-1), tokens)
    return tokens, scaled.gather(1, tokens[:, None])[:, 0] - total
