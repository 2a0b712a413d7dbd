"""Several LoRA adapters of one base in one batch: each row of a forward pass uses its own.

The adapters are concatenated along the rank and a row's mask keeps only its own part: y = W x + B (mask · A x). That costs
what one adapter costs, has static shapes and no loop over adapters. Layers that read the same x share one product A x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zs_lightning.engine.transfer import upload

TOGETHER = {"q_proj": "read", "k_proj": "read", "v_proj": "read", "gate_proj": "up", "up_proj": "up"}
"""Layers of a block that get the same input, as most families name them. Others are multiplied one by one."""


class MixedAdapters:
    """A context manager that lets a PEFT model run with a different LoRA adapter for each row.

    On entry the adapters' weights are copied as they are at that moment, in the precision of an autocast that is then in
    force; on exit the model is as it was.

    Args:
        model: a PEFT model with all the adapters on it.
        names: the adapters; a row may also use none, which is called "".

    Raises:
        ValueError: an adapter is missing, or is more than two matrices (DoRA, biases, embeddings).
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        from peft.tuners.lora import LoraLayer

        for name in names:
            config = getattr(model, "peft_config", {}).get(name)
            if config is None:
                there = ", ".join(getattr(model, "peft_config", {})) or "none"
                raise ValueError(f"adapters: the model has no adapter called {name!r}; it has {there}")
            if config.use_dora or config.lora_bias or config.modules_to_save or config.bias != "none":
                raise ValueError(
                    f"adapters: {name!r} is not plain LoRA (DoRA, biases or whole modules), so it cannot share a batch with "
                    "another adapter; give the simulator a model of its own"
                )
        self.names = list(names)
        self.groups: dict[str, list[Any]] = {}
        for path, module in model.named_modules():
            if isinstance(module, LoraLayer) and any(name in module.lora_A for name in names):
                block, _, kind = path.rpartition(".")
                self.groups.setdefault(f"{block}.{TOGETHER.get(kind, kind)}", []).append(module)
        self.layers = [layer for group in self.groups.values() for layer in group]
        if any(len(module.lora_embedding_A) for module in self.layers):
            raise ValueError(
                "adapters: an adapter on the embedding cannot share a batch; leave the embedding out of its targets"
            )
        ranks = [max(layer.r[name] for layer in self.layers if name in layer.lora_A) for name in self.names]
        # One row for each adapter and a last one, all zeros, for none.
        rows = [torch.full((rank,), float(i)) for i, rank in enumerate(ranks)]
        self.table = torch.cat(rows)[None] == torch.arange(len(ranks) + 1)[:, None]
        self.ranks, self.mask, self.entries = ranks, Tensor(), 0

    def __enter__(self) -> MixedAdapters:
        self.entries += 1
        for layers in self.groups.values():
            firsts, seconds = zip(*map(self._concatenated, layers), strict=True)
            inner = _Inner(self, torch.cat(firsts), len(layers))
            for part, (layer, second) in enumerate(zip(layers, seconds, strict=True)):
                layer.forward = _Forward(layer.base_layer, inner, part, second)
            self.table = self.table.to(inner.first.device, inner.first.dtype)
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            del layer.forward

    def _concatenated(self, layer: Any) -> tuple[Tensor, Tensor]:
        """A [R, in] and B [R, out] with the scales in B; zeros where an adapter leaves the layer out or has a lower rank."""
        given = next(layer.lora_A[name].weight for name in self.names if name in layer.lora_A)
        kind = given.device.type
        # Autocast would cast them again at every step, or keep the casts until it ends.
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else given.dtype
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


class _Inner:
    """mask · A x of layers that get the same x: computed for the first of them, forgotten after the last."""

    def __init__(self, adapters: MixedAdapters, first: Tensor, layers: int) -> None:
        self.adapters, self.first, self.layers = adapters, first, layers
        self.held: tuple[Tensor, Tensor] | None = None
        """States and what they gave, while layers still wait for it."""
        self.waiting: set[int] = set()

    def of(self, part: int, states: Tensor) -> Tensor:
        """[n, q, R] for one of the layers and its states [n, q, in]."""
        if self.held is None or states is not self.held[0] or part not in self.waiting:
            inner = functional.linear(states.to(self.first.dtype), self.first).unflatten(-1, (self.layers, -1))
            self.held = states, inner * self.adapters.mask[:, :, None]
            self.waiting = set(range(self.layers))
        self.waiting.remove(part)
        own = self.held[1][:, :, part]
        if not self.waiting:
            self.held = None
        return own


class _Forward:
    """What a LoRA layer does instead of its own forward."""

    def __init__(self, base: Any, inner: _Inner, part: int, second: Tensor) -> None:
        self.base, self.inner, self.part, self.second = base, inner, part, second
        self.quantised = hasattr(base.weight, "quant_state") or hasattr(base.weight, "CB")

    def __call__(self, states: Tensor) -> Tensor:
        """[n, q, in] to [n, q, out]; rounds where PEFT rounds."""
        result = self.base(states)
        inner = self.inner.of(self.part, states)
        if result.dtype == inner.dtype:
            # In place: the sum costs no pass of its own over the result.
            result.view(-1, result.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]), self.second)
            return result
        delta = inner @ self.second
        return result + delta.to(result.dtype) if self.quantised else (result + delta).to(result.dtype)
