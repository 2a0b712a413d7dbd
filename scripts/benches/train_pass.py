"""One policy-gradient pass over multi-turn trajectories with LoRA, against padded batches with logits for every token."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benches.harness import Row, UnequalResultsError, compare
from benches.work import WORDS, make_model, plan
from zs_lightning.models.logprobs import token_logprobs
from zs_lightning.models.lora import add_lora
from zs_lightning.models.specs import LoraSpec
from zs_lightning.rl.losses import policy_gradient_loss
from zs_lightning.rollout import collate, micro_batches
from zs_lightning.types import QAExample, Trajectory

SHAPE = "small"
REQUIRED = {32: 1.5}
"""Trajectories, and how often faster than the padded pass we must be."""
MICRO = 8
"""Trajectories of a padded micro-batch; ours holds as many padded tokens."""
TOLERANCE = 1e-5
"""Largest difference of a gradient, relative to the largest gradient."""


def make_trajectories(rows: int) -> list[Trajectory]:
    """Four turns and three documents each; about a third of the tokens are sampled ones."""
    rng = random.Random(1)
    found = []
    for i, planned in enumerate(plan(rows)):
        example = QAExample(id=str(i), question="", golden_answers=(), source="bench")
        trajectory = Trajectory(example=example, sample=0, prompt_ids=planned.prompt, advantage=rng.choice([-1.0, 0.5, 1.0]))
        for sampled, document in zip(planned.sampled, [*planned.documents, []], strict=True):
            trajectory.token_ids += [rng.randrange(*WORDS) for _ in range(sampled)] + document
            trajectory.loss_mask += [True] * sampled + [False] * len(document)
        trajectory.old_logprobs = [-1.0] * len(trajectory.token_ids)
        found.append(trajectory)
    return found


def length(trajectory: Trajectory) -> int:
    return len(trajectory.prompt_ids) + len(trajectory.token_ids)


def with_adapter(ours: bool) -> Any:
    """A LoRA policy; the fresh adapter's zeros are replaced, so that every part of it has a gradient."""
    model = add_lora(make_model(SHAPE, ours), LoraSpec(), seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02, generator=generator)
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def ours(
    model: Any, trajectories: list[Trajectory], device: str = "cpu", micro_batch_tokens: int | None = None
) -> dict[str, Tensor]:
    tokens = sum(sum(t.loss_mask) for t in trajectories)
    for micro_batch in micro_batches(trajectories, micro_batch_tokens or MICRO * max(map(length, trajectories))):
        batch = collate(micro_batch, 0, device)
        logprobs, _ = token_logprobs(model, batch.input_ids, batch.loss_mask)
        policy_gradient_loss(logprobs, batch.old_logprobs, batch.advantages, tokens)[0].backward()
    return gradients(model)


def padded(model: Any, trajectories: list[Trajectory]) -> dict[str, Tensor]:
    """Rows as they come, padded to the longest of the whole batch; logits and entropy of every token, then the mask."""
    tokens, width = sum(sum(t.loss_mask) for t in trajectories), max(map(length, trajectories))
    for start in range(0, len(trajectories), MICRO):
        batch = collate(trajectories[start : start + MICRO], 0)
        missing = (0, width - batch.input_ids.shape[1])
        ids, trained = (functional.pad(t, missing) for t in (batch.input_ids, batch.loss_mask))
        ends = torch.tensor([length(t) for t in trajectories[start : start + MICRO]])
        attention = torch.arange(width) < ends[:, None]
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1].float()
        every = functional.log_softmax(logits, -1)
        with torch.no_grad():  # Our side reports the entropy as well; the reference even keeps its graph.
            (every.exp() * every).sum(-1)
        logprobs = every.gather(2, ids[:, 1:, None])[..., 0]
        ratio = (logprobs - logprobs.detach()).exp()
        advantages = torch.tensor([t.advantage for t in batch.trajectories])
        (-(ratio * advantages[:, None] * trained[:, 1:]).sum() / tokens).backward()
    return gradients(model)


def same_gradients(one: dict[str, Tensor], other: dict[str, Tensor]) -> str:
    """Raises UnequalResultsError unless every weight has the same gradient."""
    if one.keys() != other.keys():
        raise UnequalResultsError("the sides gave gradients to different weights")
    scale = max(float(g.abs().max()) for g in other.values())
    error = max(float((one[name] - other[name]).abs().max()) for name in other) / scale
    if not error <= TOLERANCE:
        raise UnequalResultsError(f"gradients differ by {error:.1e} of the largest, expected at most {TOLERANCE:.0e}")
    return f"gradients within {error:.0e}"


def peak_mb(work: Callable[[], Any]) -> float:
    """Most memory that tensors of `work` held at once beyond what was there before, from the allocator's own records."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    records = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for record in sorted(records, key=lambda event: event.start_ns()):
        held += record.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def run() -> Iterator[Row]:
    our_model, peer_model = with_adapter(ours=True), with_adapter(ours=False)
    for rows, required in REQUIRED.items():
        trajectories = make_trajectories(rows)
        sides = {"ours": partial(ours, our_model, trajectories), "padded": partial(padded, peer_model, trajectories)}
        ours(our_model, trajectories[:1])
        padded(peer_model, trajectories[:1])
        seconds, equal = compare(sides, same_gradients)
        about = {"case": f"{rows} trajectories", "peer": "padded, logits of all tokens", "equal": equal["padded"]}
        yield Row(**about, ours=seconds["ours"], theirs=seconds["padded"], required=required)
        memory = {name: peak_mb(work) for name, work in sides.items()}
        about["case"] += ", peak memory"
        yield Row(**about, ours=memory["ours"], theirs=memory["padded"], required=1.0, unit="mb")
