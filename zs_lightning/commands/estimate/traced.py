"""What a pass through a model holds in memory, read off the real code on tensors without data."""

import copy
import weakref
from collections.abc import Callable, Iterable
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
from zs_lightning.models.specs import LoraSpec, ModelSpec, without_code

UNMASKED = "sdpa_unmasked"


@dataclass(frozen=True)
class Pass:
    """Bytes of a forward and backward pass, beside weights and gradients."""

    saved: int
    """Kept from the forward for the backward pass."""
    peak: int


def shallow(path: str, layers: int) -> Any:
    """The configuration of a model with its first layers alone."""
    # It is changed here, and others ask for it too.
    config = copy.deepcopy(architecture(path))
    config.num_hidden_layers = min(layers, config.num_hidden_layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def build(path: str, dtype: str, layers: int) -> Any:
    """The model with its first layers and with shapes only."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

    config = shallow(path, layers)
    options = {"dtype": getattr(torch, dtype), "attn_implementation": UNMASKED}
    AttentionInterface.register(UNMASKED, attention.grouped_attention)
    AttentionMaskInterface.register(UNMASKED, _no_mask)
    with torch.device("meta"):
        return without_code(AutoModelForCausalLM.from_config, config, **options).eval()


def _no_mask(*_: Any, **__: Any) -> None:
    """A pass without padding needs no mask. But of tensors without data transformers cannot know
    that, and would make one of [tokens, tokens]."""


def optimizer_bytes(make: Callable[[Any], Any], dtype: torch.dtype, trained: int) -> int:
    """State after a step, in proportion to `trained` bytes of weights; `make` makes an optimiser of
    a list of weights, of which one small one is asked."""
    weight = torch.nn.Parameter(torch.zeros(256, 256, dtype=dtype))
    weight.grad = torch.zeros_like(weight)
    optimizer = make([weight])
    optimizer.step()
    held = 0
    for state in optimizer.state.values():
        # Counters of steps do not grow with the weights.
        held += sum(t.nbytes for t in state.values() if isinstance(t, Tensor) and t.numel() > 1)
    return round(held / weight.nbytes * trained)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations under it make and that are still held, but for
    those of the `known` tensors."""

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
        # A view has the storage of what it is a view of.
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
    """Forward and backward over `tokens` tokens."""
    layers = architecture(spec.path).num_hidden_layers
    options = (spec, lora, tokens, checkpointing, precision)
    if layers <= 3:
        return _traced(layers, *options)
    # Layers are alike, so two depths tell any depth.
    two = _traced(2, *options)
    three = _traced(3, *options)
    saved = two.saved + (layers - 2) * (three.saved - two.saved)
    return Pass(saved, two.peak + (layers - 2) * (three.peak - two.peak))


def _traced(
    layers: int,
    spec: ModelSpec,
    lora: LoraSpec | None,
    tokens: int,
    checkpointing: bool,
    precision: str,
) -> Pass:
    from torch._subclasses.fake_tensor import FakeTensorMode

    base = model = build(spec.path, spec.dtype, layers)
    if lora is not None:
        with torch.device("meta"):
            model = add_lora(model, lora, 0)
        base = model.get_base_model()
    if checkpointing:
        recompute_activations(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        base.tie_weights()
        known = [*model.parameters(), *model.buffers()]
        # As from the second micro-batch on: gradients are there and are added to.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                known.append(parameter.grad)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        cast = AUTOCAST[precision]
        with LiveBytes(known) as live, torch.autocast("cpu", cast, enabled=cast is not None):
            states = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            # The head works chunk by chunk, and keeps nothing but its inputs.
            saved = live.now
            part = (base.get_output_embeddings(), states[0, :CHUNK], ids[0, :CHUNK], 1.0)
            logprobs = checkpoint(head_logprobs, *part, [], 0, use_reentrant=False)
            logprobs.sum().backward()
    return Pass(saved, live.peak)


@cache
def prefill_bytes(path: str, dtype: str, tokens: int) -> int:
    """Most that a forward pass without gradient takes. A layer's states are freed before the next
    one's are made, so two layers stand for all."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = build(path, dtype, 2)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model.to_empty(device="cpu")
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            ids = torch.zeros(1, tokens, dtype=torch.long)
            model.get_decoder()(input_ids=ids, use_cache=False)
    return live.peak
