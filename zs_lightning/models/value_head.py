"""A critic on the policy's base model. B rows, T tokens, K trained tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zs_lightning.models.logprobs import trained_states

ADAPTER = "critic"
"""peft's name of the critic's adapter; also the first part of the names of its other weights."""


def of_critic(name: str) -> bool:
    """Whether a weight of this name is the critic's and not the policy's."""
    return ADAPTER in name.split(".")


@contextmanager
def trained_as_before(model: Any) -> Iterator[None]:
    """Whichever adapter is switched on or off inside, the same weights are trained afterwards.

    peft makes the adapter that it switches on trainable and freezes all others.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def adapter_in_use(model: Any, name: str) -> Iterator[None]:
    """Another adapter of the model than the active one, inside; the same weights are trained as before, also inside."""
    before = str(model.active_adapter)
    with trained_as_before(model):
        with trained_as_before(model):
            model.set_adapter(name)
        try:
            yield
        finally:
            model.set_adapter(before)


class ValueModel(torch.nn.Module):
    """The value of the state that each trained token was sampled in: an adapter like the policy's, and a linear head.

    A fresh one says 0 for every state.

    Args:
        model: a PEFT model in whose adapter the policy is; it gets a second adapter.
        seed: of the adapter.
    """

    def __init__(self, model: Any, seed: int) -> None:
        super().__init__()
        # In a list: the model and the adapters on it are in the module tree as the policy's.
        self._model = [model]
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # noqa: TID251
            model.add_adapter(ADAPTER, copy.deepcopy(model.peft_config[str(model.active_adapter)]))
        for name, parameter in model.named_parameters():
            if of_critic(name):
                parameter.requires_grad_(True)
        head = model.get_base_model().get_output_embeddings().weight
        self.weight = torch.nn.Parameter(torch.zeros(head.shape[-1], device=head.device))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Forward passes in this context are the critic's; so must be their backward passes, which may compute them again."""
        with adapter_in_use(self._model[0], ADAPTER):
            yield

    def forward(self, input_ids: Tensor, loss_mask: Tensor) -> Tensor:
        """[K] float32, row by row; the arguments are those of token_logprobs. Only in `in_use`."""
        states = trained_states(self._model[0], input_ids, loss_mask)
        with torch.autocast(states.device.type, enabled=False):  # In bfloat16 a value near 1 would be off by 0.004.
            return states.to(self.weight.dtype) @ self.weight
