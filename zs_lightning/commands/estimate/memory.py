"""What lies on each card, when: always, while rollouts are written, and while the model is updated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from zs_lightning.commands.estimate.architectures import architecture
from zs_lightning.commands.estimate.job import Job
from zs_lightning.commands.estimate.traced import (
    build,
    optimizer_bytes,
    prefill_bytes,
    shortened,
    size,
    trainable,
    training_pass,
    with_adapter,
)
from zs_lightning.generation.prefill import PREFILL_TOKENS
from zs_lightning.generation.slots import plan_slots, slot_bytes
from zs_lightning.models.sizes import weight_bytes
from zs_lightning.models.specs import LoraSpec, ModelSpec

SAMPLING = 16
"""Bytes for each row and word of the vocabulary: logits in fp32, sorted, and their cumulated probabilities."""


@dataclass(frozen=True)
class Item:
    """Something that takes memory."""

    what: str
    bytes: int
    note: str = ""


@dataclass
class Card:
    """What one device holds. Rollouts and updates take turns: the memory of one is given back before the other."""

    name: str
    capacity: int
    always: list[Item] = field(default_factory=list)
    rollout: list[Item] = field(default_factory=list)
    update: list[Item] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def lasting(self) -> int:
        return sum(item.bytes for item in self.always)

    @property
    def peak(self) -> int:
        return self.lasting + max(sum(item.bytes for item in phase) for phase in (self.rollout, self.update))

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity and not self.problems


@dataclass
class Plan:
    """The cards of a job, and how many rows of the policy and of the simulator are in its generators."""

    cards: list[Card]
    rows: int
    simulator_rows: int

    @property
    def fits(self) -> bool:
        return all(card.fits for card in self.cards)


def place(spec: ModelSpec) -> str:
    """The device, where auto and cuda are the first card."""
    return spec.device if spec.device == "cpu" or ":" in spec.device else "cuda:0"


def plan(job: Job, capacity: int) -> Plan:
    """The memory of a job on cards of `capacity` bytes each.

    Raises:
        UserError: a model's sizes are not known.
    """
    simulator = job.simulator
    own_model = simulator is not None and not simulator.shared
    home = place(job.model)
    away = place(simulator.model) if simulator is not None and own_model else home
    cards = {name: Card(name, capacity) for name in (home, away)}
    weights = _trained_weights(job)
    cards[home].always += _trained_model(job, weights)
    if simulator is not None:
        if own_model:
            cards[away].always.append(weights_item("simulator", simulator.model))
        if simulator.model.adapter and not (own_model and simulator.model.merges):
            base = simulator.model if own_model else job.model
            cards[away].always.append(_frozen_adapter(base, simulator.model.adapter))
    one_pass = training_pass(job.model, job.lora, job.tokens, job.checkpointing, job.precision)
    kept = "inputs of the layers" if job.checkpointing else "no checkpointing"
    cards[home].update += [
        Item("gradients", size(weights) * _adapters(job), f"for {_millions(weights)}{_twice(job)}"),
        Item("activations", one_pass.saved, f"{job.tokens} tokens in a pass; {kept}"),
        Item("logits, backward pass", one_pass.peak - one_pass.saved, "one layer or one chunk of the head at a time"),
    ]
    if simulator is not None and not own_model:
        both = _hold_rows(cards[home], job.model, job.slots + simulator.slots, max(job.length, simulator.length))
        rows, written = max(1, both - simulator.slots), min(both, simulator.slots)
    else:
        rows = written = _hold_rows(cards[home], job.model, job.slots, job.length)
    if simulator is not None and own_model:
        written = _hold_rows(cards[away], simulator.model, simulator.slots, simulator.length, "simulator's ")
    return Plan(list(cards.values()), rows, written)


def weights_item(whose: str, spec: ModelSpec) -> Item:
    """The weights of a base model, with what of them stays in full size."""
    model = build(architecture(spec.path), spec.dtype)
    count = sum(parameter.numel() for parameter in model.parameters())
    kind = spec.dtype if spec.quantization == "none" else f"{spec.quantization}, the rest {spec.dtype}"
    # bitsandbytes replaces linear layers only, and the experts of a mixture are stacked in one weight each.
    experts = size(parameter for parameter in model.parameters() if parameter.dim() > 2)
    if experts and spec.quantization != "none":
        kind += f", of which experts {experts / 1e9:.2f} GB"
    return Item(f"{whose}'s weights", weight_bytes(model, spec.quantization), f"{count / 1e9:.2f} B, {kind}")


@cache
def adapter_weights(path: str, dtype: str, lora: LoraSpec) -> list[torch.nn.Parameter]:
    """Of a fresh adapter, with shapes only. Layers are alike: those of the second one stand for all after it."""
    config = architecture(path)
    layers = config.num_hidden_layers
    model = with_adapter(build(shortened(config, min(2, layers)), dtype), lora)
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return [*named.values(), *[weight for name, weight in named.items() if ".1." in name] * (layers - 2)]


def _trained_weights(job: Job) -> list[torch.nn.Parameter]:
    if job.lora is None:
        return trainable(build(architecture(job.model.path), job.model.dtype))
    return adapter_weights(job.model.path, job.model.dtype, job.lora)


def _trained_model(job: Job, weights: list[torch.nn.Parameter]) -> Iterator[Item]:
    """What training keeps: the model, what is new in it, and the optimiser's state."""
    whose = "policy" if job.rollouts else "model"
    yield weights_item(whose, job.model)
    if job.lora is not None:
        yield Item(f"{whose}'s adapter", size(weights), f"{_millions(weights)}, rank {job.lora.r}")
        if job.critic:
            yield Item("critic's adapter", size(weights), f"{_millions(weights)}, rank {job.lora.r}")
        if job.reference and job.model.adapter:
            yield Item("reference's adapter", size(weights), "kl_coef with an adapter that is trained on")
    elif job.reference:
        yield Item("reference model", weights_item(whose, job.model).bytes, "kl_coef with all weights trained")
    trained = optimizer_bytes(job.optimizer, weights[0].dtype, size(weights) * _adapters(job))
    yield Item("optimizer", trained, f"for {_millions(weights)}{_twice(job)}")


def _adapters(job: Job) -> int:
    return 2 if job.critic else 1


def _twice(job: Job) -> str:
    return ", twice" if job.critic else ""


def _millions(weights: list[torch.nn.Parameter]) -> str:
    return f"{sum(weight.numel() for weight in weights) / 1e6:.1f} M"


def _frozen_adapter(base: ModelSpec, folder: str) -> Item:
    """Of the size of its file; before it is trained, of a fresh one."""
    file = Path(folder) / "adapter_model.safetensors"
    if file.is_file():
        return Item("simulator's adapter", file.stat().st_size, folder)
    weights = adapter_weights(base.path, base.dtype, LoraSpec())
    return Item("simulator's adapter", size(weights), f"not there yet: as if of rank {LoraSpec().r}")


def _hold_rows(card: Card, spec: ModelSpec, wanted: int, length: int, whose: str = "") -> int:
    """Adds what a generator takes; returns how many rows it holds, planned as the generator does it."""
    config, dtype = architecture(spec.path), getattr(torch, spec.dtype)
    slot = slot_bytes(config, length, dtype)
    # What a generator works with is free again when the next one is made; its keys and values are not.
    taken = card.lasting + sum(item.bytes for item in card.rollout if "keys and values" in item.what)
    try:
        rows = plan_slots(wanted, slot, max(0, card.capacity - taken))
    except ValueError as error:
        card.problems.append(str(error))
        rows = 1
    tokens = PREFILL_TOKENS["cpu" if spec.device == "cpu" else "cuda"]
    working = prefill_bytes(spec.path, spec.dtype, tokens) + rows * config.vocab_size * SAMPLING
    card.rollout += [
        Item(f"{whose}keys and values", rows * slot, f"{rows} of {wanted} rows of {length} tokens"),
        Item(f"{whose}prefill and sampling", working, f"{tokens} new tokens at a time"),
    ]
    return rows
