"""Several LoRA adapters of one base in one batch: each row of a forward pass uses its own."""

# Putting adapters on a model is the business of models/lora.py; here they are only used.
# The adapters are concatenated along the rank R, and a row's mask keeps only its own part:
# y = W x + B (mask · A x). That costs what one adapter of rank R costs, has static shapes, as a
# CUDA graph needs them, and no loop over adapters. peft's own way runs each adapter on its rows.

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zs_lightning.generation.packing import multiplied_in
from zs_lightning.generation.sampler import upload


class MixedAdapters:
    """A context in which a PEFT model runs with a different LoRA adapter for each row.

    On entry the weights of the adapters are copied as they then are, in the precision of autocast;
    on exit the model is as it was. A row may also use none, which is called "".

    Raises ValueError for an adapter that is missing or not plain LoRA on layers of the decoder.
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        from peft.tuners.lora import LoraLayer

        there = getattr(model, "peft_config", {})
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        lora = [module for module in model.modules() if isinstance(module, LoraLayer)]
        for name in names:
            # To the user models/checks.check_mixable says so, before anything is loaded.
            if name not in there:
                raise ValueError(f"adapters: the model has no adapter called {name!r}; it has {', '.join(there) or 'none'}")
            config = there[name]
            # What variants such as DoRA and KaSA have besides A and B would be left out in silence.
            more = any(name in layer.lora_variant for layer in lora) or config.target_parameters
            more = more or config.lora_bias or config.modules_to_save or config.bias != "none"
            if more or any(name in getattr(end, "r", ()) for end in ends):
                raise ValueError(f"adapters: {name!r} is not plain LoRA on layers of the decoder")
        self.names = list(names)
        self.layers: list[Any] = [layer for layer in lora if set(names) & set(layer.lora_A)]
        self.ranks = [max(layer.r.get(name, 0) for layer in self.layers) for name in names]
        # Which ranks [R] are whose: a row for each adapter, and a last one, all False, for none.
        numbers = torch.arange(len(self.ranks) + 1)
        owners = numbers[:-1].repeat_interleave(torch.tensor(self.ranks))
        self.table = owners[None] == numbers[:, None]
        self.mask = Tensor()
        self.entries = 0

    def __enter__(self) -> MixedAdapters:
        self.entries += 1
        for layer in self.layers:
            first, second = self._concatenated(layer)
            layer.forward = partial(_forward, self, layer.base_layer, first, second)
            self.table = self.table.to(first.device, first.dtype)
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            del layer.forward

    def _concatenated(self, layer: Any) -> tuple[Tensor, Tensor]:
        """A [R, in] and B [R, out] of a layer, with the scales in B."""
        # Zeros stay where an adapter leaves the layer out or has a lower rank than elsewhere.
        given = next(layer.lora_A[name].weight for name in self.names if name in layer.lora_A)
        # Autocast would cast them again at every step, or keep the casts until it ends.
        dtype = multiplied_in(given)
        first = given.new_zeros(sum(self.ranks), layer.in_features, dtype=dtype)
        second = given.new_zeros(sum(self.ranks), layer.out_features, dtype=dtype)
        start = 0
        for name, rank in zip(self.names, self.ranks, strict=True):
            if name in layer.lora_A:
                own = slice(start, start + layer.r[name])
                first[own] = layer.lora_A[name].weight.detach()
                second[own] = layer.lora_B[name].weight.detach().t() * layer.scaling[name]
            start += rank
        return first, second

    def select(self, names: Sequence[str]) -> None:
        """Sets the adapter of each row of the next forward passes; "" is none."""
        self.mask = self.masks(names)

    def masks(self, names: Sequence[str]) -> Tensor:
        """What each of n rows uses of the concatenated ranks, [n, 1, R]."""
        numbers = [self.names.index(name) if name else len(self.names) for name in names]
        return self.table[upload(numbers, self.table.device)][:, None]


def own_adapter(model: Any, name: str) -> MixedAdapters | None:
    """For rows that all have this one: a card decodes a tenth faster than as peft does; or None."""
    try:
        return MixedAdapters(model, [name])
    except ValueError:  # There is none, or it is more than two matrices a layer.
        return None


def _forward(adapters: MixedAdapters, base: Any, first: Tensor, second: Tensor, states: Tensor) -> Tensor:
    """A LoRA layer with A [R, in] and B [R, out]: takes [n, q, in] to [n, q, out]."""
    result: Tensor = base(states)
    inner = functional.linear(states.to(first.dtype), first) * adapters.mask
    if result.dtype == inner.dtype:
        # In place: the sum costs no pass of its own over the result.
        result.view(-1, result.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]), second)
        return result
    # Rounded where PEFT rounds, which is elsewhere on quantised layers.
    delta = inner @ second
    if hasattr(base.weight, "quant_state") or hasattr(base.weight, "CB"):
        return result + delta.to(result.dtype)
    return (result + delta).to(result.dtype)
