"""What lies on each card, when: always, while rollouts are written, and while the model is
updated."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from zs_lightning.commands.estimate.architectures import architecture
from zs_lightning.commands.estimate.job import WRITING, Job
from zs_lightning.commands.estimate.traced import optimizer_bytes, prefill_bytes, training_pass
from zs_lightning.generation.kv_cache import plan_slots, slot_bytes
from zs_lightning.generation.prefill import PREFILL_TOKENS
from zs_lightning.models.checks import AUTOCAST
from zs_lightning.models.sizes import bare_model, weight_bytes
from zs_lightning.models.specs import LoraSpec, ModelSpec

SAMPLING = 16
"""Bytes for each row and word of the vocabulary: float32 logits, sorted, and their cumulated
probabilities."""


@dataclass(frozen=True)
class Item:
    """Something that takes memory."""

    what: str
    bytes: int
    note: str = ""


@dataclass
class Card:
    """What one device holds. Rollouts and updates take turns: the memory of one is given back
    before the other."""

    name: str
    capacity: int
    always: list[Item] = field(default_factory=list)
    rollout: list[Item] = field(default_factory=list)
    update: list[Item] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    """Of each of its generators."""

    @property
    def peak(self) -> int:
        return _sum(self.always) + max(_sum(self.rollout), _sum(self.update))

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity and not self.problems


def _sum(items: list[Item]) -> int:
    return sum(item.bytes for item in items)


def place(spec: ModelSpec) -> str:
    """The device, where auto and cuda are the first card."""
    return spec.device if spec.device == "cpu" or ":" in spec.device else "cuda:0"


@cache
def skeleton(path: str, dtype: str) -> Any:
    """The base model with shapes only, made once for all questions about it."""
    return bare_model(architecture(path), dtype)


def adapter_count(spec: ModelSpec, lora: LoraSpec) -> int:
    """Numbers in an adapter on all linear layers but the vocabulary head, as peft makes it."""
    model = skeleton(spec.path, spec.dtype)
    # peft's all-linear leaves the head out.
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    count = sum(lora.r * (layer.in_features + layer.out_features) for layer in layers)
    # DoRA trains the length of each row of the weights as well.
    return count + lora.dora * sum(layer.out_features for layer in layers)


def plan(job: Job, capacity: int) -> list[Card]:
    """The cards of a job, of `capacity` bytes each, and what lies on them. Raises UserError if a
    model's sizes are not known."""
    simulator = job.simulator
    # What lies there first leaves less for the rows of a generator.
    home = away = Card(place(job.model), capacity)
    home.always += _trained_model(job)
    home.update += _update(job)
    if simulator is None:
        _hold_rows(home, job.model, job.slots, job.length)
    elif simulator.shared:
        if simulator.spec.adapter:
            home.always.append(_frozen_adapter(job.model, simulator.spec.adapter))
        # One generator writes for both, in rows as long as the longer ones.
        length = max(job.length, simulator.max_length)
        _hold_rows(home, job.model, job.slots + simulator.slots, length)
    else:
        spec = simulator.spec
        if place(spec) != home.name:
            away = Card(place(spec), capacity)
        away.always.append(weights_item("simulator", spec))
        # Merged into weights that can hold it, an adapter takes nothing.
        if spec.adapter and not spec.merges:
            away.always.append(_frozen_adapter(spec, spec.adapter))
        _hold_rows(home, job.model, job.slots, job.length)
        _hold_rows(away, spec, simulator.slots, simulator.max_length, "simulator's ")
    home.rollout += _rollouts_adapter(job)
    return [home] if home is away else [home, away]


def weights_item(whose: str, spec: ModelSpec) -> Item:
    """The weights of a base model, with what of them stays in full size."""
    model = skeleton(spec.path, spec.dtype)
    count = sum(weight.numel() for weight in model.parameters())
    kind: str = spec.dtype
    if spec.quantization != "none":
        kind = f"{spec.quantization}, the rest {spec.dtype}"
        # bitsandbytes replaces linear layers only; the experts of a mixture are stacked in one
        # weight each and stay as they are.
        experts = sum(weight.nbytes for weight in model.parameters() if weight.dim() > 2)
        kind += f", of which experts {experts / 1e9:.2f} GB" if experts else ""
    size = weight_bytes(model, spec.quantization)
    return Item(f"{whose}'s weights", size, f"{count / 1e9:.2f} B, {kind}")


def _trained(job: Job) -> tuple[int, torch.dtype]:
    """Count and type of the weights that training changes, the critic's not counted."""
    if job.lora is not None:
        return adapter_count(job.model, job.lora), torch.float32
    weights = list(skeleton(job.model.path, job.model.dtype).parameters())
    return sum(weight.numel() for weight in weights), weights[0].dtype


def _trained_model(job: Job) -> list[Item]:
    """What training keeps: the model, what is new in it, and the optimiser's state."""
    count, dtype = _trained(job)
    size = count * dtype.itemsize
    items = [weights_item(job.whose, job.model)]
    # Switched off, a new adapter leaves the base as it was: kl_coef then needs no other model.
    if job.lora is not None:
        note = f"{count / 1e6:.1f} M, rank {job.lora.r}"
        items.append(Item(f"{job.whose}'s adapter", size, note))
        if job.critic:
            items.append(Item("critic's adapter", size, note))
        if job.reference and job.model.adapter:
            note = "kl_coef with an adapter that is trained on"
            items.append(Item("reference's adapter", size, note))
    elif job.reference:
        items.append(Item("reference model", items[0].bytes, "kl_coef with all weights trained"))
    state = optimizer_bytes(job.optimizer, dtype, size * (1 + job.critic))
    return [*items, Item("optimizer", state, _what_for(job, count))]


def _update(job: Job) -> list[Item]:
    """What an update takes beside the model."""
    count, dtype = _trained(job)
    # Quantised weights are computed with in the same way: one trace does for both.
    model = ModelSpec(job.model.path, job.model.dtype)
    one_pass = training_pass(model, job.lora, job.tokens, job.checkpointing, job.precision)
    kept = "inputs of the layers" if job.checkpointing else "no checkpointing"
    backward = one_pass.peak - one_pass.saved
    return [
        Item("gradients", count * dtype.itemsize * (1 + job.critic), _what_for(job, count)),
        Item("activations", one_pass.saved, f"{job.tokens} tokens in a pass; {kept}"),
        Item("logits, backward pass", backward, "one layer or one chunk of the head at a time"),
    ]


def _rollouts_adapter(job: Job) -> list[Item]:
    """The adapter once more, in the precision of rollouts, which peft's own forward does without."""
    if WRITING not in job.work or job.lora is None or job.lora.dora:
        return []
    dtype = AUTOCAST[job.precision] or torch.float32
    return [Item("adapter's copy", _trained(job)[0] * dtype.itemsize, "as rollouts use it")]


def _what_for(job: Job, count: int) -> str:
    return f"for {count / 1e6:.1f} M{', twice' if job.critic else ''}"


def _frozen_adapter(base: ModelSpec, folder: str) -> Item:
    """The simulator's adapter: its file, or before it is trained, one of the usual rank."""
    file = Path(folder) / "adapter_model.safetensors"
    if file.is_file():
        return Item("simulator's adapter", file.stat().st_size, folder)
    usual = LoraSpec()
    size = adapter_count(base, usual) * torch.float32.itemsize
    return Item("simulator's adapter", size, f"not there yet: as if of rank {usual.r}")


def _hold_rows(card: Card, spec: ModelSpec, wanted: int, length: int, whose: str = "") -> None:
    """Adds what a generator takes, its rows planned as it plans them."""
    config = architecture(spec.path)
    slot = slot_bytes(config, length, getattr(torch, spec.dtype))
    # What a generator works with is free again when the next one is made; its keys and values
    # are not.
    held = [item for item in card.rollout if "keys and values" in item.what]
    taken = _sum(card.always) + _sum(held)
    try:
        rows = plan_slots(wanted, slot, max(0, card.capacity - taken))
    except ValueError as error:
        # Shown beside the table, which says how much one row would take.
        card.problems.append(str(error))
        rows = 1
    card.rows.append(rows)
    tokens = PREFILL_TOKENS["cpu" if spec.device == "cpu" else "cuda"]
    working = prefill_bytes(spec.path, spec.dtype, tokens) + rows * config.vocab_size * SAMPLING
    note = f"{rows} of {wanted} rows of {length} tokens"
    card.rollout += [
        Item(f"{whose}keys and values", rows * slot, note),
        Item(f"{whose}prefill and sampling", working, f"{tokens} new tokens at a time"),
    ]
