"""Several LoRA adapters of one base in one batch: each row of a forward pass uses its own.

The adapters are concatenated along the rank and a row's mask keeps only its own part: y = W x + B (mask · A x). That costs
what one adapter costs, has static shapes and no loop over adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zs_lightning.errors import UserError
from zs_lightning.generation.packing import multiplied_in
from zs_lightning.generation.transfer import upload


class MixedAdapters:
    """A context manager that lets a PEFT model run with a different LoRA adapter for each row.

    On entry the adapters' weights are copied as they are at that moment, in the precision of an autocast that is then in
    force; on exit the model is as it was.

    Args:
        model: a PEFT model with all the adapters on it.
        names: the adapters; a row may also use none, which is called "".

    Raises:
        UserError: an adapter is missing, or is more than two matrices (DoRA, biases, embeddings).
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        from peft.tuners.lora import LoraLayer

        for name in names:
            config = getattr(model, "peft_config", {}).get(name)
            if config is None:
                there = ", ".join(getattr(model, "peft_config", {})) or "none"
                raise UserError(f"adapters: the model has no adapter called {name!r}; it has {there}")
            if config.use_dora or config.lora_bias or config.modules_to_save or config.bias != "none":
                raise UserError(
                    f"adapters: {name!r} is not plain LoRA (DoRA, biases or whole modules), so it cannot share a batch with "
                    "another adapter; give the simulator a model of its own"
                )
        self.names = list(names)
        self.layers: list[Any] = [
            module for module in model.modules() if isinstance(module, LoraLayer) and any(n in module.lora_A for n in names)
        ]
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        if any(isinstance(end, LoraLayer) and any(n in end.lora_A or n in end.lora_embedding_A for n in names) for end in ends):
            raise UserError(
                "adapters: one on embeddings or vocabulary head cannot share a batch; leave these out of its targets"
            )
        ranks = [max(layer.r[name] for layer in self.layers if name in layer.lora_A) for name in self.names]
        # One row for each adapter and a last one, all zeros, for none.
        rows = [torch.full((rank,), float(i)) for i, rank in enumerate(ranks)]
        self.table = torch.cat(rows)[None] == torch.arange(len(ranks) + 1)[:, None]
        self.ranks, self.mask, self.entries = ranks, Tensor(), 0

    def __enter__(self) -> MixedAdapters:
        self.entries += 1
        for layer in self.layers:
            first, second = self._concatenated(layer)
            layer.forward = _Forward(self, layer.base_layer, first, second)
            self.table = self.table.to(first.device, first.dtype)
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            del layer.forward

    def _concatenated(self, layer: Any) -> tuple[Tensor, Tensor]:
        """A [R, in] and B [R, out] with the scales in B; zeros where an adapter leaves the layer out or has a lower rank."""
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
        """The adapter of each row of the next forward passes; "" for none."""
        self.mask = self.masks(names)

    def masks(self, names: Sequence[str]) -> Tensor:
        """What each row uses of the concatenated ranks, [n, 1, R]."""
        numbers = [self.names.index(name) if name else len(self.names) for name in names]
        return self.table[upload(numbers, self.table.device)][:, None]


class _Forward:
    """What a LoRA layer does instead of its own forward."""

    def __init__(self, adapters: MixedAdapters, base: Any, first: Tensor, second: Tensor) -> None:
        self.adapters, self.base, self.first, self.second = adapters, base, first, second
        self.quantised = hasattr(base.weight, "quant_state") or hasattr(base.weight, "CB")

    def __call__(self, states: Tensor) -> Tensor:
        """[n, q, in] to [n, q, out]; rounds where PEFT rounds."""
        result = self.base(states)
        inner = functional.linear(states.to(self.first.dtype), self.first) * self.adapters.mask
        if result.dtype == inner.dtype:
            # In place: the sum costs no pass of its own over the result.
            result.view(-1, result.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]), self.second)
            return result
        delta = inner @ self.second
        return result + delta.to(result.dtype) if self.quantised else (result + delta).to(result.dtype)
