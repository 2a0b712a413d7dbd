"""Token ids in, token ids and log-probabilities out: many rows at once, K/V kept across turns."""

from zs_lightning.engine.adapters import MixedAdapters
from zs_lightning.engine.engine import Engine
from zs_lightning.engine.rows import Generated, Request
from zs_lightning.engine.sampler import Sampling
from zs_lightning.engine.stop import StopTags

__all__ = ["Engine", "Generated", "MixedAdapters", "Request", "Sampling", "StopTags"]
