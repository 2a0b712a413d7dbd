"""Multi-turn rollouts: from questions to trajectories, and from trajectories to padded batches."""

from zs_lightning.rollout.actor import Actor
from zs_lightning.rollout.collate import collate, micro_batches
from zs_lightning.rollout.rollouter import Rollouter, RolloutSpec

__all__ = ["Actor", "RolloutSpec", "Rollouter", "collate", "micro_batches"]
