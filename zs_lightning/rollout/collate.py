"""From trajectories to padded micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from zs_lightning.types import Trajectory, TrajectoryBatch

T = TypeVar("T")


def _length(trajectory: Any) -> int:
    return len(trajectory.prompt_ids) + len(trajectory.token_ids)


def micro_batches(rows: Sequence[T], tokens: int, length: Callable[[T], int] = _length) -> list[list[T]]:
    """Splits into batches of similar length with at most `tokens` padded tokens each (or one row)."""
    batches: list[list[T]] = []
    for row in sorted(rows, key=length):
        if not batches or (len(batches[-1]) + 1) * length(row) > tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def collate(trajectories: Sequence[Trajectory], pad_id: int, device: torch.device | str = "cpu") -> TrajectoryBatch:
    """Right-pads to the longest trajectory. Nothing that counts sees what is behind it, so pad_id may be any token."""
    rows, width = len(trajectories), max(_length(t) for t in trajectories)
    input_ids = torch.full((rows, width), pad_id, dtype=torch.long)
    loss_mask = torch.zeros(rows, width, dtype=torch.bool)
    old_logprobs = torch.zeros(rows, width)
    for i, trajectory in enumerate(trajectories):
        start, end = len(trajectory.prompt_ids), _length(trajectory)
        input_ids[i, :end] = torch.tensor(trajectory.prompt_ids + trajectory.token_ids)
        loss_mask[i, start:end] = torch.tensor(trajectory.loss_mask, dtype=torch.bool)
        old_logprobs[i, start:end] = torch.tensor(trajectory.old_logprobs)
    return TrajectoryBatch(
        input_ids=input_ids.to(device),
        loss_mask=loss_mask.to(device),
        old_logprobs=old_logprobs.to(device),
        advantages=torch.tensor([t.advantage for t in trajectories], device=device),
    )
