"""Log-probabilities of trained tokens. B rows, T tokens, K trained tokens, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

CHUNK = 1024
"""Tokens whose logits [CHUNK, V] exist at the same time."""


def token_logprobs(
    model: Any, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each trained token given what is before it, and the entropy at its place.

    The vocabulary head runs on trained tokens only, in chunks that are recomputed in the backward pass.

    Args:
        input_ids: [B, T] int64.
        attention_mask: [B, T] bool, True on a prefix of each row.
        loss_mask: [B, T] bool, True where input_ids[b, t] is trained; the first column cannot be.
        temperature: of the sampling distribution.

    Returns:
        Log-probabilities [K] with gradient and entropies [K] without, in nats, row by row.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    states = decoder(input_ids=input_ids[:, :-1], attention_mask=attention_mask[:, :-1], use_cache=False).last_hidden_state
    trained = loss_mask[:, 1:]
    states, targets = states[trained], input_ids[:, 1:][trained]
    parts = [
        checkpoint(_head_logprobs, head, states[i : i + CHUNK], targets[i : i + CHUNK], temperature, use_reentrant=False)
        for i in range(0, len(targets), CHUNK)
    ]
    if not parts:
        none = states.new_zeros(0, dtype=torch.float32)
        return states.sum() * none, none
    return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([entropy for _, entropy in parts])


def _head_logprobs(head: Any, states: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logprobs = functional.log_softmax(head(states).float() / (temperature or 1.0), dim=-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy
