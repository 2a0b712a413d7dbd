"""Weights of a model on a CPU in the layout in which oneDNN multiplies, while a generator steps."""

# torch multiplies with weights as they lie, in float32 by MKL. For the few rows of a decoding step
# that was up to three times as slow on an AMD EPYC, most of all the product with the vocabulary.
# The packed weights are copies, of models that are small enough to be run on a CPU. Where memory is
# short they are given up: the generator is slower then, but has room for its rows. A training step
# needs the weights as they lie, so the copies are at work only inside of the context.

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zs_lightning.generation.kv_cache import host_bytes

LEAST = 3 << 16
"""Numbers in a weight; to multiply with fewer takes less time than the call of oneDNN."""
SHARE = 1 / 8
"""Share of memory that copies may take: of all, not of what is free, so that runs repeat."""


class Packing:
    """A context in which the large linear layers of a model on a CPU multiply by oneDNN.

    Copies are made at the first entry, and when weights or the precision of autocast have changed.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.layers: list[Any] = []
        for layer in model.modules() if device.type == "cpu" else ():
            # Not isinstance: quantised layers are linear ones too. LoRA's own are small.
            if type(layer) is torch.nn.Linear and layer.weight.numel() >= LEAST and supported(layer.weight.dtype):
                self.layers.append(layer)
        self.bytes = sum(layer.weight.nbytes for layer in self.layers)
        if self.bytes > SHARE * host_bytes():
            self.give_up()
        self.products: list[tuple[Any, Callable[[Tensor], Tensor]]] = []
        self.state: Any = None

    def give_up(self) -> None:
        """Makes no copies, if called before the first entry."""
        self.layers, self.bytes = [], 0

    def __enter__(self) -> None:
        # torch counts writes to a weight; a loaded checkpoint may be another tensor.
        weights = [layer.weight for layer in self.layers]
        state = [(multiplied_in(w), w.data_ptr(), w._version) for w in weights]
        if state != self.state:
            self.products = []  # The old copies go before the new ones come.
            for layer, (dtype, *_) in zip(self.layers, state, strict=True):
                if supported(dtype):
                    self.products.append((layer, _packed(layer, dtype)))
            self.state = state
        for layer, product in self.products:
            layer.forward = product

    def __exit__(self, *_: object) -> None:
        for layer, _product in self.products:
            del layer.forward

    def forget(self) -> None:
        """Makes the copies anew at the next entry: torch does not count writes to `.data`."""
        self.state = None


def multiplied_in(weight: Tensor) -> torch.dtype:
    """The type of a product with the weight: an autocast's, where one is in force."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def supported(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies packed weights of this type here."""
    onednn = torch.backends.mkldnn
    if not (onednn.is_available() and onednn.enabled and torch.backends.mkl.is_available()):
        return False
    # bfloat16 takes a processor with AVX-512 or its like.
    short = dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 or short


def _packed(layer: torch.nn.Linear, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What a linear layer does instead of its own forward: it takes [..., in] to [..., out]."""
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype), None)
    multiply: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
    return lambda states: multiply(states.to(dtype), weight, bias, "none", [], "")
