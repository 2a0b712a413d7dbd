"""What a model and its training pass hold in memory, read off the real code on tensors without data."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from zs_lightning.commands.estimate.architectures import architecture
from zs_lightning.models import attention
from zs_lightning.models.checks import AUTOCAST
from zs_lightning.models.loading import recompute_activations
from zs_lightning.models.logprobs import CHUNK, head_logprobs
from zs_lightning.models.lora import add_lora
from zs_lightning.models.specs import LoraSpec, ModelSpec

UNMASKED = "sdpa_unmasked"


@dataclass(frozen=True)
class Pass:
    """Bytes of a forward and backward pass, beside weights and gradients."""

    saved: int
    """Kept from the forward for the backward pass."""
    peak: int


def build(config: Any, dtype: str) -> Any:
    """The model with shapes only."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

    AttentionInterface.register(UNMASKED, attention.grouped_attention)
    AttentionMaskInterface.register(UNMASKED, _no_mask)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=UNMASKED).eval()


def _no_mask(*_: Any, **__: Any) -> None:
    """A pass without padding needs none, but for tensors without data transformers would make one of [tokens, tokens]."""


def with_adapter(model: Any, lora: LoraSpec) -> Any:
    with torch.device("meta"):
        return add_lora(model, lora, 0)


def trainable(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def optimizer_bytes(make: Callable[[Any], Any], dtype: torch.dtype, trained: int) -> int:
    """State after a step, in proportion to `trained` bytes of weights, from a step on one small weight.

    Args:
        make: an optimiser of a list of weights.
    """
    weight = torch.nn.Parameter(torch.zeros(256, 256, dtype=dtype))
    weight.grad = torch.zeros_like(weight)
    optimizer = make([weight])
    optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return round(size(tensor for tensor in held if tensor.numel() > 1) / weight.nbytes * trained)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations under it make and that are still held.

    Args:
        known: tensors that do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.held = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage: Any) -> None:
        if storage._cdata not in self.held:
            self.held.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key: int, count: int) -> None:
        self.held.discard(key)
        self.now -= count


@cache
def training_pass(spec: ModelSpec, lora: LoraSpec | None, tokens: int, checkpointing: bool, precision: str) -> Pass:
    """Forward and backward over `tokens` tokens. Layers are alike, so two depths tell any depth."""
    config = architecture(spec.path)
    layers = config.num_hidden_layers

    def measure(depth: int) -> Pass:
        return _traced(shortened(config, depth), spec, lora, tokens, checkpointing, precision)

    if layers <= 3:
        return measure(layers)
    two, three = measure(2), measure(3)
    more = layers - 2
    return Pass(two.saved + more * (three.saved - two.saved), two.peak + more * (three.peak - two.peak))


def shortened(config: Any, layers: int) -> Any:
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def _traced(config: Any, spec: ModelSpec, lora: LoraSpec | None, tokens: int, checkpointing: bool, precision: str) -> Pass:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = build(config, spec.dtype)
    if lora is not None:
        model = with_adapter(model, lora)
    base = model.get_base_model() if lora is not None else model
    if checkpointing:
        recompute_activations(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        base.tie_weights()
        # As from the second micro-batch on: gradients are there and are added to.
        for parameter in trainable(model):
            parameter.grad = torch.empty_like(parameter)
        known = [*model.parameters(), *model.buffers(), *(p.grad for p in trainable(model) if p.grad is not None)]
        ids = torch.zeros(1, tokens, dtype=torch.long)
        with LiveBytes(known) as live, _autocast(precision):
            states = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            saved = live.now
            part = (base.get_output_embeddings(), states[0, :CHUNK], ids[0, :CHUNK], 1.0)
            checkpoint(head_logprobs, *part, [], 0, use_reentrant=False).sum().backward()
    return Pass(saved, live.peak)


def _autocast(precision: str) -> AbstractContextManager[Any]:
    dtype = AUTOCAST[precision]
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


@cache
def prefill_bytes(path: str, dtype: str, tokens: int) -> int:
    """Most that a forward pass without gradient takes; a layer's states are freed before the next one's are made."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = architecture(path)
    model = build(shortened(config, min(2, config.num_hidden_layers)), dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model.to_empty(device="cpu")
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            model.get_decoder()(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    return live.peak
