"""Token ids in, token ids and log-probabilities out: many rows at once, K/V kept across turns."""

from zs_lightning.engine.engine import Engine, Generated, Request
from zs_lightning.engine.sampler import Sampling
from zs_lightning.engine.stop import StopTags

__all__ = ["Engine", "Generated", "Request", "Sampling", "StopTags"]
