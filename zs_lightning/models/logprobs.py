"""Log-probabilities of trained tokens. B rows, T tokens, K trained tokens, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

CHUNK = 1024
"""Tokens whose logits [CHUNK, V] exist at the same time."""


def token_logprobs(model: Any, input_ids: Tensor, loss_mask: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each trained token given what is before it, and the entropy at its place.

    The vocabulary head runs on trained tokens only, in chunks that are recomputed in the backward pass.

    Args:
        input_ids: [B, T] int64, padded on the right with any token.
        loss_mask: [B, T] bool, True where input_ids[b, t] is trained; the first column cannot be.
        temperature: of the sampling distribution.

    Returns:
        Log-probabilities [K] with gradient and entropies [K] without, in nats, row by row.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    states, targets = trained_states(base, input_ids, loss_mask), input_ids[:, 1:][loss_mask[:, 1:]]
    if not len(targets):
        none = states.new_zeros(0, dtype=torch.float32)
        return states.sum() * none, none
    logprobs: list[Tensor] = []
    entropies: list[Tensor] = []
    for i in range(0, len(targets), CHUNK):
        part = (head, states[i : i + CHUNK], targets[i : i + CHUNK], temperature or 1.0)
        logprobs.append(checkpoint(head_logprobs, *part, entropies, i // CHUNK, use_reentrant=False))
    return torch.cat(logprobs), torch.cat(entropies)


def trained_states(model: Any, input_ids: Tensor, loss_mask: Tensor) -> Tensor:
    """Last hidden states [K, H] before each trained token, row by row; the arguments are those of token_logprobs."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # No mask: padding is behind every token that counts, and causal attention without one is faster.
    states = base.get_decoder()(input_ids=input_ids[:, :-1], use_cache=False).last_hidden_state
    return states[loss_mask[:, 1:]]


def head_logprobs(
    head: Any, states: Tensor, targets: Tensor, temperature: float, entropies: list[Tensor], number: int
) -> Tensor:
    """Log-probabilities [k] of one chunk; its entropies [k] are appended when it runs for the first time."""
    logits = head(states).float()
    logprobs = functional.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
    if number == len(entropies):
        with torch.no_grad():
            entropies.append(-(logprobs.exp() * logprobs).sum(-1))
    return logprobs.gather(1, targets[:, None])[:, 0]
