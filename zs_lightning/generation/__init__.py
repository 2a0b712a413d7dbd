"""Token ids in, token ids and log-probabilities out: many rows at once, K/V kept across turns."""

from zs_lightning.generation.generator import Generator
from zs_lightning.generation.mixed_adapters import MixedAdapters, own_adapter
from zs_lightning.generation.rows import Generated, Request
from zs_lightning.generation.sampler import Sampling
from zs_lightning.generation.stop import StopTags

__all__ = ["Generated", "Generator", "MixedAdapters", "Request", "Sampling", "StopTags", "own_adapter"]
