"""Multi-turn rollouts: from questions to trajectories, and from trajectories to padded batches."""

from zs_lightning.rollout.collate import collate, micro_batches
from zs_lightning.rollout.loop import Rollout, RolloutSpec

__all__ = ["Rollout", "RolloutSpec", "collate", "micro_batches"]
