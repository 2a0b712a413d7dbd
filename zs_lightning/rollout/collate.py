"""From trajectories to padded micro-batches."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from zs_lightning.types import MicroBatch, Trajectory

T = TypeVar("T")


def row_length(trajectory: Any) -> int:
    """Tokens of a trajectory, prompt included."""
    return len(trajectory.prompt_ids) + len(trajectory.token_ids)


def micro_batches(
    rows: Sequence[T],
    tokens: int,
    length: Callable[[T], int] = row_length,
) -> list[list[T]]:
    """Splits into batches of similar length with at most `tokens` padded tokens each (or one
    row)."""
    batches: list[list[T]] = []
    # From short to long, so that little is padded and the newest row is the width of its batch.
    for row in sorted(rows, key=length):
        if not batches or (len(batches[-1]) + 1) * length(row) > tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def recut(batches: Sequence[MicroBatch], tokens: int) -> list[MicroBatch]:
    """The same rows, with all that is known of them, in batches of at most `tokens` padded tokens
    each (or one row)."""
    found = []
    for batch in batches:
        # Its rows are sorted already, so that those of a part follow each other.
        first = 0
        for part in micro_batches(batch.trajectories, tokens):
            found.append(batch if len(part) == len(batch.trajectories) else _part(batch, first, part))
            first += len(part)
    return found


def _part(batch: MicroBatch, first: int, trajectories: list[Trajectory]) -> MicroBatch:
    """Some rows of a batch that follow each other."""
    # No wider than the longest row, which is the last one: the rest would be padding alone.
    rows, width = slice(first, first + len(trajectories)), row_length(trajectories[-1])
    mine = (batch.rows >= rows.start) & (batch.rows < rows.stop)
    tensors = {}
    for name in ("old_logprobs", "advantages", "first_logprobs", "ref_logprobs", "values", "returns"):
        if (tensor := getattr(batch, name)) is not None:
            tensors[name] = tensor[mine]
    return MicroBatch(
        trajectories=trajectories,
        input_ids=batch.input_ids[rows, :width],
        loss_mask=batch.loss_mask[rows, :width],
        rows=batch.rows[mine] - first,
        **tensors,
    )


def collate(
    trajectories: Sequence[Trajectory],
    pad_id: int,
    device: torch.device | str = "cpu",
) -> MicroBatch:
    """Right-pads to the longest trajectory, with each trajectory's advantage at each of its tokens.

    Nothing that counts sees what is behind it, so pad_id may be any token.
    """
    # On the CPU, and then to the device in one go for each tensor.
    count = len(trajectories)
    width = max(row_length(trajectory) for trajectory in trajectories)
    input_ids = torch.full((count, width), pad_id, dtype=torch.long)
    loss_mask = torch.zeros(count, width, dtype=torch.bool)
    old_logprobs = torch.zeros(count, width)
    for i, trajectory in enumerate(trajectories):
        start = len(trajectory.prompt_ids)
        end = row_length(trajectory)
        input_ids[i, :end] = torch.tensor(trajectory.prompt_ids + trajectory.token_ids)
        loss_mask[i, start:end] = torch.tensor(trajectory.loss_mask, dtype=torch.bool)
        old_logprobs[i, start:end] = torch.tensor(trajectory.old_logprobs)
    # The first token has nothing before it to be predicted from.
    trained = loss_mask[:, 1:]
    rows = trained.nonzero()[:, 0]
    # One for each trajectory; a critic replaces them by one for each token.
    advantages = torch.tensor([trajectory.advantage for trajectory in trajectories])
    return MicroBatch(
        trajectories=list(trajectories),
        input_ids=input_ids.to(device),
        loss_mask=loss_mask.to(device),
        rows=rows.to(device),
        old_logprobs=old_logprobs[:, 1:][trained].to(device),
        advantages=advantages[rows].to(device),
    )
