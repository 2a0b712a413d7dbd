"""Log-probabilities of trained tokens. B rows, T tokens, K trained tokens, V vocabulary."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

CHUNK = 1024
"""Tokens whose logits [CHUNK, V] exist at the same time."""


def token_logprobs(model: Any, input_ids: Tensor, loss_mask: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each trained token given what is before it, and the entropy there.

    Args:
        input_ids: [B, T] int64, padded on the right with any token.
        loss_mask: [B, T] bool, True where a token is trained; the first column cannot be.
        temperature: temperature of the sampling distribution; 0 counts as 1.

    Returns:
        Log-probabilities [K] with gradient and entropies [K] without, in nats, row by row.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    states = trained_states(base, input_ids, loss_mask)
    targets = input_ids[:, 1:][loss_mask[:, 1:]]
    if not len(targets):
        none = states.new_zeros(0, dtype=torch.float32)
        return states.sum() * none, none
    # The head runs on trained tokens only, in chunks that are computed again in the backward pass:
    # logits of a whole micro-batch would take far more memory than the model.
    logprobs: list[Tensor] = []
    entropies: list[Tensor] = []
    for i in range(0, len(targets), CHUNK):
        part = (head, states[i : i + CHUNK], targets[i : i + CHUNK], temperature or 1.0)
        chunk = checkpoint(head_logprobs, *part, entropies, i // CHUNK, use_reentrant=False)
        logprobs.append(chunk)
    return torch.cat(logprobs), torch.cat(entropies)


def trained_states(model: Any, input_ids: Tensor, loss_mask: Tensor) -> Tensor:
    """Last hidden states [K, H] before each trained token; arguments as in token_logprobs."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # No mask: padding is behind every token that counts, and causal attention is faster without.
    states = base.get_decoder()(input_ids=input_ids[:, :-1], use_cache=False).last_hidden_state
    return states[loss_mask[:, 1:]]


def head_logprobs(
    head: Any, states: Tensor, targets: Tensor, temperature: float, entropies: list[Tensor], number: int
) -> Tensor:
    """Log-probabilities [k] of chunk `number`: states [k, H], targets [k] int64."""
    logits = head(states).float()
    logprobs = functional.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
    # This runs again in the backward pass, when the chunk's entropies are known.
    if number == len(entropies):
        with torch.no_grad():
            entropies.append(-(logprobs.exp() * logprobs).sum(-1))
    return logprobs.gather(1, targets[:, None])[:, 0]
