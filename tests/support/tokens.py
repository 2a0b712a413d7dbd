"""Trained tokens of a micro-batch without the text of the trajectories they are of."""

import torch

from zs_lightning.types import MicroBatch


def tokens(rows, trajectories=(), **columns):
    """A micro-batch with these columns [K]; `rows` [K] says which trajectory each token is of."""
    none = torch.zeros(0, 0)
    return MicroBatch(trajectories=list(trajectories), input_ids=none.long(), loss_mask=none.bool(), rows=rows, **columns)
