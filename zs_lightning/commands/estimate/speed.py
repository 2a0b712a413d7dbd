"""Seconds of a training step by arithmetic: bytes by memory bandwidth and operations by FLOP/s. Nothing here is measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import ceil

import torch

from zs_lightning.commands.estimate.architectures import architecture
from zs_lightning.commands.estimate.cards import Rates
from zs_lightning.commands.estimate.job import PROMPT, SIMULATOR_PROMPT, Job
from zs_lightning.commands.estimate.memory import Plan
from zs_lightning.commands.estimate.traced import build
from zs_lightning.generation.slots import slot_bytes
from zs_lightning.models.specs import ModelSpec

DECODE, PREFILL, TRAIN = 0.75, 0.5, 0.4
"""Assumed shares of the peak: of the bandwidth in decoding, of the FLOP/s in prefill and in training."""
LAUNCH = 0.0009
"""Assumed least seconds of a layer in a decoding step: the kernels of a step are launched one by one."""
WEIGHT_BYTES = {"none": 2.0, "nf4": 4.5, "int8": 1.0}
"""Bytes moved for each weight in a decoding step; nf4 is read, written as bfloat16 and read again."""


@dataclass(frozen=True)
class Sizes:
    """Of a model: weights that a token is multiplied with, in the layers and in the head, and bytes of its keys and values."""

    body: int
    head: int
    layers: int
    token_bytes: int

    @property
    def weights(self) -> int:
        return self.body + self.head


@cache
def sizes(spec: ModelSpec) -> Sizes:
    config = architecture(spec.path)
    model = build(config, spec.dtype)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    total = sum(parameter.numel() for parameter in model.parameters())
    body = total - embedding.numel() - (0 if head is embedding else head.numel())
    token = slot_bytes(config, 1, getattr(torch, spec.dtype))
    return Sizes(body, head.numel(), config.num_hidden_layers, token)


def decode_seconds(spec: ModelSpec, rows: float, context: float, rates: Rates) -> float:
    """Of one decoding step."""
    model = sizes(spec)
    moved = model.weights * WEIGHT_BYTES[spec.quantization] + rows * context * model.token_bytes
    return max(
        moved / (rates.bandwidth * DECODE),
        2 * model.weights * rows / (rates.flops * PREFILL),
        model.layers * LAUNCH,
    )


def training_seconds(job: Job, rates: Rates) -> float:
    """Forward and backward passes of one training step; the head sees only the trained tokens."""
    model = sizes(job.model)
    backward = 1 if job.lora is not None else 2
    passes = 1 + backward + job.checkpointing + job.reference
    share = job.rollouts.sampled / job.rollouts.context if job.rollouts else 1.0
    # The head's chunks are always recomputed.
    head = model.head * share * (2 + backward + job.reference)
    operations = job.updates * (model.body * passes + head)
    if job.critic:  # Its passes need neither reference nor vocabulary; one goes before the updates.
        operations += model.body * (job.updates * (passes - job.reference) + 1)
    return 2 * job.trained * operations / (rates.flops * TRAIN)


def step_seconds(job: Job, plan: Plan, rates: Rates) -> dict[str, float]:
    """Seconds by phase."""
    seconds = {"training": training_seconds(job, rates)}
    work, simulator = job.rollouts, job.simulator
    if work is None:
        return seconds
    waves = ceil(work.count / plan.rows)
    one = decode_seconds(job.model, work.count / waves, 0.6 * work.context, rates)
    seconds["policy writes"] = waves * work.sampled * one
    prefilled = work.count * (PROMPT / work.group_size + work.searches * work.result)
    operations = 2 * sizes(job.model).weights * prefilled
    if simulator is not None:
        spec = job.model if simulator.shared else simulator.model
        searches = work.count * work.searches
        # Every rollout of a wave waits for its search before any of them asks again.
        waves = work.searches * ceil(work.count / plan.simulator_rows)
        context = SIMULATOR_PROMPT + simulator.written / 2
        one = decode_seconds(spec, searches / max(1, waves), context, rates)
        seconds["simulator writes"] = waves * simulator.written * one
        operations += 2 * sizes(spec).weights * searches * SIMULATOR_PROMPT
        if simulator.shared:
            both = (seconds.pop("policy writes"), seconds.pop("simulator writes"))
            seconds["policy and simulator write in one batch"] = max(both)
    seconds["prefill"] = operations / (rates.flops * PREFILL)
    return seconds
