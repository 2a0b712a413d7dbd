"""Weights of a model on a CPU in the layout in which oneDNN multiplies, for as long as a generator generates.

torch multiplies with the weights as they lie, in float32 by MKL. For the few rows of a decoding step that was up to three
times as slow on an AMD EPYC, for the wide product with the vocabulary above all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zs_lightning.generation.slots import host_bytes

LEAST = 3 << 16
"""Numbers in a weight. The product with a smaller one is so short that to call oneDNN costs about what it saves."""
SHARE = 1 / 8
"""Of the memory that the copies may take; of all, not of what is free, so that runs stay reproducible."""


class Packing:
    """A context manager in which the large linear layers of a model multiply by oneDNN. Elsewhere than on a CPU: no layers.

    The copies are made at the first entry, and again when weights or the precision of autocast have changed.

    Args:
        model: its layers that are quantised, LoRA's own small ones, or of a type that oneDNN does not multiply here, stay
            as they are.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.layers: list[Any] = []
        if device.type == "cpu":
            linear = [module for module in model.modules() if type(module) is torch.nn.Linear]
            self.layers = [layer for layer in linear if layer.weight.numel() >= LEAST and supported(layer.weight.dtype)]
        self.bytes = sum(layer.weight.nbytes for layer in self.layers)
        if self.bytes > SHARE * host_bytes():
            self.give_up()
        self.products: list[tuple[Any, _Product]] = []
        self.state: Any = None

    def give_up(self) -> None:
        """No copies, before the first entry."""
        self.layers, self.bytes = [], 0

    def __enter__(self) -> None:
        weights = [layer.weight for layer in self.layers]
        state = [(multiplied_in(weight), weight.data_ptr(), weight._version) for weight in weights]
        if state != self.state:
            self.products = []  # The old copies go before the new ones come.
            for layer, (dtype, *_) in zip(self.layers, state, strict=True):
                if supported(dtype):
                    self.products.append((layer, _Product(layer, dtype)))
            self.state = state
        for layer, product in self.products:
            layer.forward = product

    def __exit__(self, *_: object) -> None:
        for layer, _product in self.products:
            del layer.forward

    def forget(self) -> None:
        """Makes the copies anew at the next entry: for weights that were written past torch's notice, as in `.data`."""
        self.state = None


def multiplied_in(weight: Tensor) -> torch.dtype:
    """The type of a product with the weight: an autocast's, where one is in force."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def supported(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies packed weights of this type here: bfloat16 with AVX-512 or its like only."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and torch.backends.mkl.is_available()):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


class _Product:
    """What a linear layer does instead of its own forward."""

    def __init__(self, layer: torch.nn.Linear, dtype: torch.dtype) -> None:
        self.dtype, self.bias = dtype, None if layer.bias is None else layer.bias.detach().to(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype), None)

    def __call__(self, states: Tensor) -> Tensor:
        """[…, in] to […, out]."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(states.to(self.dtype), self.weight, self.bias, "none", [], "")
        return product
