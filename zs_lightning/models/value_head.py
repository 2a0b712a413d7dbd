"""The critic's head, and its adapter on the policy's base model: B rows, T tokens, K trained."""

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
    """Whichever adapter is switched on or off inside, the same weights are trained afterwards."""
    # peft makes the adapter that it switches on trainable and freezes all others.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def adapter_in_use(model: Any, name: str) -> Iterator[None]:
    """Another adapter is active inside; the weights that were trained before stay so."""
    before = str(model.active_adapter)
    # Twice: inside they must be trainable again, and after the way back once more.
    with trained_as_before(model):
        with trained_as_before(model):
            model.set_adapter(name)
        try:
            yield
        finally:
            model.set_adapter(before)


class ValueModel(torch.nn.Module):
    """Values of the states that trained tokens were sampled in; of a fresh one all are 0.

    It is a second adapter on the PEFT model in whose adapter the policy is, with weights drawn by
    the seed, and a linear head.
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
        """Forward passes in this context are the critic's."""
        # So must be their backward passes, which may compute them again.
        with adapter_in_use(self._model[0], ADAPTER):
            yield

    def forward(self, input_ids: Tensor, loss_mask: Tensor) -> Tensor:
        """Values [K] float32, row by row, of input_ids [B, T] and loss_mask [B, T] as in
        token_logprobs. Only in `in_use`."""
        states = trained_states(self._model[0], input_ids, loss_mask)
        # In bfloat16 a value near 1 would be off by 0.004.
        with torch.autocast(states.device.type, enabled=False):
            return states.to(self.weight.dtype) @ self.weight
